"""Other libraries through their own seams."""

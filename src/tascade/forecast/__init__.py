"""What would help, and how much, before anything is built."""

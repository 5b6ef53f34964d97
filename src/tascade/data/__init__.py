"""Task data: what it may look like, and how it is read."""

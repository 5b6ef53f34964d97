"""What outputs contain: suffix arrays on disk, similar examples, look-ups."""

"""TASC-ft: output n-grams become tokens, and the model is taught to say them."""

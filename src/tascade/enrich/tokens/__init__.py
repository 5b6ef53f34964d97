"""Choosing new tokens, and adding them to a tokenizer."""

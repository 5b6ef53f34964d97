"""Drafts from a network: today a smaller model of the same tokenizer."""

"""Verifying drafts on an unmodified Transformers model: cache, masks, sampling, the loop."""

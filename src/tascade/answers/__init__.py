"""The model's own answers to many prompts: one by one, in batches, or in vLLM."""

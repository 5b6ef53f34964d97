"""Training: LoRA and the new tokens' rows."""

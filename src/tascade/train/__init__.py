"""Teaching a model new tokens: rows, LoRA, and what the model itself says as the lesson."""

"""VocabTailor: the task's tokens as a list, and an LM head of those."""

"""New tokens for a task: frequent output n-grams, chosen, merged exactly, and checked."""

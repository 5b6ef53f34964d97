"""TASC-spec: drafts from the n-grams of the task's outputs and of the request."""

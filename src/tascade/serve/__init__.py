"""Serving a pack: vLLM where it is installed, else a small server over tascade's own loop."""

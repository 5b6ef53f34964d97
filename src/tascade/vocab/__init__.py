"""Tailoring: the part of a vocabulary that a task needs, and where the rest is kept."""

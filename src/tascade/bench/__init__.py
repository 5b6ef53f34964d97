"""Measuring: methods in turns, metrics, peers, the report."""

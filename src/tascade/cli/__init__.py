"""The command line: one thin function a verb."""

from tascade.cli.verbs import app, main

__all__ = ["app", "main"]

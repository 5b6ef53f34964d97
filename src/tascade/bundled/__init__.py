"""The demo that ships with tascade: three narrow tasks and a small model that has learned them.

The tasks are ``tickets`` (a support message to a triage record in JSON), ``sql`` (a question to a
query over one schema) and ``notes`` (the fields of a ward round to a handover note). All rows are
invented, written by ``examples/bundled/make_tasks.py``; ``examples/bundled/train_model.py`` made
the model. Nothing here needs a network.
"""

from __future__ import annotations

from pathlib import Path

from tascade.errors import ConfigError

__all__ = ["data_path", "model_path", "splits", "tasks"]

_HERE = Path(__file__).parent
_TASKS = ("tickets", "sql", "notes")
_SPLITS = ("train", "validation", "test")


def model_path() -> Path:
    """Folder of the bundled model: a plain Hugging Face checkpoint with its tokenizer."""
    return _HERE / "model"


def tasks() -> tuple[str, ...]:
    """Names of the bundled tasks."""
    return _TASKS


def splits() -> tuple[str, ...]:
    """Names of the splits that every bundled task has."""
    return _SPLITS


def data_path(task: str, split: str = "train") -> Path:
    """The JSONL file of one split of one bundled task.

    Raises:
        ConfigError: there is no such task or split.
    """
    for kind, name, known in (("task", task, _TASKS), ("split", split, _SPLITS)):
        if name not in known:
            raise ConfigError(
                f"there is no bundled {kind} of this name",
                got=repr(name),
                wanted=f"one of {', '.join(known)}",
                where=f"tascade.bundled.data_path({kind}=...)",
                fix="for your own data, give the path of its file instead",
            )
    return _HERE / "data" / task / f"{split}.jsonl"

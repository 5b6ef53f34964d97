"""What the scripts of this folder share: a pack with prompts to ask it, and reports as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tascade.bench.machine import machine_info
from tascade.core import IntArray
from tascade.data.load import load_examples
from tascade.data.prepare import spread
from tascade.model import TaskModel


def opened(pack: str, rows: str, count: int) -> tuple[TaskModel, list[IntArray]]:
    """A pack, and ``count`` prompts of a file, evenly spaced."""
    task = TaskModel.from_pretrained(pack)
    examples = spread(list(load_examples(rows, split="test")), count)
    return task, [task.encode(example.prompt) for example in examples]


def spread_of(values: Sequence[float], digits: int) -> list[float]:
    """Median, least and most."""
    return [round(float(np.quantile(values, q)), digits) for q in (0.5, 0.0, 1.0)]


def write(report: dict[str, Any], path: Path | None, *, show: bool = True) -> None:
    """Show a report, and write it with the machine it was made on, where there is a path."""
    if show:
        print(json.dumps(report, indent=1))
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report | {"machine": machine_info()}, indent=1) + "\n")

"""What a benchmark had measured when it was stopped, kept so that it can go on."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tascade.core import Generation, StepStats
from tascade.errors import ConfigError
from tascade.util.files import read_json, write_atomic

_MOST_BYTES = 1 << 30
Repeats = list[tuple[list[float], list[Generation]]]
"""Of one method, by repeat: seconds and answers, by request."""


def save(path: Path, key: str, rows: Sequence[int], done: Mapping[str, Repeats]) -> None:
    """Write the complete repeats of each method.

    Args:
        path: of the file, which is replaced.
        key: says what is measured; another benchmark has another.
        rows: which of the requests are measured, in order.
        done: by method.
    """
    methods = {
        name: [[seconds, [_plain(made) for made in run]] for seconds, run in repeats]
        for name, repeats in done.items()
    }
    write_atomic(path, json.dumps({"key": key, "rows": [*rows], "methods": methods}).encode())


def load(path: Path, key: str) -> tuple[list[int], dict[str, Repeats]]:
    """What :func:`save` has written.

    Raises:
        ConfigError: there is no such file, it is damaged, or of another benchmark.
    """
    try:
        raw: Any = read_json(path, _MOST_BYTES)
        rows = [int(row) for row in raw["rows"]]
        done: dict[str, Repeats] = {
            name: [([float(s) for s in seconds], [*map(_made, run)]) for seconds, run in repeats]
            for name, repeats in raw["methods"].items()
        }
        lengths = {len(part) for repeats in done.values() for pair in repeats for part in pair}
        if lengths - {len(rows)} or len({len(repeats) for repeats in done.values()}) > 1:
            raise ValueError("its parts do not fit together")
        found = raw["key"]
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ConfigError(
            "no benchmark to go on with",
            got=str(error)[:200],
            wanted="one that was stopped after a whole repeat",
            where=str(path),
            fix="leave out --resume",
        ) from error
    if found != key:
        raise ConfigError(
            "the benchmark that was stopped was another",
            got="other methods, rows, options, model or threads",
            wanted="the same command",
            where=str(path),
            fix="give the options of the one that was stopped, or leave out --resume",
        )
    return rows, done


def _plain(made: Generation) -> dict[str, Any]:
    kept = dataclasses.asdict(dataclasses.replace(made, logprobs=[], extra={}))
    kept["steps"] = [[*step.values()] for step in kept["steps"]]
    return kept


def _made(raw: Any) -> Generation:
    known = {field.name for field in dataclasses.fields(Generation)}
    if set(raw) != known:
        raise ValueError("an answer with other fields")
    return Generation(**{**raw, "steps": [StepStats(*step) for step in raw["steps"]]})

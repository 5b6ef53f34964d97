"""Answers so far in a file, so that a run that was stopped can go on."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tascade.core import IntArray
from tascade.errors import ConfigError

_EVERY = 64


class KeptAnswers:
    """A file with a line for each answer: ``[which row, [token ids]]``.

    A line that a killed process left unfinished is cut off.

    Raises:
        ConfigError: the file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._since = path, 0
        try:
            self._file = path.open("a+b")
        except OSError as error:
            raise ConfigError("cannot keep the answers", got=error, where=str(path)) from error

    def read(self) -> Iterator[tuple[int, IntArray]]:
        """Which row each answer is of, and the answer [T].

        Raises:
            ConfigError: a whole line that is none of this kind.
        """
        self._file.seek(0)
        lines = self._file.read().splitlines(keepends=True)
        if lines and not lines[-1].endswith(b"\n"):
            torn = lines.pop()
            self._file.truncate(self._file.tell() - len(torn))
        for number, line in enumerate(lines, 1):
            try:
                place, ids = json.loads(line)
                found = np.asarray(ids, np.int32)
                if type(place) is not int or found.ndim != 1 or not len(found) or found.min() < 0:
                    raise ValueError(f"{line[:60]!r}")
            except (ValueError, TypeError, OverflowError, RecursionError) as error:
                raise ConfigError(
                    "the answers that were kept are damaged",
                    got=error,
                    wanted="[row, [token ids]]",
                    where=f"{self._path}:{number}",
                    fix="run without resume to begin anew",
                ) from error
            yield place, found

    def add(self, place: int, ids: IntArray) -> None:
        """Keep an answer; it outlives this process at once, and the machine after some more."""
        self._file.write(json.dumps([place, ids.tolist()]).encode() + b"\n")
        self._file.flush()
        self._since += 1
        if self._since >= _EVERY:
            self._sync()

    def _sync(self) -> None:
        os.fsync(self._file.fileno())
        self._since = 0

    def close(self) -> None:
        """Have all of it on disk."""
        self._sync()
        self._file.close()

"""Splits a batch over threads, as long as that is faster than one."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from itertools import pairwise
from typing import Any

_ROWS_EACH = 8
_TRY_EVERY = 64
_RECENT = 0.2


class Lanes:
    """Threads that share the rows of a batch, each with working memory of its own.

    Whether they help is measured: an engine whose own threads spin while they wait leaves no core
    for ours, and then one lane is sooner done. The other way is tried again now and then.

    Args:
        threads: how many at most; 0 for all cores, at most four.
        new_work: makes one lane's working memory.
    """

    def __init__(self, threads: int, new_work: Callable[[], Any]) -> None:
        threads = threads or min(4, os.cpu_count() or 1)
        self._works = [new_work() for _ in range(threads)]
        self._pool = ThreadPoolExecutor(threads, "tascade-draft")
        self._row_seconds: dict[bool, float] = {}
        self._turn = 0

    def run(self, part: Callable[[slice, Any], None], rows: int) -> list[Any]:
        """Call ``part`` with slices of ``range(rows)``; returns the working memories used."""
        most = min(len(self._works), rows // _ROWS_EACH)
        if most <= 1:
            part(slice(0, rows), self._works[0])
            return self._works[:1]
        split = self._split()
        begin = time.perf_counter()
        works = self._works[: most if split else 1]
        bounds = [i * rows // len(works) for i in range(len(works) + 1)]
        pieces = [slice(a, b) for a, b in pairwise(bounds)]
        others = [
            self._pool.submit(part, piece, work)
            for piece, work in zip(pieces[1:], works[1:], strict=True)
        ]
        part(pieces[0], works[0])
        wait(others)
        for other in others:
            other.result()
        self._took(split, (time.perf_counter() - begin) / rows)
        return works

    def _split(self) -> bool:
        self._turn += 1
        if len(self._row_seconds) < 2:
            return not self._row_seconds
        faster = self._row_seconds[True] <= self._row_seconds[False]
        return faster if self._turn % _TRY_EVERY else not faster

    def _took(self, split: bool, seconds: float) -> None:
        before = self._row_seconds.get(split, seconds)
        seconds = min(seconds, 2.0 * before)  # one late step says little
        self._row_seconds[split] = before + _RECENT * (seconds - before)

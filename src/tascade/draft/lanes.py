"""Splits a batch over threads, as long as that is faster than one."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from itertools import pairwise
from statistics import median
from typing import Any

_ROWS_EACH = 8
_FIRST_TRIES = 12
_TRY_EVERY = 32
_REMEMBERED = 7


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
        recent = [deque[float](maxlen=_REMEMBERED) for _ in range(2)]
        self._row_seconds = {False: recent[0], True: recent[1]}
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
        self._row_seconds[split].append((time.perf_counter() - begin) / rows)
        return works

    def _split(self) -> bool:
        self._turn += 1
        if self._turn <= _FIRST_TRIES:
            return self._turn % 2 == 1
        alone, together = self._row_seconds[False], self._row_seconds[True]
        faster = median(together) <= median(alone)
        return faster if self._turn % _TRY_EVERY else not faster

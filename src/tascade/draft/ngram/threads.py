"""Threads that share the rows of a large batch."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

_SPLIT_FROM = 64
"""Rows from which a batch is split. ``benchmarks/batch_draft.py`` has 256; it was never varied."""


class Lanes:
    """Threads that share the rows of a large batch, each with working memory of its own.

    Args:
        threads: how many; 0 for all cores, at most four.
        new_work: makes one thread's working memory.
    """

    def __init__(self, threads: int, new_work: Callable[[], Any]) -> None:
        threads = threads or min(4, os.cpu_count() or 1)
        self._works = [new_work() for _ in range(threads)]
        self._pool = ThreadPoolExecutor(threads, "tascade-draft")

    def run(self, part: Callable[[slice, Any], None], rows: int) -> list[Any]:
        """Call ``part`` with slices of ``range(rows)``; returns the working memories used."""
        works = self._works if rows >= _SPLIT_FROM else self._works[:1]
        bounds = [i * rows // len(works) for i in range(len(works) + 1)]
        pieces = [slice(a, b) for a, b in pairwise(bounds)]
        others = [self._pool.submit(part, *job) for job in zip(pieces[1:], works[1:], strict=True)]
        part(pieces[0], works[0])
        for other in others:
            other.result()
        return works

"""Choosing some rows of many, spread over all of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

T = TypeVar("T")


def spread(rows: Sequence[T], count: int) -> list[T]:
    """At most ``count`` rows, evenly spaced over the whole sequence."""
    if len(rows) <= count:
        return list(rows)
    return [rows[i * len(rows) // count] for i in range(count)]


def thin(rows: Iterable[T], most: int) -> tuple[list[T], int]:
    """At most ``most`` rows of a stream, spread over the whole of it, and how many it had.

    No more than twice as many are held at any time, however long the stream is.
    """
    kept: list[T] = []
    step, count = 1, 0
    for row in rows:
        if count % step == 0:
            kept.append(row)
        if len(kept) == 2 * most:  # every other one of them, and of those to come
            kept, step = kept[::2], 2 * step
        count += 1
    return spread(kept, most), count

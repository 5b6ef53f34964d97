"""What many prompts of a task begin with: a system prompt, a template, a table of fields."""

from __future__ import annotations

from collections.abc import Sequence

from tascade.core import IntArray
from tascade.data.prepare import spread

MOST, LEAST_TOKENS = 16, 16
_LEAST_SHARE = 0.05
_LOOKED_AT = 2000
_LONGEST = 8192


def shared_beginnings(prompts: Sequence[IntArray]) -> list[list[int]]:
    """Beginnings that many prompts share, each with enough tokens more than a shorter one.

    Args:
        prompts: token ids of each, [T].

    Returns:
        At most :data:`MOST`, those of most prompts first.
    """
    rows = sorted(tuple(p[:_LONGEST].tolist()) for p in spread(prompts, _LOOKED_AT))
    found: list[tuple[int, tuple[int, ...]]] = []
    waiting = [(0, len(rows), 0)]
    while waiting:
        low, high, known = waiting.pop()
        if high - low < max(2, _LEAST_SHARE * len(rows)):
            continue
        same = _common(rows[low], rows[high - 1])
        if same - known >= LEAST_TOKENS:
            found.append((high - low, rows[low][:same]))
            known = same
        nexts = [row[same : same + 1] for row in rows[low:high]]
        starts = [low, *(low + i for i in range(1, len(nexts)) if nexts[i] != nexts[i - 1])]
        if len(starts) > 1:
            waiting += [(a, b, known) for a, b in zip(starts, [*starts[1:], high], strict=True)]
    found.sort(key=lambda entry: -entry[0])
    return [list(ids) for _, ids in found[:MOST]]


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )

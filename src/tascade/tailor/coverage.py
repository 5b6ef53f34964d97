"""How much of held-out answers a list of tokens covers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tascade.core import IntArray, Row

_Z = 1.959964  # 95 %, two-sided


@dataclass(frozen=True, slots=True)
class Coverage:
    """What of some answers is neither in the list, nor in the prompt, nor said before.

    documents, tokens: how many answers, and tokens of them. misses: such places; a token counts
    once an answer, since a head that checks has it from then on. missed_documents: answers with at
    least one. per_document: misses an answer, with its 95 % interval ``low`` to ``high``.
    share: 1 - misses / tokens.
    """

    documents: int
    tokens: int
    misses: int
    missed_documents: int
    per_document: float
    low: float
    high: float
    share: float


def measure_coverage(ids: Sequence[int] | IntArray, rows: Iterable[Row]) -> Coverage:
    """Coverage of ``rows`` by the tokens ``ids`` [n] and each row's own prompt."""
    kept = np.asarray(ids, np.int64)
    missed: list[int] = []
    tokens = 0
    for prompt, answer in rows:
        found = np.unique(answer)
        known = kept if prompt is None else np.concatenate((kept, prompt))
        missed.append(int((~np.isin(found, known)).sum()))
        tokens += len(answer)
    counts = np.asarray(missed, np.int64)
    low, high = _interval(counts)
    return Coverage(
        documents=len(counts),
        tokens=tokens,
        misses=int(counts.sum()),
        missed_documents=int((counts > 0).sum()),
        per_document=float(counts.mean()) if len(counts) else 0.0,
        low=low,
        high=high,
        share=1 - int(counts.sum()) / tokens if tokens else 1.0,
    )


def _interval(counts: npt.NDArray[np.int64]) -> tuple[float, float]:
    """Score interval of a rate: a Poisson count's, widened where answers differ more than that.

    Resampling calls a rate certain where no miss was seen, and is too narrow where few were.
    """
    n, total = len(counts), int(counts.sum())
    if n == 0:
        return 0.0, 0.0
    # The variance of one answer is not known, and that of few may be small by chance.
    spread = max(1.0, float(counts.var(ddof=1)) * n / total) if total and n > 1 else 1.0
    seen, room = total / spread, _Z * _Z / 2
    half = _Z * math.sqrt(seen + room / 2)
    low = max(0.0, seen + room - half) * spread / n if total else 0.0
    return low, (seen + room + half) * spread / n

"""How much of held-out answers a list of tokens covers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from tascade.core import IntArray
from tascade.vocab.counts import Row

_RESAMPLES = 2000


@dataclass(frozen=True, slots=True)
class Coverage:
    """What of some answers is neither in the list, nor in the prompt, nor said before.

    documents, tokens: how many answers, and tokens of them. misses: such places; a token counts
    once an answer, since a head that checks has it from then on. missed_documents: answers with at
    least one. per_document: misses an answer, with its 95 % interval ``low`` to ``high``
    (percentile bootstrap over answers). share: 1 - misses / tokens.
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


def _interval(counts: np.ndarray[tuple[int], np.dtype[np.int64]]) -> tuple[float, float]:
    n = len(counts)
    if n == 0:
        return 0.0, 0.0
    # Equal counts are drawn together: the time does not depend on how many answers there are.
    values, times = np.unique(counts, return_counts=True)
    drawn = np.random.default_rng(0).multinomial(n, times / n, _RESAMPLES)
    low, high = np.quantile(drawn @ values / n, (0.025, 0.975))
    return float(low), float(high)

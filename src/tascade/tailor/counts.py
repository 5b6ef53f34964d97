"""In how many answers each token stands, prompts aside; and how much of others a list covers."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tascade.core import IntArray, Row
from tascade.errors import DataError

_Z = 1.959964  # 95 %, two-sided
MOST_TOKENS = 1 << 24
"""Beyond any vocabulary there is: a higher id is a mistake, and counting it would need its room."""


@dataclass(frozen=True, slots=True)
class DocumentCounts:
    """Counts over documents, which are prompts with their answers.

    missing: [V] int64, documents whose answer has the token and whose prompt has not: the paper's
        first stage (2508.15229, input-aware filtering).
    said: [V] int64, documents whose answer has the token.
    documents, tokens: how many documents, and answer tokens in all.
    corpus: sha256 of what was counted.
    """

    missing: npt.NDArray[np.int64]
    said: npt.NDArray[np.int64]
    documents: int
    tokens: int
    corpus: str


def count_documents(rows: Iterable[Row]) -> DocumentCounts:
    """Count rows one by one; they are not kept. V is one more than the highest id met.

    Raises:
        DataError: a row holds something that is no token id.
    """
    missing, said = np.zeros(0, np.int64), np.zeros(0, np.int64)
    digest, documents, tokens = hashlib.sha256(), 0, 0
    for prompt, answer in rows:
        known = _token_ids(() if prompt is None else prompt, documents)
        given = _token_ids(answer, documents)
        for part in (known, given):
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(np.ascontiguousarray(part, "<i4").tobytes())
        found = np.unique(given)
        if len(found) and found[-1] >= len(said):
            room = max(int(found[-1]) + 1, 2 * len(said))
            missing, said = _grown(missing, room), _grown(said, room)
        said[found] += 1
        missing[found[~np.isin(found, known)]] += 1
        documents, tokens = documents + 1, tokens + len(given)
    used = int(np.flatnonzero(said)[-1]) + 1 if said.any() else 0
    return DocumentCounts(missing[:used], said[:used], documents, tokens, digest.hexdigest())


def _grown(counts: npt.NDArray[np.int64], room: int) -> npt.NDArray[np.int64]:
    out = np.zeros(room, np.int64)
    out[: len(counts)] = counts
    return out


def _token_ids(ids: Sequence[int] | IntArray, row: int) -> npt.NDArray[np.int64]:
    """[T] ids as they can index counts; a negative one would count another token."""
    found = np.asarray(ids)
    whole = found.ndim == 1 and (found.dtype.kind in "iu" or not len(found))
    if not whole or (len(found) and not 0 <= found.min() <= found.max() < MOST_TOKENS):
        raise DataError(
            "this is no list of token ids",
            got=f"{found.dtype} {found.shape}: {found!s:.60}",
            wanted=f"whole numbers from 0 to {MOST_TOKENS - 1}",
            where=f"document {row}",
            fix="encode the texts with the model's tokenizer",
        )
    return found.astype(np.int64)


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

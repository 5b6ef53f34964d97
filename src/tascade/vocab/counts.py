"""In how many answers each token stands, and the prompt does not already hold it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tascade.core import IntArray

Row = tuple[IntArray | None, IntArray]
"""A prompt, or ``None``, and its answer: token ids [T] each."""


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
    """Count rows one by one; they are not kept. V is one more than the highest id met."""
    missing, said = np.zeros(0, np.int64), np.zeros(0, np.int64)
    digest, documents, tokens = hashlib.sha256(), 0, 0
    for prompt, answer in rows:
        known = np.empty(0, np.int32) if prompt is None else np.asarray(prompt, np.int32)
        for part in (known, np.asarray(answer, np.int32)):
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(np.ascontiguousarray(part, "<i4").tobytes())
        found = np.unique(answer).astype(np.int64)
        if len(found) and found[-1] >= len(said):
            room = max(int(found[-1]) + 1, 2 * len(said))
            missing, said = _grown(missing, room), _grown(said, room)
        said[found] += 1
        missing[found[~np.isin(found, known)]] += 1
        documents, tokens = documents + 1, tokens + len(answer)
    used = int(np.flatnonzero(said)[-1]) + 1 if said.any() else 0
    return DocumentCounts(missing[:used], said[:used], documents, tokens, digest.hexdigest())


def _grown(counts: npt.NDArray[np.int64], room: int) -> npt.NDArray[np.int64]:
    out = np.zeros(room, np.int64)
    out[: len(counts)] = counts
    return out

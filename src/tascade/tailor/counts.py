"""In how many answers each token stands, and the prompt does not already hold it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tascade.core import IntArray, Row
from tascade.errors import DataError

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

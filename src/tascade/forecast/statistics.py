"""How much a task's outputs repeat themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tascade.core import IntArray

_GRAM = 4
Pair = tuple[IntArray, IntArray]
"""(prompt, output) token ids, the output's end token included."""


@dataclass(frozen=True, slots=True)
class OutputStatistics:
    """How much the outputs repeat themselves.

    ``whole_in_train`` and ``grams_in_train`` are shares of the held-out outputs, and of their
    sequences of four tokens, that occur in the training outputs. ``entropy_bits`` is of single
    tokens, ``type_token_ratio`` distinct tokens over all tokens, both of the training outputs.
    """

    examples: int
    tokens: int
    length_mean: float
    length_median: float
    length_p95: float
    distinct_tokens: int
    type_token_ratio: float
    entropy_bits: float
    whole_in_train: float
    grams_in_train: float


def statistics_of(train: Sequence[IntArray], held_out: Sequence[Pair]) -> OutputStatistics:
    """Of training outputs, and of how much of the held-out ones occurs in them."""
    fresh = [output for _, output in held_out]
    lengths = np.asarray([len(output) for output in train])
    ids = np.concatenate([np.asarray(output, np.int64) for output in train])
    counts = np.unique(ids, return_counts=True)[1]
    p = counts / len(ids)
    known = {np.asarray(output, np.int32).tobytes() for output in train}
    whole = [np.asarray(output, np.int32).tobytes() in known for output in fresh]
    grams = np.isin(_grams(fresh), np.unique(_grams(train)))
    return OutputStatistics(
        examples=len(train),
        tokens=len(ids),
        length_mean=float(lengths.mean()),
        length_median=float(np.median(lengths)),
        length_p95=float(np.percentile(lengths, 95)),
        distinct_tokens=len(counts),
        type_token_ratio=len(counts) / len(ids),
        entropy_bits=float(-(p * np.log2(p)).sum()),
        whole_in_train=float(np.mean(whole)),
        grams_in_train=float(grams.mean()) if len(grams) else 0.0,
    )


def _grams(outputs: Sequence[IntArray]) -> npt.NDArray[np.uint64]:
    """A 64-bit hash of every run of four tokens inside an output."""
    hashes = []
    for output in outputs:
        if len(output) < _GRAM:
            continue
        ids = np.asarray(output).astype(np.uint64)
        code = np.zeros(len(ids) - _GRAM + 1, np.uint64)
        for i in range(_GRAM):
            code = (code + ids[i : i + len(code)] + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
            code ^= code >> np.uint64(29)
        hashes.append(code)
    return np.concatenate(hashes) if hashes else np.empty(0, np.uint64)

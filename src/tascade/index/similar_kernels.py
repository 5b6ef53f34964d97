"""What the index of similar examples computes: features of a prompt, postings, ranking.

A feature is the 32-bit hash of one token or of two in a row; two features with one hash count as
one, which does no harm.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from tascade.core import FloatArray, LongArray
from tascade.index.arrays import UIntArray
from tascade.util.jit import inner, kernel, lean

MAX_SHARE = 0.2
"""A feature of this share of the examples, or more, says nothing."""
MAX_VISITS = 40_000
"""Postings read in one ranking: the rarest features come first, the rest is left out."""


class SimilarArrays(NamedTuple):
    """The arrays of an index: F features, P postings, E examples (see similar.py)."""

    features: UIntArray
    offsets: LongArray
    postings: UIntArray
    idf: FloatArray
    norms: FloatArray
    documents: LongArray


def index_features(
    documents: LongArray, hashes: UIntArray, starts: LongArray, most: int
) -> SimilarArrays:
    """Compute the arrays of an index.

    Args:
        documents: [E] the document id of each example.
        hashes: [M] the features of every example, one example after the other.
        starts: [E + 1] where each example begins in ``hashes`` and the last ends.
        most: how many features an example keeps.
    """
    n = len(documents)
    features, df = np.unique(hashes, return_counts=True)
    rare = (df < MAX_SHARE * n) | (df == 1)
    features, df = features[rare], df[rare].astype(np.int64)
    kept = np.empty(len(hashes), np.uint32)
    starts = keep_rarest(hashes, starts, features, df, most, kept)
    kept = kept[: starts[-1]]
    lengths = np.bincount(kept, minlength=len(features)).astype(np.int64)
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    idf = np.log(n / df).astype(np.float32)
    postings, norms = np.empty(len(kept), np.uint32), np.empty(n, np.float32)
    invert(kept, starts, offsets, idf.astype(np.float64) ** 2, postings, norms)
    norms[norms == 0] = 1  # of an example that no lookup finds
    used = np.append(lengths > 0, True)
    return SimilarArrays(
        features[used[:-1]], offsets[used], postings, idf[used[:-1]], norms, documents
    )


@inner
def _hash(a: int, b: int) -> Any:
    """32-bit hash of token ``b`` after token ``a``; ``a`` is -1 for ``b`` alone."""
    h = np.uint64(a + 2) * np.uint64(0x9E3779B97F4A7C15)
    h ^= (np.uint64(b + 2) * np.uint64(0xC2B2AE3D27D4EB4F)) >> np.uint64(1)
    h ^= h >> np.uint64(29)
    h *= np.uint64(0xBF58476D1CE4E5B9)
    return np.uint32(h >> np.uint64(32))


@kernel
def features_of(prompt: Any) -> Any:
    """The features of a prompt: [n] uint32, sorted, each once."""
    n = len(prompt)
    found = np.empty(max(2 * n - 1, 0), np.int64)  # as all that is sorted: one sort to compile
    for i in range(n):
        found[i] = _hash(-1, prompt[i])
    for i in range(1, n):
        found[n + i - 1] = _hash(prompt[i - 1], prompt[i])
    found.sort()
    kept, once = 0, np.empty(len(found), np.uint32)
    for i in range(len(found)):
        if i == 0 or found[i] != found[i - 1]:
            once[kept] = found[i]
            kept += 1
    return once[:kept]


@lean
def _find(features: Any, wanted: Any) -> Any:
    """Index of a hash in sorted ``features``, or -1. Hashes are uniform: guess, then gallop."""
    n: Any = len(features)
    if n == 0:
        return -1
    lo: Any = np.int64((np.uint64(wanted) * np.uint64(n)) >> np.uint64(32))
    hi = lo + 1
    step = 16
    while lo > 0 and features[lo] > wanted:
        hi = lo
        lo = max(lo - step, 0)
        step <<= 1
    while hi < n and features[hi - 1] < wanted:
        lo = hi
        hi = min(hi + step, n)
        step <<= 1
    while lo < hi:
        mid = (lo + hi) >> 1
        if features[mid] < wanted:
            lo = mid + 1
        else:
            hi = mid
    return lo if lo < n and features[lo] == wanted else -1


@kernel
def keep_rarest(hashes: Any, starts: Any, features: Any, df: Any, most: int, kept: Any) -> Any:
    """Which indexed features each example keeps: its ``most`` rarest, ties to the lower hash.

    Args:
        hashes: [M] uint32, the features of every example, one example after the other.
        starts: [E + 1] int64, where each example begins and the last ends.
        features: [F] uint32, the features to index, sorted.
        df: [F] int64, in how many examples each feature is.
        most: how many an example keeps.
        kept: [M] uint32, out: the indices kept, one example after the other, ascending in each.

    Returns:
        [E + 1] int64: where each example begins in ``kept`` and the last ends.
    """
    ends = np.zeros(len(starts), np.int64)
    n = 0
    for e in range(len(starts) - 1):
        first = n
        for i in range(starts[e], starts[e + 1]):
            f = _find(features, hashes[i])
            if f >= 0:
                kept[n] = f
                n += 1
        if n - first > most:
            keys = np.empty(n - first, np.int64)
            for i in range(n - first):
                f = np.int64(kept[first + i])
                keys[i] = (df[f] << 32) | f
            keys.sort()
            rarest = keys[:most] & 0xFFFFFFFF
            rarest.sort()
            for i in range(most):
                kept[first + i] = rarest[i]
            n = first + most
        ends[e + 1] = n
    return ends


@kernel
def invert(kept: Any, starts: Any, offsets: Any, weights: Any, postings: Any, norms: Any) -> None:
    """Fill ``postings`` (examples ascending in each list) and ``norms`` from features kept.

    ``offsets``: [F + 1] int64, where the list of each feature begins; ``weights``: [F] float64.
    """
    at = offsets.copy()
    for e in range(len(starts) - 1):
        total = 0.0
        for i in range(starts[e], starts[e + 1]):
            f = kept[i]
            postings[at[f]] = e
            at[f] += 1
            total += weights[f]
        norms[e] = np.sqrt(total)


@kernel
def rank(prompt: Any, index: Any, scores: Any, touched: Any, top: int, max_visits: int) -> Any:
    """The examples with the most similar prompts.

    Args:
        prompt: [T] int32.
        index: (features, offsets, postings, idf, norms) as similar.py describes them.
        scores: [E] float32, all zero; zero again on return.
        touched: [E] uint32, scratch.
        top: how many at most.
        max_visits: how many postings to read at most.

    Returns:
        (examples [n] int64, scores [n] float32), best first; of equals the later example first.
    """
    features, offsets, postings, idf, norms = index
    hashes = features_of(prompt)
    keys = np.empty(len(hashes), np.int64)
    n = 0
    for i in range(len(hashes)):
        f = _find(features, hashes[i])
        if f >= 0:
            keys[n] = (min(offsets[f + 1] - offsets[f], 0x7FFFFFFF) << 32) | f
            n += 1
    keys = keys[:n]
    keys.sort()
    n_touched = 0
    visits = max_visits
    for key in keys:
        f = key & 0xFFFFFFFF
        weight = idf[f]
        if not weight > 0:
            continue
        begin = offsets[f]
        end = min(offsets[f + 1], begin + visits)
        visits -= end - begin
        for p in range(begin, end):
            e = postings[p]
            if scores[e] == 0 and n_touched < len(touched):
                touched[n_touched] = e
                n_touched += 1
            scores[e] += weight
    return _best(scores, touched[:n_touched], norms, top)


@kernel
def _best(scores: Any, touched: Any, norms: Any, top: int) -> Any:
    """The ``top`` touched examples by score over norm; resets ``scores``."""
    best = np.empty(min(top, len(touched)), np.int64)
    value = np.empty(len(best), np.float32)
    n = 0
    for e in touched:
        s = scores[e] / norms[e]
        scores[e] = 0
        if n == len(best):
            if n == 0 or s < value[n - 1] or (s == value[n - 1] and e < best[n - 1]):
                continue
            n -= 1
        i = n
        while i > 0 and (value[i - 1] < s or (value[i - 1] == s and best[i - 1] < e)):
            value[i], best[i] = value[i - 1], best[i - 1]
            i -= 1
        value[i], best[i] = s, e
        n += 1
    return best[:n], value[:n]

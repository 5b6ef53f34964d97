"""The arrays of one corpus shard: how they are sorted, checked and counted. numpy and numba only.

``tokens`` [n] int32 holds the documents with a separator before each and after the last:
``[-1, d0..., -1, d1..., -1]``. ``order`` [m] uint32 holds every position ``p`` of a document token,
sorted by what stands before it, read backwards: ``tokens[p-1], tokens[p-2], ...`` through
``DEPTH`` tokens or through the separator (the smallest symbol), whichever comes first; equal
contexts stand in ascending ``p``. ``head`` [V+2] uint32 cuts ``order`` by the last context token:
``order[head[t+1]:head[t+2]]`` holds the positions that follow token ``t``, for ``t`` = -1..V-1.

The sort takes each bucket of ``head`` and refines it level by level. One level packs the next few
context tokens into a 64-bit key and merge-sorts every run still tied. The depth is bounded and the
merge skips what is already in order, so a corpus of identical documents sorts in linear time.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from tascade.core import SEPARATOR, IntArray
from tascade.util.jit import inner, kernel, lean

UIntArray = npt.NDArray[np.uint32]

DEPTH = 32
"""How many tokens of context the order tells apart."""

_BLOCK = 16
"""Runs up to this length are sorted by insertion."""

FAULTS = (
    "",
    "tokens.npy holds an id outside the vocabulary",
    "tokens.npy has no separator at an end, or an empty document",
    "head.npy does not cut order.npy into ascending buckets",
    "order.npy holds a position that is not a document token",
    "order.npy holds a position in the wrong bucket",
    "order.npy is not sorted",
    "documents.npy does not match the separators in tokens.npy",
)
"""What :func:`find_fault` can find, by its return value."""


def sort_shard(tokens: IntArray, vocab_size: int) -> tuple[UIntArray, UIntArray]:
    """Sort the positions of a shard by reversed context.

    Needs about 4 bytes a token for the result, and 21 bytes for each entry of the largest bucket.

    Args:
        tokens: [n] int32, documents between separators; ids already checked to be below V.
        vocab_size: V, below 2**31.

    Returns:
        ``order`` [m] uint32 and ``head`` [V+2] uint32, as described at the top of this module.
    """
    order, head = _cut_into_buckets(tokens, vocab_size)
    bits = vocab_size.bit_length()
    _sort_buckets(tokens, order, head, bits, min(64 // bits, DEPTH - 1))
    return order, head


@kernel
def _cut_into_buckets(tokens: Any, vocab_size: int) -> Any:
    """Counting sort of all positions by their last context token; ascending within a bucket."""
    head = np.zeros(vocab_size + 2, np.uint32)
    for p in range(1, len(tokens)):
        if tokens[p] != SEPARATOR:
            head[tokens[p - 1] + 2] += np.uint32(1)
    for t in range(vocab_size + 1):
        head[t + 1] += head[t]
    order = np.empty(head[vocab_size + 1], np.uint32)
    free = head.copy()
    for p in range(1, len(tokens)):
        if tokens[p] != SEPARATOR:
            t = tokens[p - 1] + 1
            order[free[t]] = p
            free[t] += np.uint32(1)
    return order, head


@kernel
def _sort_buckets(tokens: Any, order: Any, head: Any, bits: int, per_key: int) -> None:
    """Refine every bucket by the rest of its context, ``per_key`` tokens of ``bits`` a level."""
    widest = np.int64(0)
    for t in range(1, len(head) - 1):
        widest = max(widest, np.int64(head[t + 1]) - np.int64(head[t]))
    key = np.empty(widest, np.uint64)
    spare_key = np.empty(widest, np.uint64)
    spare_val = np.empty(widest, np.uint32)
    tied = np.empty(widest, np.bool_)  # tied[i]: the context of entry i equals that of i - 1 so far
    for t in range(1, len(head) - 1):  # bucket 0 follows a separator, where the context ends
        lo, n = np.int64(head[t]), np.int64(head[t + 1]) - np.int64(head[t])
        tied[:n] = True
        depth, work = 1, bool(n > 1)
        while depth < DEPTH and work:
            width = min(per_key, DEPTH - depth)
            work = False
            start = 0
            while start < n:
                stop = start + 1
                while stop < n and tied[stop]:
                    stop += 1
                if stop - start > 1:
                    _pack_keys(tokens, order, lo + start, stop - start, depth, width, bits, key)
                    _merge_sort(key, order, lo + start, stop - start, spare_key, spare_val)
                    work = _mark_ties(key, stop - start, bits, tied, start) or work
                start = stop
            depth += width


@inner
def _pack_keys(
    tokens: Any, order: Any, base: Any, n: int, depth: int, width: int, bits: int, key: Any
) -> None:
    """Pack ``width`` context tokens of each entry, from ``depth`` on; zero past the separator."""
    for i in range(n):
        p = np.int64(order[base + i]) - 1 - depth
        packed = np.uint64(0)
        done = 0
        while done < width:
            symbol = tokens[p - done] + 1
            packed = (packed << np.uint64(bits)) | np.uint64(symbol)
            done += 1
            if symbol == 0:
                break
        key[i] = packed << np.uint64(bits * (width - done)) if done < width else packed


@inner
def _mark_ties(key: Any, n: int, bits: int, tied: Any, at: int) -> bool:
    """Note which neighbours need another level: equal keys whose context has not ended."""
    last = (np.uint64(1) << np.uint64(bits)) - np.uint64(1)
    work = False
    for i in range(1, n):
        more = key[i] == key[i - 1] and (key[i] & last) != np.uint64(0)
        tied[at + i] = more
        work |= more
    return work


@inner
def _merge_sort(key: Any, val: Any, base: Any, n: int, spare_key: Any, spare_val: Any) -> None:
    """Stable sort of ``key[:n]``, moving ``val[base:base+n]`` along."""
    for lo in range(0, n, _BLOCK):
        for i in range(lo + 1, min(lo + _BLOCK, n)):
            k, v = key[i], val[base + i]
            j = i
            while j > lo and key[j - 1] > k:
                key[j], val[base + j] = key[j - 1], val[base + j - 1]
                j -= 1
            key[j], val[base + j] = k, v
    width = _BLOCK
    while width < n:
        for lo in range(0, n - width, 2 * width):
            mid, hi = lo + width, min(lo + 2 * width, n)
            if key[mid - 1] > key[mid]:
                _merge(key, val, base, lo, mid, hi, spare_key, spare_val)
        width *= 2


@inner
def _merge(
    key: Any, val: Any, base: int, lo: int, mid: int, hi: int, spare_key: Any, spare_val: Any
) -> None:
    """Merge two neighbouring sorted runs in place; scratch holds the left one."""
    while key[lo] <= key[mid]:
        lo += 1
    left = mid - lo
    for i in range(left):
        spare_key[i], spare_val[i] = key[lo + i], val[base + lo + i]
    i, j, out = 0, mid, lo
    while i < left and j < hi:
        if spare_key[i] <= key[j]:
            key[out], val[base + out] = spare_key[i], spare_val[i]
            i += 1
        else:
            key[out], val[base + out] = key[j], val[base + j]
            j += 1
        out += 1
    while i < left:
        key[out], val[base + out] = spare_key[i], spare_val[i]
        i += 1
        out += 1


@inner
def _compare(tokens: Any, p: int | np.int64, q: int | np.int64) -> int:
    """Sign of the order of the contexts of positions ``p`` and ``q``."""
    for d in range(1, min(DEPTH, min(p, q)) + 1):
        a, b = tokens[p - d], tokens[q - d]
        if a != b:
            return -1 if a < b else 1
        if a == SEPARATOR:
            break
    return 0


@lean
def find_fault(tokens: Any, order: Any, head: Any, documents: Any, vocab_size: int) -> int:
    """Check every value of a shard; reads nothing out of bounds whatever the arrays hold.

    Args:
        tokens: [n] int32.
        order: [m] uint32.
        head: [V+2] uint32.
        documents: [D, 2] int64, document id and position of the document's first token.
        vocab_size: V.

    Returns:
        0 if the shard is sound, else an index into ``FAULTS``.
    """
    n, m = len(tokens), len(order)
    if n < 3 or tokens[0] != SEPARATOR or tokens[n - 1] != SEPARATOR:
        return 2
    seen = 0
    for p in range(n):
        if tokens[p] < SEPARATOR or tokens[p] >= vocab_size:
            return 1
        if p > 0 and tokens[p - 1] == SEPARATOR:
            if tokens[p] == SEPARATOR:
                return 2
            if seen >= len(documents) or documents[seen, 1] != p:
                return 7
            if seen > 0 and documents[seen, 0] <= documents[seen - 1, 0]:
                return 7
            seen += 1
    if seen != len(documents) or m != n - seen - 1:
        return 7
    if head[0] != 0 or head[vocab_size + 1] != m:
        return 3
    for t in range(vocab_size + 1):
        if head[t] > head[t + 1]:
            return 3
    fault: int = _find_order_fault(tokens, order, head, vocab_size)
    return fault


@inner
def _find_order_fault(tokens: Any, order: Any, head: Any, vocab_size: int) -> int:
    """The part of :func:`find_fault` that walks ``order``: strict ascent also rules out doubles."""
    before = np.int64(0)
    for t in range(vocab_size + 1):
        for i in range(head[t], head[t + 1]):
            p = np.int64(order[i])
            if p < 1 or p >= len(tokens) or tokens[p] == SEPARATOR:
                return 4
            if tokens[p - 1] + 1 != t:
                return 5
            if i > head[t]:
                sign = _compare(tokens, before, p)
                if sign > 0 or (sign == 0 and before >= p):
                    return 6
            before = p
    return 0


@inner
def _against(tokens: Any, p: Any, context: Any) -> int:
    """Sign of the context of position ``p`` against ``context`` (latest token last)."""
    if p >= len(tokens):
        return 0  # a damaged order: any answer, but no read
    n = len(context)
    for d in range(1, n + 1):
        a = tokens[p - d] if d <= p else SEPARATOR
        b = context[n - d]
        if a != b:
            return -1 if a < b else 1
    return 0


@lean
def count_in_shard(tokens: Any, order: Any, head: Any, context: Any) -> Any:
    """How often a document token follows ``context`` in a shard, by two binary searches.

    Args:
        tokens: [n] int32.
        order: [m] uint32.
        head: [V+2] uint32.
        context: [k] int32, 1 <= k <= ``DEPTH``, ids below V; a separator only in front.
    """
    last = context[len(context) - 1]
    start, stop = np.int64(head[last + 1]), np.int64(head[last + 2])
    lo, hi = start, stop
    while lo < hi:
        mid = (lo + hi) // 2
        if _against(tokens, np.int64(order[mid]), context) < 0:
            lo = mid + 1
        else:
            hi = mid
    first, hi = lo, stop
    while lo < hi:
        mid = (lo + hi) // 2
        if _against(tokens, np.int64(order[mid]), context) <= 0:
            lo = mid + 1
        else:
            hi = mid
    return lo - first


@lean
def count_by_scan(tokens: Any, context: Any) -> int:
    """As :func:`count_in_shard`, for ``tokens`` [n] int32 that nobody has sorted."""
    n, found = len(context), 0
    for p in range(n, len(tokens)):
        if tokens[p] != SEPARATOR and _against(tokens, p, context) == 0:
            found += 1
    return found

"""Numba kernels that look a context up: in suffix-array shards and in hash chains.

A context is given reversed: ``rc[0]`` is the last token, ``rc[1]`` the one before, and so on; a
separator (-1) marks the start of a document and ends every comparison, itself taking part in it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.extending import intrinsic

from tascade.util.jit import inner, kernel, lean

DEPTH = 32
"""Longest context compared, in tokens."""
MAX_SHARDS = 8
MAX_LEVELS = 3
MAX_SAMPLES = 24
MAX_VISITS = 24
HASH_BITS = 12
_LOOK_BACK = 4


@intrinsic  # type: ignore[untyped-decorator]
def _as_pointer(typingctx: Any, address: Any, like: Any) -> Any:
    """Turn an int64 address into a pointer to ``like``'s dtype, so one kernel serves any shards."""
    dtype = like.dtype
    sig = types.CPointer(dtype)(types.int64, like)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return sig, codegen


@intrinsic  # type: ignore[untyped-decorator]
def _prefetch(typingctx: Any, address: Any) -> Any:
    """Ask for the cache line at ``address`` without waiting for it."""
    sig = types.void(types.int64)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        byte, word = ir.IntType(8).as_pointer(), ir.IntType(32)
        takes = ir.FunctionType(ir.VoidType(), [byte, word, word, word])
        prefetch = builder.module.declare_intrinsic("llvm.prefetch", (byte,), takes)
        to_read, keep, data = (ir.Constant(word, n) for n in (0, 3, 1))
        builder.call(prefetch, [builder.inttoptr(args[0], byte), to_read, keep, data])
        return context.get_dummy_value()

    return sig, codegen


@kernel
def shard_tokens(shards: Any, s: int) -> Any:
    """The token array of shard ``s``; ``shards`` is [S, 6] int64 (addresses and lengths)."""
    return carray(_as_pointer(shards[s, 0], _I32), (shards[s, 1],))


@kernel
def shard_order(shards: Any, s: int) -> Any:
    """The sorted positions of shard ``s``."""
    return carray(_as_pointer(shards[s, 2], _U32), (shards[s, 3],))


@kernel
def shard_head(shards: Any, s: int) -> Any:
    """The bucket starts of shard ``s``."""
    return carray(_as_pointer(shards[s, 4], _U32), (shards[s, 5],))


_I32 = np.zeros(1, np.int32)
_U32 = np.zeros(1, np.uint32)


@inner
def position(order: Any, i: Any, n: int) -> Any:
    """``order[i]`` held inside a token array of length ``n``: a damaged file must not crash us."""
    return min(max(np.int64(order[i]), 1), n - 1)


@inner
def common(tokens: Any, p: int, rc: Any, n: int) -> int:
    """How many tokens before position ``p`` equal ``rc[:n]``, a separator ending the count."""
    k = 0
    while k < n and k < p:
        a = tokens[p - 1 - k]
        if a != rc[k]:
            return k
        k += 1
        if a == -1:
            return k
    return k


@inner
def _before(tokens: Any, p: int, rc: Any, n: int) -> bool:
    """Whether the reversed context of ``p`` sorts before ``rc[:n]``."""
    k = 0
    while k < n and k < p:
        a = tokens[p - 1 - k]
        if a != rc[k]:
            return bool(a < rc[k])
        k += 1
        if a == -1:
            return False
    return False


@inner
def locate(tokens: Any, order: Any, head: Any, rc: Any, n: int) -> Any:
    """Where ``rc[:n]`` sorts in a shard.

    Returns (index, bucket start, bucket end, match length of the best neighbour); a match length
    of 0 means that the last token never occurs before another.

    Almost every read of a binary search misses the caches: both places it may look at next are
    asked for while this one is compared.
    """
    size, at = len(tokens), tokens.ctypes.data
    if rc[0] < -1 or rc[0] + 2 >= len(head):  # the model has ids that the index has not
        return 0, 0, 0, 0
    start, end = np.int64(head[rc[0] + 1]), np.int64(head[rc[0] + 2])
    lo, hi = start, end
    mid = (lo + hi) >> 1
    p: Any = position(order, mid, size) if lo < hi else 1
    while lo < hi:
        left, right = (lo + mid) >> 1, (mid + 1 + hi) >> 1
        p_left = position(order, left, size)
        p_right = position(order, min(right, end - 1), size)
        _prefetch(at + 4 * (p_left - _LOOK_BACK))
        _prefetch(at + 4 * (p_right - _LOOK_BACK))
        if _before(tokens, p, rc, n):
            lo, mid, p = mid + 1, right, p_right
        else:
            hi, mid, p = mid, left, p_left
    best = 0
    if lo < end:
        best = common(tokens, position(order, lo, size), rc, n)
    if lo > start:
        best = max(best, common(tokens, position(order, lo - 1, size), rc, n))
    return lo, start, end, best


@inner
def widen_left(tokens: Any, order: Any, rc: Any, k: int, at: int, start: int) -> int:
    """First index at or after ``start`` from which every entry up to ``at`` matches ``k`` tokens.

    Gallops from ``at``, where the match is known or empty, since most intervals are short.
    """
    size = len(tokens)
    step = 1
    hi = at
    lo = at - 1
    while lo >= start and common(tokens, position(order, lo, size), rc, k) >= k:
        hi = lo
        lo -= step
        step <<= 1
    lo = max(lo, start - 1)
    while lo + 1 < hi:
        mid = (lo + hi) >> 1
        if common(tokens, position(order, mid, size), rc, k) >= k:
            hi = mid
        else:
            lo = mid
    return hi


@inner
def widen_right(tokens: Any, order: Any, rc: Any, k: int, at: int, end: int) -> int:
    """One past the last index before ``end`` down to which every entry from ``at`` matches."""
    size = len(tokens)
    step = 1
    lo = at - 1
    hi = at
    while hi < end and common(tokens, position(order, hi, size), rc, k) >= k:
        lo = hi
        hi += step
        step <<= 1
    hi = min(hi, end)
    while lo + 1 < hi:
        mid = (lo + hi) >> 1
        if common(tokens, position(order, mid, size), rc, k) >= k:
            lo = mid
        else:
            hi = mid
    return lo + 1


@inner
def chain_hash(a: int, b: int, bits: int) -> int:
    """Hash of the last two tokens into ``bits`` bits (``a`` the last)."""
    h = np.uint32(np.uint32(a + 2) * np.uint32(2654435761) + np.uint32(b + 2) * np.uint32(40503))
    h ^= h >> np.uint32(15)
    h = np.uint32(h * np.uint32(2246822519))
    return int(h >> np.uint32(32 - bits))


@lean
def chain_extend(buffer: Any, prev: Any, table: Any, length: int, new: Any, bits: int) -> int:
    """Append tokens to a hash chain in place; returns the new length.

    ``prev[p]`` links position ``p`` to the latest earlier one after the same two tokens;
    ``table[h]`` holds the latest position for a hash, -1 for none.
    """
    n = length
    for token in new:
        buffer[n] = token
        n += 1
        if n >= 2:
            h = chain_hash(buffer[n - 1], buffer[n - 2], bits)
            prev[n] = table[h]
            table[h] = n
    return n


@inner
def chain_find(chain: Any, rc: Any, n: int, limit: int, out_tokens: Any, out_length: Any) -> int:
    """Continuations of a context in a hash chain, most recent first.

    ``chain`` is (buffer, prev, table, length, bits). At most ``limit`` positions are visited;
    writes the next token and match length of each that matches at least two, returns how many.
    """
    buffer, prev, table, length, bits = chain
    if n < 2 or length < 3:
        return 0
    found = 0
    p = table[chain_hash(rc[0], rc[1], bits)]
    visits = 0
    while p >= 0 and visits < limit:
        visits += 1
        if p < length and buffer[p] != -1:
            k = 0
            while k < n and p - 1 - k >= 0 and buffer[p - 1 - k] == rc[k]:
                k += 1
                if rc[k - 1] == -1 and k >= 2:
                    break
            if k >= 2:
                out_tokens[found] = buffer[p]
                out_length[found] = k
                found += 1
        p = prev[p]
    return found

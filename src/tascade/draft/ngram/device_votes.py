"""Triton: the votes for a request's next token, a program for each request.

The same votes as :mod:`tascade.draft.ngram.candidates` counts, from the same arrays. Where the
numba kernels walk token by token, a program compares a whole context at once: 32 lanes are the
longest context, 64 the voters and the next tokens that they vote for.

The hash chains over a request and its examples are not built: a program reads the tokens from the
end and stops at as many equal hashes as a chain would have visited.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from tascade.draft.ngram import candidates
from tascade.draft.ngram.batch_kernels import REACH
from tascade.index import lookup


def constant(value: float) -> Any:
    """A number that kernels read: Triton's interpreter takes its ``constexpr`` for an object."""
    return value if triton.knobs.runtime.interpret else tl.constexpr(value)


_DEPTH = constant(lookup.DEPTH)
_NEAR = constant(REACH)
_LANES = constant(64)
_KEPT = constant(candidates.KEPT_VOTERS)
_POOL = constant(candidates.POOL)
_SAMPLES = constant(lookup.MAX_SAMPLES)
_ENOUGH = constant(candidates.ENOUGH)
_VISITS = constant(lookup.MAX_VISITS)
_LEVELS = constant(lookup.MAX_LEVELS)
_SHARDS = constant(lookup.MAX_SHARDS)
_SHARD_BITS = constant(candidates.SHARD_BITS)
_PLACE = constant((1 << candidates.SHARD_BITS) - 1)
_BLOCK = constant(256)
_FEW_LEFT = constant(candidates.FEW_LEFT)
_HASH_SHIFT = constant(32 - lookup.HASH_BITS)


@triton.jit
def _at(vector, lane, i):
    """Lane ``i`` of a vector."""
    return tl.sum(tl.where(lane == i, vector, 0), 0)


@triton.jit
def _array(shards, s, which: tl.constexpr, dtype: tl.constexpr):
    """(pointer, length) of a shard's tokens (0), order (1) or head (2)."""
    address = tl.load(shards + s * 6 + 2 * which)
    return address.to(tl.pointer_type(dtype)), tl.load(shards + s * 6 + 2 * which + 1)


@triton.jit
def _position(order, i, inside, size):
    """``order[i]`` held inside a token array: a damaged file must not crash us."""
    found = tl.load(order + i, mask=inside, other=1).to(tl.int64)
    return tl.minimum(tl.maximum(found, 1), size - 1)


@triton.jit
def _matching(tokens, p, inside, rc, n):
    """How many tokens before each position ``p`` [N] equal ``rc[:n]``, as ``lookup.common``."""
    k = tl.arange(0, _DEPTH)[None, :]
    there = inside[:, None] & (k < n) & (k < p[:, None])
    a = tl.load(tokens + p[:, None] - 1 - k, mask=there, other=-2)
    same = there & (a == rc[None, :])
    stop = tl.min(tl.where(same, _DEPTH, k), 1)
    return tl.minimum(stop, tl.min(tl.where(same & (a == -1), k + 1, _DEPTH), 1))


@triton.jit
def _compare(tokens, p, rc, n):
    """(matching length, whether the context of ``p`` sorts before ``rc[:n]``)."""
    k = tl.arange(0, _DEPTH)
    there = (k < n) & (k < p)
    a = tl.load(tokens + p - 1 - k, mask=there, other=-2)
    same = there & (a == rc)
    stop = tl.min(tl.where(same, _DEPTH, k), 0)
    ended = tl.min(tl.where(same & (a == -1), k + 1, _DEPTH), 0)
    less = tl.sum(((k == stop) & there & (a < rc)).to(tl.int32), 0)
    return tl.minimum(stop, ended), (ended > stop) & (less > 0)


@triton.jit
def _locate(shards, s, rc, n):
    """Where ``rc[:n]`` sorts in a shard: (index, bucket start, bucket end, longest match)."""
    tokens, size = _array(shards, s, 0, tl.int32)
    order, _entries = _array(shards, s, 1, tl.uint32)
    head, heads = _array(shards, s, 2, tl.uint32)
    last = _at(rc, tl.arange(0, _DEPTH), 0).to(tl.int64)
    known = (last >= -1) & (last + 2 < heads)
    start = tl.load(head + last + 1, mask=known, other=0).to(tl.int64)
    end = tl.load(head + last + 2, mask=known, other=0).to(tl.int64)
    lo, hi = start, end
    while lo < hi:
        mid = (lo + hi) >> 1
        _length, before = _compare(tokens, _position(order, mid, True, size), rc, n)
        lo = tl.where(before, mid + 1, lo)
        hi = tl.where(before, hi, mid)
    right, before = _compare(tokens, _position(order, lo, lo < end, size), rc, n)
    left, before = _compare(tokens, _position(order, lo - 1, lo > start, size), rc, n)
    best = tl.maximum(tl.where(lo < end, right, 0), tl.where(lo > start, left, 0))
    return lo, start, end, best.to(tl.int64)


@triton.jit
def _slot(tokens, lane, used, token, most):
    """Tokens with this one among them if there is room, how many they are, and where it stands."""
    mine = (tokens == token) & (lane < used)
    isnew = (tl.sum(mine.to(tl.int32), 0) == 0) & (used < most)
    mine = mine | (isnew & (lane == used))
    return tl.where(mine, token, tokens), used + isnew.to(tl.int32), mine


@triton.jit
def _vote(pool, counts, used, level, token):
    """Count one vote for a token at a level; ``pool`` [64], ``counts`` [4, 64]."""
    pool, used, mine = _slot(pool, tl.arange(0, _LANES), used, token, _POOL)
    counts += ((tl.arange(0, 4)[:, None] == level) & mine[None, :]).to(tl.float64)
    return pool, counts, used


@triton.jit
def _widened(tokens, order, size, rc, k, lo, hi, start, end):
    """``order[lo:hi]`` widened to all neighbours that match ``k`` tokens, 16 to each side."""
    near = tl.arange(0, _NEAR)
    inside = lo - 1 - near >= start
    at = _position(order, lo - 1 - near, inside, size)
    match = inside & (_matching(tokens, at, inside, rc, k) >= k)
    lo -= tl.min(tl.where(match, _NEAR, near), 0)
    inside = hi + near < end
    at = _position(order, hi + near, inside, size)
    match = inside & (_matching(tokens, at, inside, rc, k) >= k)
    return lo, hi + tl.min(tl.where(match, _NEAR, near), 0)


@triton.jit
def _edge(tokens, order, size, rc, k, i, there):
    """How much of ``rc[:k]`` the neighbour just outside of an interval matches."""
    found, _before = _compare(tokens, _position(order, i, there, size), rc, k)
    return tl.where(there, found, 0).to(tl.int64)


@triton.jit
def _sampled(
    tokens,
    order,
    size,
    s,
    lo,
    hi,
    level,
    voters,
    held,
    pool,
    counts,
    used,
):
    """Take the votes of at most 24 entries of an interval, and note who voted."""
    i = tl.arange(0, 32)
    n = hi - lo
    take = tl.minimum(n, _SAMPLES)
    inside = i < take
    at = _position(order, lo + (i * n) // tl.maximum(take, 1), inside, size)
    names = ((tl.zeros((), tl.int64) + s) << _SHARD_BITS) | at
    rows, lane = tl.arange(0, 4)[:, None], tl.arange(0, _LANES)[None, :]
    before = tl.sum(tl.where(tl.arange(0, 4) == level, held, 0), 0)
    place = lane - before
    fits = (rows == level) & (place >= 0) & (place < take) & (lane < _KEPT)
    source = tl.minimum(tl.maximum(tl.arange(0, _LANES) - before, 0), 31)
    voters = tl.where(fits, tl.gather(names, source, 0)[None, :], voters)
    held += tl.where(tl.arange(0, 4) == level, take, 0).to(tl.int32)
    following = tl.load(tokens + at, mask=inside, other=-1)
    for j in range(take):
        token = _at(following, i, j)
        if token >= 0:  # a damaged order may name a separator
            pool, counts, used = _vote(pool, counts, used, level, token)
    return voters, held, pool, counts, used, take


@triton.jit
def _search(shards, ns, rc, n):
    """The corpus's votes by search, long contexts first, as ``candidates.corpus_votes``.

    Returns pool [64], counts [4, 64], totals [4], used, levels, longest match, voters [4, 64] and
    how many of these there are at each level [4].
    """
    lane = tl.arange(0, _SHARDS)
    starts = tl.zeros([_SHARDS], tl.int64)
    ends, matches, los, his = starts, starts, starts, starts
    for s in range(ns):
        at, start, end, found = _locate(shards, s, rc, n)
        starts, ends = tl.where(lane == s, start, starts), tl.where(lane == s, end, ends)
        matches = tl.where(lane == s, found, matches)
        los, his = tl.where(lane == s, at, los), tl.where(lane == s, at, his)
    best = tl.max(matches, 0)
    voters = tl.zeros([4, _LANES], tl.int64)
    held = tl.zeros([4], tl.int32)
    pool = tl.full([_LANES], -1, tl.int32)
    counts = tl.zeros([4, _LANES], tl.float64)
    totals = tl.zeros([4], tl.float64)
    used = tl.zeros((), tl.int32)
    level = tl.zeros((), tl.int32)
    k = best
    while (level < _LEVELS) & (k > 0):
        below = tl.zeros((), tl.int64)
        for s in range(ns):
            match = _at(matches, lane, s)
            if match < k:
                below = tl.maximum(below, match)
            else:
                tokens, size = _array(shards, s, 0, tl.int32)
                order, _entries = _array(shards, s, 1, tl.uint32)
                start, end = _at(starts, lane, s), _at(ends, lane, s)
                lo, hi = _widened(
                    tokens, order, size, rc, k, _at(los, lane, s), _at(his, lane, s), start, end
                )
                los, his = tl.where(lane == s, lo, los), tl.where(lane == s, hi, his)
                voters, held, pool, counts, used, take = _sampled(
                    tokens, order, size, s, lo, hi, level, voters, held, pool, counts, used
                )
                totals += tl.where(tl.arange(0, 4) == level, take, 0).to(tl.float64)
                below = tl.maximum(below, _edge(tokens, order, size, rc, k, lo - 1, lo > start))
                below = tl.maximum(below, _edge(tokens, order, size, rc, k, hi, hi < end))
        enough = tl.sum(tl.where(tl.arange(0, 4) == level, totals, 0), 0) >= _ENOUGH
        level += 1
        k = tl.where(enough, 0, tl.minimum(below, k - 1))
    return pool, counts, totals, used, level, best, voters, held


@triton.jit
def _blended(counts, totals, used):
    """Witten-Bell interpolation from the shortest level up, as ``candidates._blend``. [64]"""
    lane = tl.arange(0, _LANES)
    rows = tl.arange(0, 4)
    shares = tl.zeros([_LANES], tl.float64)
    for i in tl.static_range(_LEVELS):
        level = _LEVELS - 1 - i
        n = tl.sum(tl.where(rows == level, totals, 0), 0)
        row = tl.sum(tl.where(rows[:, None] == level, counts, 0), 0)
        distinct = tl.sum(((row > 0) & (lane < used)).to(tl.float64), 0)
        mixed = (row + distinct * shares) / tl.maximum(n + distinct, 1.0)
        shares = tl.where(n > 0, mixed, shares)
    return tl.where(lane < used, shares, 0.0)


@triton.jit
def _following(shards, voters, active, token):
    """What stands behind ``token`` for each voter [4, 64]: (who goes on, what follows)."""
    base = shards + (voters >> _SHARD_BITS) * 6
    address = tl.load(base, mask=active, other=0).to(tl.pointer_type(tl.int32))
    size = tl.load(base + 1, mask=active, other=0)
    at = voters & _PLACE
    inside = active & (at + 1 < size)
    goes_on = inside & (tl.load(address + at, mask=inside, other=-2) == token)
    return goes_on, tl.load(address + at + 1, mask=goes_on, other=-1)


@triton.jit
def _inherited(shards, voters, active, token):
    """The votes below a token from those above it, as ``candidates.inherited_votes``.

    Returns pool, counts, totals, used, the voters' places, who of them is left, and whether enough
    of them are: else nothing of this counts.
    """
    goes_on, following = _following(shards, voters, active, token)
    rows, lane = tl.arange(0, 4), tl.arange(0, _LANES)
    pool = tl.full([_LANES], -1, tl.int32)
    counts = tl.zeros([4, _LANES], tl.float64)
    used = tl.zeros((), tl.int32)
    totals = tl.zeros([4], tl.float64)
    for level in tl.static_range(_LEVELS):
        mine = (rows == level)[:, None]
        says = tl.sum(tl.where(mine & goes_on, following, 0), 0)
        asked = (tl.sum((mine & goes_on).to(tl.int32), 0) > 0) & (says >= 0)
        totals += tl.where(rows == level, tl.sum(asked.to(tl.int32), 0), 0).to(tl.float64)
        left = tl.sum(asked.to(tl.int32), 0)
        while left > 0:
            first = tl.min(tl.where(asked, lane, _LANES), 0)
            pool, counts, used = _vote(pool, counts, used, level, _at(says, lane, first))
            asked = asked & (lane > first)
            left -= 1
    before = tl.sum(((rows == 0)[:, None] & active).to(tl.int32))
    after = tl.sum(((rows == 0)[:, None] & goes_on).to(tl.int32))
    return pool, counts, totals, used, voters + 1, goes_on, after >= tl.minimum(before, _FEW_LEFT)


@triton.jit
def _hash(a, b):
    """``lookup.chain_hash`` into 12 bits."""
    h = (a + 2).to(tl.uint32) * 2654435761 + (b + 2).to(tl.uint32) * 40503
    h = h ^ (h >> 15)
    return (h * 2246822519) >> _HASH_SHIFT


@triton.jit
def _chain_votes(tokens, length, rc, n):
    """Next-token shares from ``tokens[:length]``, as ``candidates.chain_votes``.

    Returns pool [64], shares [64], used and the longest match.
    """
    k, lane, block = tl.arange(0, _DEPTH), tl.arange(0, _LANES), tl.arange(0, _BLOCK)
    wanted = _hash(_at(rc, k, 0), _at(rc, k, 1))
    said = tl.full([_LANES], -1, tl.int32)
    lengths = tl.zeros([_LANES], tl.int32)
    found = tl.zeros((), tl.int32)
    visits = tl.zeros((), tl.int32)
    top = tl.where((n >= 2) & (length >= 3), length, 0).to(tl.int64)
    while (top >= 2) & (visits < _VISITS):
        p = top - block
        there = p >= 2
        a = tl.load(tokens + p - 1, mask=there, other=0)
        b = tl.load(tokens + p - 2, mask=there, other=0)
        hit = there & (_hash(a, b) == wanted)
        left = tl.sum(hit.to(tl.int32), 0)
        while (left > 0) & (visits < _VISITS):
            first = tl.min(tl.where(hit, block, _BLOCK), 0)
            hit = hit & (block > first)
            left -= 1
            visits += 1
            at = top - first
            following = tl.load(tokens + at, mask=at < length, other=-1)
            inside = (k < n) & (k < at)
            c = tl.load(tokens + at - 1 - k, mask=inside, other=-2)
            same = inside & (c == rc)
            stop = tl.min(tl.where(same, _DEPTH, k), 0)
            ended = tl.min(tl.where(same & (c == -1) & (k > 0), k + 1, _DEPTH), 0)
            match = tl.minimum(stop, ended)
            if (following != -1) & (match >= 2):
                said = tl.where(lane == found, following, said)
                lengths = tl.where(lane == found, match, lengths)
                found += 1
        top -= _BLOCK
    best = tl.max(lengths, 0)
    pool = tl.full([_LANES], -1, tl.int32)
    shares = tl.zeros([_LANES], tl.float64)
    used = tl.zeros((), tl.int32)
    total = tl.zeros((), tl.float64)
    for i in range(found):
        behind = best - _at(lengths, lane, i)
        weight = tl.where(behind == 0, 1.0, tl.where(behind == 1, 0.5, 0.15)).to(tl.float64)
        pool, used, mine = _slot(pool, lane, used, _at(said, lane, i), _POOL)
        shares += tl.where(mine, weight, 0.0)
        total += weight
    return pool, shares / (total + 0.5), used, best

"""Numba kernels that turn look-ups into candidates: next tokens with each source's evidence."""

from __future__ import annotations

from typing import Any

import numpy as np

from tascade.index.lookup import (
    DEPTH,
    MAX_LEVELS,
    MAX_SAMPLES,
    MAX_SHARDS,
    MAX_VISITS,
    chain_find,
    common,
    locate,
    position,
    shard_head,
    shard_order,
    shard_tokens,
    widen_left,
    widen_right,
)
from tascade.util.jit import inner

MAX_CANDIDATES = 8
POOL = 48
SOURCES = 3
CORPUS, SIMILAR, CONTEXT = 0, 1, 2
"""The task's outputs; the outputs of the examples most like this prompt; this request itself."""

ENOUGH = 24
KEPT_VOTERS = 48
SHARD_BITS = 40
EVERYWHERE = 1 << SHARD_BITS
FEW_LEFT = 16
STRONG = 0.1
_RECENT_WEIGHTS = (1.0, 0.5, 0.15)


def new_scratch(nodes: int) -> tuple[Any, ...]:
    """Working memory of one drafter: allocated once, so that a draft allocates nothing.

    The last two hold, for the root and each of ``nodes`` nodes, where the corpus's voters stand
    (shard and position in one number), and how many there are at each level.
    """
    return (
        np.empty(POOL, np.int32),
        np.empty(POOL, np.float64),
        np.empty((MAX_SHARDS, 5), np.int64),
        np.empty(MAX_VISITS, np.int32),
        np.empty(MAX_VISITS, np.int64),
        np.empty((MAX_LEVELS, POOL), np.float64),
        np.empty(MAX_LEVELS, np.float64),
        np.empty((nodes + 1, MAX_LEVELS, KEPT_VOTERS), np.int64),
        np.empty((nodes + 1, MAX_LEVELS + 2), np.int32),
    )


@inner
def _slot(tokens: Any, used: int, token: int) -> int:
    for i in range(used):
        if tokens[i] == token:
            return i
    return -1


@inner
def _sample_interval(
    tokens: Any,
    order: Any,
    span: Any,
    pool: Any,
    counts: Any,
    level: int,
    used: int,
    voters: Any,
    held: Any,
) -> tuple[int, int]:
    """Count next tokens in ``order[lo:hi]`` at ``level``, at most ``MAX_SAMPLES`` of them.

    ``span``: (lo, hi, shard). The sampled positions are noted in ``voters`` as far as they fit.
    """
    lo, hi, s = span
    n = hi - lo
    take = min(n, MAX_SAMPLES)
    for i in range(take):
        at = position(order, lo + (i * n) // take, len(tokens))
        if held[level] < KEPT_VOTERS:
            voters[level, held[level]] = (s << SHARD_BITS) | at
        held[level] += 1
        if tokens[at] >= 0:  # a damaged order may name a separator
            used = _vote(pool, counts, level, used, tokens[at])
    return used, take


@inner
def _vote(pool: Any, counts: Any, level: int, used: int, token: int) -> int:
    j = _slot(pool, used, token)
    if j < 0:
        if used >= POOL:
            return used
        j = used
        pool[j] = token
        for k in range(MAX_LEVELS):
            counts[k, j] = 0.0
        used += 1
    counts[level, j] += 1.0
    return used


@inner
def corpus_votes(
    shards: Any, rc: Any, n: int, recent: Any, scratch: Any, row: int, reach: int
) -> tuple[int, int]:
    """Next-token shares from all shards, long contexts first, backing off by Witten-Bell.

    ``recent`` is a hash chain of documents not yet in a shard. Writes tokens and their blended
    shares to the scratch; returns (how many, length of the longest match). What voted is noted for
    :func:`inherited_votes` in row ``row``. Voters are sought at most ``reach`` places to each side:
    the nearest share the longest contexts.
    """
    pool, shares, where, fresh_tokens, fresh_length, counts, totals, all_voters, all_held = scratch
    voters, held = all_voters[row], all_held[row]
    held[:] = 0
    ns = shards.shape[0]
    best = 0
    for s in range(ns):
        i, start, end, m = locate(
            shard_tokens(shards, s), shard_order(shards, s), shard_head(shards, s), rc, n
        )
        where[s, 0], where[s, 1], where[s, 2] = start, end, m
        where[s, 3], where[s, 4] = i, i
        best = max(best, m)
    fresh = chain_find(recent, rc, n, MAX_VISITS, fresh_tokens, fresh_length)
    for i in range(fresh):
        best = max(best, fresh_length[i])

    totals[:] = 0.0
    used, k, level = 0, best, 0
    while level < MAX_LEVELS and k > 0:
        below = 0
        for s in range(ns):
            ballot = (pool, counts, totals, voters, held)
            below, used = _shard_level(shards, s, rc, (k, level, reach), where, ballot, used, below)
        for i in range(fresh):
            used = _fresh_level(
                fresh_tokens[i], fresh_length[i], k, pool, counts, totals, level, used
            )
            if fresh_length[i] < k:
                below = max(below, fresh_length[i])
        level += 1
        if totals[level - 1] >= ENOUGH:
            break
        k = min(below, k - 1)
    _blend(counts, totals, level, used, shares)
    fits = fresh == 0
    for i in range(level):
        fits = fits and held[i] <= KEPT_VOTERS
    held[MAX_LEVELS] = level if fits else 0
    held[MAX_LEVELS + 1] = best
    return used, best


@inner
def inherited_votes(
    shards: Any, recent: Any, token: int, above: int, row: int, scratch: Any
) -> tuple[int, int]:
    """The votes below a node from those of its parent, where they agreed on the node's token.

    Whoever matched ``k`` tokens and voted for this token matches ``k + 1`` here: one read for each
    voter, next to the last one, in place of a search. Returns (-1, 0) where too few agreed.
    """
    pool, shares, _, _, _, counts, totals, all_voters, all_held = scratch
    if above < 0:
        return -1, 0
    levels, best = all_held[above, MAX_LEVELS], all_held[above, MAX_LEVELS + 1]
    if levels == 0 or recent[3] > 0:
        return -1, 0
    totals[:] = 0.0
    voters, held = all_voters[row], all_held[row]
    held[:] = 0
    used = 0
    for level in range(levels):
        for i in range(all_held[above, level]):
            voter = all_voters[above, level, i]
            s, p = voter >> SHARD_BITS, voter & ((1 << SHARD_BITS) - 1)
            tokens = shard_tokens(shards, s)
            if tokens[p] != token or p + 1 >= len(tokens):
                continue
            voters[level, held[level]] = voter + 1
            held[level] += 1
            if tokens[p + 1] >= 0:
                used = _vote(pool, counts, level, used, tokens[p + 1])
                totals[level] += 1.0
        if level == 0 and held[0] < min(all_held[above, 0], FEW_LEFT):
            return -1, 0
    held[MAX_LEVELS] = levels
    held[MAX_LEVELS + 1] = best + 1
    _blend(counts, totals, levels, used, shares)
    return used, min(best + 1, DEPTH)


@inner
def _shard_level(
    shards: Any,
    s: int,
    rc: Any,
    step: Any,
    where: Any,
    ballot: Any,
    used: int,
    below: int,
) -> tuple[int, int]:
    """Add one shard's votes; returns (next shorter match length, used).

    ``step``: (match length, its level, how far to each side to look).
    """
    k, level, reach = step
    pool, counts, totals, voters, held = ballot
    m = where[s, 2]
    if m < k:
        return max(below, m), used
    tokens, order = shard_tokens(shards, s), shard_order(shards, s)
    start, end = where[s, 0], where[s, 1]
    # Every level holds the one before: widen from its ends.
    lo = widen_left(tokens, order, rc, k, where[s, 3], max(start, where[s, 3] - reach))
    hi = widen_right(tokens, order, rc, k, where[s, 4], min(end, where[s, 4] + reach))
    where[s, 3], where[s, 4] = lo, hi
    used, take = _sample_interval(
        tokens, order, (lo, hi, s), pool, counts, level, used, voters, held
    )
    totals[level] += take
    if lo > start:
        below = max(below, common(tokens, position(order, lo - 1, len(tokens)), rc, k))
    if hi < end:
        below = max(below, common(tokens, position(order, hi, len(tokens)), rc, k))
    return below, used


@inner
def _fresh_level(
    token: int, length: int, k: int, pool: Any, counts: Any, totals: Any, level: int, used: int
) -> int:
    if length < k:
        return used
    totals[level] += 1.0
    return _vote(pool, counts, level, used, token)


@inner
def _blend(counts: Any, totals: Any, levels: int, used: int, shares: Any) -> None:
    """Witten-Bell interpolation from the shortest level up: P = (c + d P') / (n + d)."""
    for j in range(used):
        shares[j] = 0.0
    for level in range(levels - 1, -1, -1):
        n = totals[level]
        if n <= 0:
            continue
        distinct = 0
        for j in range(used):
            if counts[level, j] > 0:
                distinct += 1
        for j in range(used):
            shares[j] = (counts[level, j] + distinct * shares[j]) / (n + distinct)


@inner
def chain_votes(chain: Any, rc: Any, n: int, scratch: Any) -> tuple[int, int]:
    """Next-token shares from a hash chain: longest matches weigh most.

    Weights by match length below the longest: 1, 0.5, 0.15. Returns (how many, longest match).
    """
    pool, shares, _, tokens, length = scratch[:5]
    found = chain_find(chain, rc, n, MAX_VISITS, tokens, length)
    best = 0
    for i in range(found):
        best = max(best, length[i])
    used = 0
    total = 0.0
    for i in range(found):
        w = _RECENT_WEIGHTS[min(best - length[i], 2)]
        j = _slot(pool, used, tokens[i])
        if j < 0:
            j = used
            pool[j] = tokens[i]
            shares[j] = 0.0
            used += 1
        shares[j] += w
        total += w
    for j in range(used):
        shares[j] /= total + 0.5
    return used, best


@inner
def source_kind(shares: Any) -> int:
    """Who offers a token with these ``shares`` [3]: 1 the corpus, 2 the request, 3 both."""
    from_request = False
    for s in range(1, SOURCES):
        from_request = from_request or shares[s] > 0
    return 3 if shares[CORPUS] > 0 and from_request else (1 if shares[CORPUS] > 0 else 2)


@inner
def ends_answer(token: int, end_tokens: Any) -> bool:
    """Whether ``token`` is one of ``end_tokens``: nothing is drafted below it."""
    ends = False
    for end in end_tokens:
        ends = ends or token == end
    return ends


@inner
def gather(
    sources: Any,
    rc: Any,
    n: int,
    rx: Any,
    nx: int,
    least: float,
    scratch: Any,
    out: Any,
    place: Any,
) -> int:
    """All sources' candidates for one node.

    ``place``: (its row, its parent's row or -1, how far to look for voters in the corpus).

    ``rc[:n]`` is the reversed output (separators at its start), ``rx[:nx]`` the reversed request,
    prompt included. Writes to ``out``: tokens [MAX_CANDIDATES], shares [MAX_CANDIDATES, 3]
    (0 where a source does not offer the token) and match lengths [3]; returns how many. Tokens with
    a share of ``least`` or less everywhere are left out.
    """
    shards, recent, similar, context = sources
    out_tokens, out_shares, out_match = out
    pool, shares = scratch[0], scratch[1]
    row, above, reach = place
    used = 0
    for source in range(SOURCES):
        if source == CORPUS:
            found, best = inherited_votes(shards, recent, rc[0], above, row, scratch)
            if found < 0:
                found, best = corpus_votes(shards, rc, n, recent, scratch, row, reach)
        elif source == SIMILAR:
            found, best = chain_votes(similar, rc, n, scratch)
        else:
            found, best = chain_votes(context, rx, nx, scratch)
        out_match[source] = best
        # The strong ones first, so that weak ones never take their place.
        for strong in (True, False):
            bar = max(least, STRONG) if strong else least
            for j in range(found if strong or least < STRONG else 0):
                if shares[j] > bar:
                    i = _slot(out_tokens, used, pool[j])
                    if i < 0 and used < MAX_CANDIDATES:
                        i = used
                        out_tokens[i] = pool[j]
                        for q in range(SOURCES):
                            out_shares[i, q] = 0.0
                        used += 1
                    if i >= 0:
                        out_shares[i, source] = shares[j]
        # A token another source offers may sit lower here: its share still is evidence.
        for i in range(used):
            if out_shares[i, source] == 0.0:
                j = _slot(pool, found, out_tokens[i])
                if j >= 0:
                    out_shares[i, source] = shares[j]
    return used

"""The quick draft: one search in the corpus, then a vote among the places it found.

A tree of :class:`tascade.draft.mix.MixDrafter` searches again below every node, which is worth its
microseconds where a step takes milliseconds and serves one request. A batch of hundreds of
requests cannot afford that: here one search serves the whole draft.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tascade.core import DraftTree, IntArray, Source
from tascade.draft.lookup import (
    DEPTH,
    common,
    locate,
    position,
    shard_head,
    shard_order,
    shard_tokens,
    widen_left,
    widen_right,
)
from tascade.draft.shards import CorpusView, shard_table
from tascade.jit import kernel

MAX_VOTERS = 40
MAX_CHAIN = 32
_PER_LEVEL = (20, 12, 8)
_REACH = 48
"""How far from its place a search looks for voters: the nearest share the longest contexts."""


@kernel
def _enlist(shards: Any, s: int, rc: Any, n: int, voters: Any, weights: Any, used: int) -> int:
    """Add up to 40 places of shard ``s``: most from the longest match, some from shorter ones."""
    tokens, order = shard_tokens(shards, s), shard_order(shards, s)
    at, start, end, best = locate(tokens, order, shard_head(shards, s), rc, n)
    lo, hi = at, at
    k = best
    for level in range(len(_PER_LEVEL)):
        if k <= 0 or used >= MAX_VOTERS:
            break
        lo = widen_left(tokens, order, rc, k, lo, max(start, lo - _REACH))
        hi = widen_right(tokens, order, rc, k, hi, min(end, hi + _REACH))
        count = min(hi - lo, _PER_LEVEL[level], MAX_VOTERS - used)
        for i in range(count):
            p = position(order, lo + (i * (hi - lo)) // count, len(tokens))
            voters[used, 0], voters[used, 1] = s, p
            weights[used] = float(k) ** 2
            used += 1
        if hi - lo >= _PER_LEVEL[level]:
            break
        below = 0
        if lo > start:
            below = common(tokens, position(order, lo - 1, len(tokens)), rc, k)
        if hi < end:
            below = max(below, common(tokens, position(order, hi, len(tokens)), rc, k))
        k = min(below, k // 2)
    return used


@kernel
def _plurality(said: Any, weights: Any, alive: int) -> tuple[float, int]:
    """The token with most weight behind it, and that weight."""
    top, best = 0.0, -1
    for i in range(alive):
        if said[i] == best:
            continue
        mass = 0.0
        for j in range(alive):
            if said[j] == said[i]:
                mass += weights[j]
        if mass > top:
            top, best = mass, said[i]
    return top, best


@kernel
def _keep(said: Any, best: int, voters: Any, weights: Any, alive: int) -> int:
    """Drop the voters that did not say ``best``; returns how many stay."""
    kept = 0
    for i in range(alive):
        if said[i] == best:
            voters[kept, 0], voters[kept, 1] = voters[i, 0], voters[i, 1]
            weights[kept] = weights[i]
            kept += 1
    return kept


@kernel
def draft_chain(
    shards: Any, rc: Any, n: int, limit: int, floor: float, work: Any, out: Any, survival: Any
) -> int:
    """Draft at most ``limit`` tokens after the reversed context ``rc[:n]``.

    Each step takes the token most of the remaining voters' weight stands for; those that said
    otherwise leave. Stops below ``floor`` survival. Returns the number of tokens written.
    """
    voters, weights, said = work
    used = 0
    for s in range(shards.shape[0]):
        used = _enlist(shards, s, rc, n, voters, weights, used)
    alive, drafted, reach, total = used, 0, 1.0, 0.0
    for i in range(used):
        total += weights[i]
    while drafted < limit and alive > 0:
        agreed = True
        for i in range(alive):
            tokens = shard_tokens(shards, voters[i, 0])
            said[i] = tokens[voters[i, 1]]
            voters[i, 1] += 1
            agreed = agreed and said[i] == said[0]
        top, best = total, said[0]
        if not agreed:  # else, in most steps of a templated answer, there is nothing to count
            top, best = _plurality(said, weights, alive)
        reach *= top / (total + 0.5)
        if best < 0 or reach < floor:
            break
        out[drafted], survival[drafted] = best, reach
        drafted += 1
        if not agreed:
            alive = _keep(said, best, voters, weights, alive)
            total = top
    return drafted


class ChainDrafter:
    """Drafts one chain from the corpus with a single search. Not calibrated: it does not learn."""

    name = "corpus-chain"

    def __init__(self, corpus: CorpusView, *, limit: int = 16, floor: float = 0.1) -> None:
        self._table, self._keep_alive = shard_table(corpus)
        self._limit, self._floor = min(limit, MAX_CHAIN), floor
        self._work = (
            np.empty((MAX_VOTERS, 2), np.int64),
            np.empty(MAX_VOTERS, np.float64),
            np.empty(MAX_VOTERS, np.int32),
        )
        self._out = np.empty(MAX_CHAIN, np.int32)
        self._survival = np.empty(MAX_CHAIN, np.float32)
        self.start(np.empty(0, np.int32))

    def start(self, prompt: IntArray) -> None:
        """Begin a request: only its output counts here."""
        self._tail = np.array([-1], np.int32)

    def draft(self, reversed_context: IntArray) -> int:
        """Draft after a reversed context [n <= 32]; returns how many tokens ``out`` now holds."""
        drafted: int = draft_chain(
            self._table,
            reversed_context,
            len(reversed_context),
            self._limit,
            self._floor,
            self._work,
            self._out,
            self._survival,
        )
        return drafted

    def propose(self, limit: int, floor: float = 0.0) -> DraftTree:
        """A chain of at most ``limit`` nodes."""
        n = min(self.draft(self._tail), limit)
        return DraftTree.chain(self._out[:n].copy(), self._survival[:n].copy(), Source.CORPUS)

    def commit(self, tokens: IntArray, verified: int, path: Sequence[int]) -> None:
        """Move on by ``tokens``."""
        self._tail = np.concatenate((tokens[::-1], self._tail))[:DEPTH].astype(np.int32)

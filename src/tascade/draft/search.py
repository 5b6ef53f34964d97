"""Numba kernels that grow a draft tree best first, and that learn from what became of it."""

from __future__ import annotations

from typing import Any

import numpy as np

from tascade.draft.evidence import CORPUS, MAX_CANDIDATES, SOURCES, gather, new_scratch
from tascade.draft.jit import kernel
from tascade.draft.lookup import DEPTH
from tascade.draft.mixing import learn, probability

MAX_NODES = 128
_HEAP = 1024


def new_work() -> tuple[Any, ...]:
    """Working memory of :func:`grow`."""
    return (
        np.empty((_HEAP, 4), np.float64),
        np.empty(DEPTH, np.int32),
        np.empty(DEPTH, np.int32),
        np.empty(DEPTH, np.int32),
        np.empty(MAX_CANDIDATES, np.float64),
        new_scratch(),
    )


def new_tree() -> tuple[Any, ...]:
    """Buffers of a tree: tokens, parents, survival, source, each [MAX_NODES]."""
    return (
        np.zeros(MAX_NODES, np.int32),
        np.zeros(MAX_NODES, np.int32),
        np.zeros(MAX_NODES, np.float32),
        np.zeros(MAX_NODES, np.int8),
    )


def new_memo() -> tuple[Any, ...]:
    """What every expanded node was offered, kept until the outcome is known."""
    return (
        np.zeros((MAX_NODES + 1, MAX_CANDIDATES), np.int32),
        np.zeros((MAX_NODES + 1, MAX_CANDIDATES, SOURCES), np.float64),
        np.zeros((MAX_NODES + 1, SOURCES), np.int64),
        np.zeros(MAX_NODES + 1, np.int64),
    )


@kernel
def _push(heap: Any, size: int, key: float, parent: float, token: float, source: float) -> int:
    if size >= heap.shape[0]:
        return size
    i = size
    while i > 0:
        up = (i - 1) >> 1
        if heap[up, 0] >= key:
            break
        heap[i] = heap[up]
        i = up
    heap[i, 0], heap[i, 1], heap[i, 2], heap[i, 3] = key, parent, token, source
    return size + 1


@kernel
def _pop(heap: Any, size: int) -> int:
    """Drop the root (read it before) and restore the heap; returns the new size."""
    size -= 1
    last = heap[size].copy()
    i = 0
    while True:
        child = 2 * i + 1
        if child >= size:
            break
        if child + 1 < size and heap[child + 1, 0] > heap[child, 0]:
            child += 1
        if heap[child, 0] <= last[0]:
            break
        heap[i] = heap[child]
        i = child
    heap[i] = last
    return size


@kernel
def _context(path: Any, depth: int, tail: Any, n_tail: int, out: Any) -> int:
    """Write the reversed context of a node: its path, then the committed tail. Returns length."""
    n = 0
    while n < depth and n < DEPTH:
        out[n] = path[n]
        n += 1
    i = 0
    while n < DEPTH and i < n_tail:
        out[n] = tail[i]
        n += 1
        i += 1
    return n


@kernel
def _path_of(node: int, tokens: Any, parents: Any, out: Any) -> int:
    depth = 0
    while node >= 0 and depth < DEPTH:
        out[depth] = tokens[node]
        node = parents[node]
        depth += 1
    return depth


@kernel
def _expand(
    node: int,
    survival: float,
    size: int,
    floor: float,
    sources: Any,
    tails: Any,
    mixer: Any,
    out: Any,
    memo: Any,
    work: Any,
) -> int:
    """Query every source below ``node`` and push its candidates. Returns the heap's new size."""
    tail_c, tail_x = tails
    _, weights, final, odds = mixer
    tokens, parents = out[0], out[1]
    heap, path, rc, rx, p, scratch = work
    memo_tokens, memo_shares, memo_match, memo_used = memo
    depth = _path_of(node, tokens, parents, path)
    n = _context(path, depth, tail_c, len(tail_c), rc)
    nx = _context(path, depth, tail_x, len(tail_x), rx)
    row = node + 1
    least = min(0.4, max(0.02, 0.4 * floor / survival))
    found = (memo_tokens[row], memo_shares[row], memo_match[row])
    used = gather(sources, rc, n, rx, nx, least, scratch, found)
    memo_used[row] = used
    total = 0.0
    for i in range(used):
        p[i] = probability(memo_shares[row, i], memo_match[row], odds, weights, final)
        total += p[i]
    scale = 1.0 / total if total > 1.0 else 1.0
    for i in range(used):
        key = survival * p[i] * scale
        if key >= floor:
            from_corpus = memo_shares[row, i, CORPUS] > 0
            from_request = False
            for s in range(1, SOURCES):
                from_request = from_request or memo_shares[row, i, s] > 0
            kind = 3.0 if from_corpus and from_request else (1.0 if from_corpus else 2.0)
            size = _push(heap, size, key, node, memo_tokens[row, i], kind)
    return size


@kernel
def grow(
    limit: int,
    floor: float,
    barriers: Any,
    sources: Any,
    tails: Any,
    mixer: Any,
    out: Any,
    memo: Any,
    work: Any,
) -> int:
    """Grow a tree of at most ``limit`` nodes, none below ``floor`` survival.

    ``tails`` are the reversed committed tokens, [n] with separators (corpus view) and [m] without
    (request view). ``barriers`` are the end tokens, below which nothing is drafted.
    Writes ``out`` = (tokens, parents, survival, source); returns the number of nodes.
    """
    tokens, parents, survival, kinds = out
    memo_used = memo[3]
    heap = work[0]
    size = _expand(-1, 1.0, 0, floor, sources, tails, mixer, out, memo, work)
    n = 0
    while size > 0 and n < limit:
        survival[n] = heap[0, 0]
        parents[n] = int(heap[0, 1])
        tokens[n] = int(heap[0, 2])
        kinds[n] = int(heap[0, 3])
        size = _pop(heap, size)
        memo_used[n + 1] = 0
        ends = False
        for barrier in barriers:
            ends = ends or tokens[n] == barrier
        if not ends and n + 1 < limit and survival[n] * 0.98 > floor:
            size = _expand(n, survival[n], size, floor, sources, tails, mixer, out, memo, work)
        n += 1
    return n


@kernel
def settle(committed: Any, n_nodes: int, out: Any, mixer: Any, memo: Any) -> None:
    """Learn from the tokens that came: walk the proposal along them, scoring every candidate."""
    tokens, parents = out[0], out[1]
    memo_tokens, memo_shares, memo_match, memo_used = memo
    node = -1
    for actual in committed:
        row = node + 1
        if memo_used[row] == 0:
            return
        for i in range(memo_used[row]):
            hit = 1.0 if memo_tokens[row, i] == actual else 0.0
            learn(memo_shares[row, i], memo_match[row], hit, mixer)
        following = -1
        for j in range(node + 1, n_nodes):
            if parents[j] == node and tokens[j] == actual:
                following = j
                break
        if following < 0:
            return
        node = following

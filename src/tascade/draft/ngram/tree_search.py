"""Numba kernels that grow a draft tree best first, and that learn from what became of it."""

from __future__ import annotations

from typing import Any

import numpy as np

from tascade.draft.ngram.candidates import (
    EVERYWHERE,
    MAX_CANDIDATES,
    SOURCES,
    ends_answer,
    gather,
    new_scratch,
    source_kind,
)
from tascade.draft.ngram.mixer import learn, learn_path, probability, survive
from tascade.index.lookup import DEPTH
from tascade.util.jit import inner, lean

MAX_NODES = 128
_HEAP = 1024
_LEAST = 0.02


def new_work() -> tuple[Any, ...]:
    """Working memory of :func:`grow_tree`."""
    return (
        np.empty((_HEAP, 4), np.float64),
        np.empty(DEPTH, np.int32),
        np.empty(DEPTH, np.int32),
        np.empty(DEPTH, np.int32),
        np.empty(MAX_CANDIDATES, np.float64),
        new_scratch(MAX_NODES),
    )


def new_tree() -> tuple[Any, ...]:
    """Buffers of a tree: tokens, parents, survival, source, raw path product, each [MAX_NODES]."""
    return (
        np.zeros(MAX_NODES, np.int32),
        np.zeros(MAX_NODES, np.int32),
        np.zeros(MAX_NODES, np.float32),
        np.zeros(MAX_NODES, np.int8),
        np.zeros(MAX_NODES, np.float64),
    )


def new_memo() -> tuple[Any, ...]:
    """What every expanded node was offered, kept until the outcome is known."""
    return (
        np.zeros((MAX_NODES + 1, MAX_CANDIDATES), np.int32),
        np.zeros((MAX_NODES + 1, MAX_CANDIDATES, SOURCES), np.float64),
        np.zeros((MAX_NODES + 1, SOURCES), np.int64),
        np.zeros(MAX_NODES + 1, np.int64),
    )


@inner
def _move(heap: Any, from_: int, to: int) -> None:
    for field in range(4):  # a row set from a row would bring numba's check of shapes along
        heap[to, field] = heap[from_, field]


@inner
def _push(heap: Any, size: int, key: float, parent: float, token: float, source: float) -> int:
    if size >= heap.shape[0]:
        return size
    i = size
    while i > 0:
        up = (i - 1) >> 1
        if heap[up, 0] >= key:
            break
        _move(heap, up, i)
        i = up
    heap[i, 0], heap[i, 1], heap[i, 2], heap[i, 3] = key, parent, token, source
    return size + 1


@inner
def _pop(heap: Any, size: int) -> int:
    """Drop the root (read it before) and restore the heap; returns the new size."""
    size -= 1
    i = 0
    while True:
        child = 2 * i + 1
        if child >= size:
            break
        if child + 1 < size and heap[child + 1, 0] > heap[child, 0]:
            child += 1
        if heap[child, 0] <= heap[size, 0]:
            break
        _move(heap, child, i)
        i = child
    _move(heap, size, i)
    return size


@inner
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


@inner
def _path_of(node: int, tokens: Any, parents: Any, out: Any) -> int:
    depth = 0
    while node >= 0 and depth < DEPTH:
        out[depth] = tokens[node]
        node = parents[node]
        depth += 1
    return depth


@inner
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
    _, weights, final, _, odds = mixer
    tokens, parents = out[0], out[1]
    heap, path, rc, rx, p, scratch = work
    memo_tokens, memo_shares, memo_match, memo_used = memo
    depth = _path_of(node, tokens, parents, path)
    n = _context(path, depth, tail_c, len(tail_c), rc)
    nx = _context(path, depth, tail_x, len(tail_x), rx)
    row = node + 1
    least = min(0.4, max(0.02, 0.4 * floor / survival))
    found = (memo_tokens[row], memo_shares[row], memo_match[row])
    above = parents[node] + 1 if node >= 0 else -1
    used = gather(sources, rc, n, rx, nx, least, scratch, found, (row, above, EVERYWHERE))
    memo_used[row] = used
    total = 0.0
    for i in range(used):
        p[i] = probability(memo_shares[row, i], memo_match[row], odds, weights, final)
        total += p[i]
    scale = 1.0 / total if total > 1.0 else 1.0
    for i in range(used):
        key = survival * p[i] * scale
        if key >= 0.4 * floor:
            kind = source_kind(memo_shares[row, i])
            size = _push(heap, size, key, node, memo_tokens[row, i], kind)
    return size


@lean
def grow_tree(
    limit: int,
    floor: float,
    end_tokens: Any,
    sources: Any,
    tails: Any,
    mixer: Any,
    out: Any,
    memo: Any,
    work: Any,
) -> int:
    """Grow a tree of at most ``limit`` nodes, best first.

    Stops at a node whose survival is below ``floor`` times what the nodes before it promise, the
    target's own token included: it cannot pay (see :class:`tascade.draft.budget.Budget`).

    ``tails`` are the reversed committed tokens, [n] with separators (corpus view) and [m] without
    (request view). Nothing is drafted below one of ``end_tokens``.
    Writes ``out`` (see :func:`new_tree`); returns the number of nodes.
    """
    tokens, parents, survival, kinds, raw = out
    memo_used = memo[3]
    heap = work[0]
    size = _expand(-1, 1.0, 0, _LEAST, sources, tails, mixer, out, memo, work)
    n, least, promised = 0, 1.0, 1.0
    while size > 0 and n < limit:
        # Mapped probabilities must not rise where raw ones fall: a prefix has to stay a tree.
        least = min(least, survive(heap[0, 0], mixer[3]))
        bar = max(_LEAST, floor * promised)
        if least < bar:
            break
        raw[n], survival[n] = heap[0, 0], least
        parents[n] = int(heap[0, 1])
        tokens[n] = int(heap[0, 2])
        kinds[n] = int(heap[0, 3])
        promised += least
        size = _pop(heap, size)
        memo_used[n + 1] = 0
        if not ends_answer(tokens[n], end_tokens) and n + 1 < limit and least * 0.98 > bar:
            size = _expand(n, raw[n], size, bar, sources, tails, mixer, out, memo, work)
        n += 1
    return n


@lean
def update_calibration(
    committed: Any, n_nodes: int, out: Any, mixer: Any, memo: Any, passed: Any
) -> None:
    """Learn from the tokens that came: walk the proposal along them, scoring every candidate.

    ``passed`` is working memory, [MAX_NODES] int8: 1 where the path went, 2 where it is not known.
    """
    tokens, parents = out[0], out[1]
    memo_tokens, memo_shares, memo_match, memo_used = memo
    passed[:n_nodes] = 0
    node, known = -1, True
    for actual in committed:
        known = False
        for i in range(memo_used[node + 1]):
            hit = 1.0 if memo_tokens[node + 1, i] == actual else 0.0
            learn(memo_shares[node + 1, i], memo_match[node + 1], hit, mixer)
        following = -1
        for j in range(node + 1, n_nodes):
            if parents[j] == node and tokens[j] == actual:
                following = j
                break
        if following < 0:
            known = True
            break
        node = following
        passed[node] = 1
    for j in range(n_nodes):
        if not known and (parents[j] == node or (parents[j] >= 0 and passed[parents[j]] == 2)):
            passed[j] = 2  # below where the request ended
        if passed[j] != 2:
            learn_path(out[4][j], float(passed[j]), mixer[3])

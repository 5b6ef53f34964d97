"""Counts of the frequent n-grams of a corpus that is rewritten merge by merge.

Whoever is frequent has a frequent beginning, so that the n-grams form a trie; and as merges only
take n-grams away, except for those that hold the new token, whoever is rare stays rare. So only
frequent ones are kept, and a merge recounts the documents it changes and no others.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tascade.core import IntArray, LongArray
from tascade.util.jit import kernel

BARRIER = -1
"""Stands in a document for an id that no n-gram may hold."""


class Documents:
    """Outputs one after the other, each with a weight, to be rewritten in place.

    Args:
        documents: ids of each output, ``BARRIER`` where no n-gram may go.
        weights: how often each output counts.
    """

    def __init__(self, documents: list[IntArray], weights: list[int]) -> None:
        self.weights = np.array(weights, np.int64)
        self.lengths = np.array([len(d) for d in documents], np.int64)
        self.starts = np.concatenate(([0], np.cumsum(self.lengths)))
        self.flat = np.concatenate([*documents, np.empty(0, np.int32)]).astype(np.int32)


class NgramCounts:
    """The n-grams of 2 to ``items`` items that occur ``least`` times or more, weighted.

    Occurrences that overlap count once. Attributes are arrays over trie nodes, node 0 the root:
    ``counts``, ``depth``, ``parent``, ``item`` and ``span``, the base ids a node stands for.
    """

    def __init__(self, documents: Documents, items: int, least: int) -> None:
        self.documents, self.items, self.least = documents, items, least
        self._size, self._used = 1, 0
        self._grow(1 << 10)
        self.depth[0] = self.span[0] = 0
        self._keys, self._nodes = np.full(1 << 12, -1, np.int64), np.zeros(1 << 12, np.int64)
        self._pass = 0
        everywhere = np.arange(len(documents.weights))
        self.spans: dict[int, int] = {}
        singles = np.unique(documents.flat)
        for token in singles[singles >= 0].tolist():
            self._add(0, token, 1)
        for level in range(2, items + 1):
            self._admit(everywhere, level, BARRIER)
        self._recount(everywhere, 1)

    def __len__(self) -> int:
        return self._size

    def items_of(self, node: int) -> list[int]:
        """The items of a node's n-gram."""
        found: list[int] = []
        while node > 0:
            found.append(int(self.item[node]))
            node = int(self.parent[node])
        return found[::-1]

    def merge(self, node: int, token: int) -> None:
        """Make a node's n-gram the item ``token``, wherever it occurs."""
        d = self.documents
        pattern = np.array(self.items_of(node), np.int32)
        where = np.empty(len(d.weights), np.int64)
        where = where[: _find(d.flat, d.starts, d.lengths, pattern, where)]
        self._recount(where, -1)
        _replace(d.flat, d.starts, d.lengths, where, pattern, token)
        self._add(0, token, int(self.span[node]))
        for level in range(2, self.items + 1):
            self._admit(where, level, token)
        self._recount(where, 1)

    def _recount(self, where: LongArray, sign: int) -> None:
        d = self.documents
        arrays = (self._keys, self._nodes, self.counts, self._stamps, self._edges)
        self._pass = _count(
            d.flat, d.starts, d.lengths, d.weights, where, sign, self.items, arrays, self._pass
        )

    def _admit(self, where: LongArray, level: int, holding: int) -> None:
        """Add the n-grams of ``level`` items that are frequent and hold an item (any if -1)."""
        d = self.documents
        trie = (self._keys, self._nodes)
        most = int(d.lengths[where].sum())
        keys, weights = np.empty(most, np.int64), np.empty(most, np.int64)
        n = _candidates(
            d.flat, d.starts, d.lengths, d.weights, where, level, holding, trie, keys, weights
        )
        found, inverse = np.unique(keys[:n], return_inverse=True)
        totals = np.bincount(inverse, weights[:n], len(found))
        for key in found[totals >= self.least].tolist():
            parent, token = key >> 32, key & 0xFFFFFFFF
            self._add(parent, token, int(self.span[parent]) + self.spans[token])

    def _add(self, parent: int, token: int, span: int) -> None:
        if self._size == len(self.counts):
            self._grow(2 * self._size)
        node = self._size
        self._size += 1
        self.parent[node], self.item[node], self.span[node] = parent, token, span
        self.depth[node] = self.depth[parent] + 1
        if parent == 0:
            self.spans[token] = span
        if 2 * (self._used + 1) > len(self._keys):
            keys, nodes = self._keys, self._nodes
            self._keys = np.full(2 * len(keys), -1, np.int64)
            self._nodes = np.zeros(2 * len(keys), np.int64)
            held = keys >= 0
            _enter(self._keys, self._nodes, keys[held], nodes[held])
        key = np.array([(parent << 32) | token], np.int64)
        _enter(self._keys, self._nodes, key, np.array([node], np.int64))
        self._used += 1

    def _grow(self, size: int) -> None:
        for name in ("counts", "depth", "parent", "item", "span", "_stamps", "_edges"):
            grown = np.zeros(size, np.int64)
            old = getattr(self, name, grown[:0])
            grown[: len(old)] = old
            setattr(self, name, grown)

    counts: LongArray
    depth: LongArray
    parent: LongArray
    item: LongArray
    span: LongArray
    _stamps: LongArray
    _edges: LongArray


@kernel
def _slot(keys: Any, key: int) -> int:
    """Where ``key`` is, or would be."""
    h = np.uint64(key) * np.uint64(0x9E3779B97F4A7C15)
    at = np.int64(h >> np.uint64(32)) & (len(keys) - 1)
    while keys[at] >= 0 and keys[at] != key:
        at = (at + 1) & (len(keys) - 1)
    return int(at)


@kernel
def _enter(keys: Any, nodes: Any, new_keys: Any, new_nodes: Any) -> None:
    for i in range(len(new_keys)):
        at = _slot(keys, new_keys[i])
        keys[at], nodes[at] = new_keys[i], new_nodes[i]


@kernel
def _below(keys: Any, nodes: Any, node: int, token: int) -> int:
    key: Any = (np.int64(node) << np.int64(32)) | np.int64(token)
    at = _slot(keys, key)
    return int(nodes[at]) if keys[at] >= 0 else -1


@kernel
def _count(
    flat: Any,
    starts: Any,
    lengths: Any,
    weights: Any,
    where: Any,
    sign: int,
    items: int,
    arrays: Any,
    turn: int,
) -> int:
    """Add ``sign`` times their weight for the n-grams of the documents ``where``."""
    keys, nodes, counts, stamps, edges = arrays
    for d in where:
        turn += 1
        begin, end = starts[d], starts[d] + lengths[d]
        for i in range(begin, end):
            node = 0
            for j in range(i, min(i + items, end)):
                if flat[j] < 0:
                    break
                node = _below(keys, nodes, node, flat[j])
                if node < 0:
                    break
                if stamps[node] == turn and edges[node] > i:
                    continue
                stamps[node], edges[node] = turn, j + 1
                counts[node] += sign * weights[d]
    return turn


@kernel
def _candidates(
    flat: Any,
    starts: Any,
    lengths: Any,
    weights: Any,
    where: Any,
    level: int,
    holding: int,
    trie: Any,
    out: Any,
    out_weights: Any,
) -> int:
    """Keys of the n-grams whose beginning is known, with their weights; returns how many."""
    n = 0
    for d in where:
        end = starts[d] + lengths[d]
        for i in range(starts[d], end - level + 1):
            node, holds = 0, holding < 0
            for j in range(i, i + level):
                holds = holds or flat[j] == holding
            if not holds or flat[i + level - 1] < 0:
                continue
            for j in range(i, i + level - 1):
                node = -1 if flat[j] < 0 else _below(trie[0], trie[1], node, flat[j])
                if node < 0:
                    break
            if node > 0:
                out[n] = (np.int64(node) << np.int64(32)) | np.int64(flat[i + level - 1])
                out_weights[n] = weights[d]
                n += 1
    return n


@kernel
def _find(flat: Any, starts: Any, lengths: Any, pattern: Any, out: Any) -> int:
    """The documents that hold ``pattern``; returns how many."""
    n, size = 0, len(pattern)
    for d in range(len(lengths)):
        for i in range(starts[d], starts[d] + lengths[d] - size + 1):
            j = 0
            while j < size and flat[i + j] == pattern[j]:
                j += 1
            if j == size:
                out[n] = d
                n += 1
                break
    return n


@kernel
def _replace(flat: Any, starts: Any, lengths: Any, where: Any, pattern: Any, token: int) -> None:
    """Write ``token`` for every occurrence of ``pattern``, from the left."""
    size = len(pattern)
    for d in where:
        i = at = starts[d]
        end = starts[d] + lengths[d]
        while i < end:
            j = 0
            while j < size and i + j < end and flat[i + j] == pattern[j]:
                j += 1
            flat[at] = token if j == size else flat[i]
            i += size if j == size else 1
            at += 1
        lengths[d] = at - starts[d]

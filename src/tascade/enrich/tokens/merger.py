"""Merging base ids into new ones: the shortest way to write an answer with the tokens there are.

The base tokenizer stays as it is; what it says is merged afterwards, id by id, so that
``unmerge(merge(ids)) == ids`` whatever the ids are, and nothing but the answers changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from tascade.core import IntArray, LongArray
from tascade.errors import ConfigError
from tascade.util.jit import kernel

_LONGEST = 64


@kernel
def _child(keys: Any, nodes: Any, node: int, token: int) -> int:
    """The trie node below ``node`` for ``token``, or -1: open addressing, keys are both in one."""
    key = (np.int64(node) << np.int64(32)) | np.int64(token)
    h = np.uint64(key) * np.uint64(0x9E3779B97F4A7C15)
    at = np.int64(h >> np.uint64(40)) & (len(keys) - 1)
    while keys[at] >= 0:
        if keys[at] == key:
            return int(nodes[at])
        at = (at + 1) & (len(keys) - 1)
    return -1


@kernel
def fewest_tokens(
    ids: Any, trie: Any, alive: Any, most: int, cost: Any, pick: Any, without: int
) -> Any:
    """Fewest tokens from every place of ``ids`` [T] to its end: backwards, longest on a tie.

    ``trie``: (keys, nodes, which new token ends at a node or -1); ``alive`` [n]: which new tokens
    may be used, ``without`` excepted. Writes ``cost`` [T + 1], and ``pick`` [T]: the new token to
    use at a place, or -1 for the base id.
    """
    keys, nodes, ends = trie
    n = len(ids)
    cost[n] = 0
    for i in range(n - 1, -1, -1):
        best, chosen = cost[i + 1] + 1, -1
        node, j = 0, i
        while j < n and j - i < most:
            node = _child(keys, nodes, node, ids[j])
            if node < 0:
                break
            j += 1
            new = ends[node]
            if new >= 0 and alive[new] and new != without and cost[j] + 1 <= best:
                best, chosen = cost[j] + 1, new
        cost[i], pick[i] = best, chosen
    return cost[0]


@kernel
def _write(ids: Any, pick: Any, lengths: Any, first: int, out: Any) -> int:
    """Follow the picks from the start; returns how many ids were written."""
    i = n = 0
    while i < len(ids):
        if pick[i] >= 0:
            out[n] = first + pick[i]
            i += lengths[pick[i]]
        else:
            out[n] = ids[i]
            i += 1
        n += 1
    return n


@kernel
def _count_uses(
    flat: Any, starts: Any, weights: Any, trie: Any, alive: Any, lengths: Any, most: int, uses: Any
) -> int:
    """Segment every document of ``flat``; adds to ``uses`` and returns tokens in all, weighted."""
    longest = 0
    for d in range(len(weights)):
        longest = max(longest, starts[d + 1] - starts[d])
    cost, pick = np.empty(longest + 1, np.int32), np.empty(longest + 1, np.int32)
    total = 0
    for d in range(len(weights)):
        ids = flat[starts[d] : starts[d + 1]]
        total += weights[d] * fewest_tokens(ids, trie, alive, most, cost, pick, -1)
        i = 0
        while i < len(ids):
            if pick[i] >= 0:
                uses[pick[i]] += weights[d]
                i += lengths[pick[i]]
            else:
                i += 1
    return total


@kernel
def _cost_without(
    expansions: Any, lengths: Any, trie: Any, alive: Any, most: int, out: Any
) -> None:
    """``out`` [n]: tokens needed to write each living new token with the others."""
    cost, pick = np.empty(most + 1, np.int32), np.empty(most + 1, np.int32)
    for x in range(len(lengths)):
        if alive[x]:
            out[x] = fewest_tokens(expansions[x, : lengths[x]], trie, alive, most, cost, pick, x)


class TokenMerger:
    """Writes answers with new tokens, in as few ids as can be.

    Args:
        expansions: the base ids of each new token, two or more.
        first: the id of the first new token; the others follow.

    Raises:
        ConfigError: an expansion that is too short or too long, holds a new id, or comes twice.
    """

    def __init__(self, expansions: Sequence[Sequence[int]], first: int) -> None:
        self.expansions = [tuple(map(int, expansion)) for expansion in expansions]
        self.first = first
        for number, expansion in enumerate(self.expansions):
            if not 2 <= len(expansion) <= _LONGEST or not all(0 <= t < first for t in expansion):
                raise ConfigError(
                    "a new token does not stand for base ids",
                    got=expansion,
                    wanted=f"2 to {_LONGEST} ids from 0 to {first - 1}",
                    where=f"new token {number}",
                )
        if len(set(self.expansions)) < len(self.expansions):
            raise ConfigError("two new tokens stand for the same ids", wanted="each one once")
        self.lengths = np.array([len(e) for e in self.expansions], np.int64)
        self.longest = int(self.lengths.max(initial=1))
        self._trie = _build_trie(self.expansions)
        self._all = np.ones(len(self.expansions), np.bool_)

    def __len__(self) -> int:
        return len(self.expansions)

    def merge(self, ids: Sequence[int] | IntArray) -> IntArray:
        """The fewest ids that stand for base ``ids`` [T]; of equal ways the longest token first."""
        base = np.ascontiguousarray(ids, np.int32)
        cost, pick = np.empty(len(base) + 1, np.int32), np.empty(len(base) + 1, np.int32)
        n = int(fewest_tokens(base, self._trie, self._all, self.longest, cost, pick, -1))
        out = np.empty(n, np.int32)
        _write(base, pick, self.lengths, self.first, out)
        return out

    def unmerge(self, ids: Sequence[int] | IntArray) -> IntArray:
        """The base ids that ``ids`` [T] stand for."""
        found: list[int] = []
        for token in np.asarray(ids).tolist():
            if self.first <= token < self.first + len(self.expansions):
                found += self.expansions[token - self.first]
            else:
                found.append(token)
        return np.array(found, np.int32)

    def lengths_of(self, ids: IntArray) -> LongArray:
        """How many base ids each of ``ids`` [T] stands for."""
        lengths = np.ones(len(ids), np.int64)
        new = ids >= self.first
        lengths[new] = self.lengths[ids[new] - self.first]
        return lengths

    def usage(
        self, flat: IntArray, starts: LongArray, weights: LongArray, alive: Any = None
    ) -> tuple[int, LongArray]:
        """How a corpus is written with these tokens.

        Args:
            flat: [T] int32, the documents one after the other.
            starts: [D + 1], where each begins and the last ends.
            weights: [D], how often each counts.
            alive: [n] bool, the tokens that may be used; all of them by default.

        Returns:
            (ids in all, how often each new token is used [n]), both weighted.
        """
        uses = np.zeros(len(self.expansions), np.int64)
        alive = self._all if alive is None else alive
        total = _count_uses(
            flat, starts, weights, self._trie, alive, self.lengths, self.longest, uses
        )
        return int(total), uses

    def cost_without(self, alive: Any) -> LongArray:
        """[n]: how many ids would write each living token with the other living ones."""
        table = np.zeros((len(self.expansions), self.longest), np.int32)
        for row, expansion in zip(table, self.expansions, strict=True):
            row[: len(expansion)] = expansion
        out = np.zeros(len(self.expansions), np.int64)
        _cost_without(table, self.lengths, self._trie, alive, self.longest, out)
        return out


def _build_trie(expansions: Sequence[tuple[int, ...]]) -> tuple[Any, Any, Any]:
    """(keys, nodes, new token that ends at a node or -1); node 0 is the root."""
    children: dict[tuple[int, int], int] = {}
    ends = [-1]
    for number, expansion in enumerate(expansions):
        node = 0
        for token in expansion:
            if (node, token) not in children:
                children[node, token] = len(ends)
                ends.append(-1)
            node = children[node, token]
        ends[node] = number
    size = 1 << max(4, (2 * len(children)).bit_length())
    keys, nodes = np.full(size, -1, np.int64), np.zeros(size, np.int64)
    for (node, token), child in children.items():
        key = (node << 32) | token
        at = ((key * 0x9E3779B97F4A7C15) % (1 << 64) >> 40) & (size - 1)
        while keys[at] >= 0:
            at = (at + 1) & (size - 1)
        keys[at], nodes[at] = key, child
    return keys, nodes, np.array(ends, np.int64)


def split_at(answer: IntArray, places: IntArray) -> list[IntArray]:
    """An answer [T] cut before each of ``places``, ascending."""
    bounds = [0, *places.tolist(), len(answer)]
    return [answer[start:end] for start, end in pairwise(bounds)]

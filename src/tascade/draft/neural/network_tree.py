"""A draft tree as the network makes it: node by node, with what it said behind each."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import torch

from tascade.core import ROOT, DraftTree, IntArray, Source
from tascade.draft.costs import Trust
from tascade.draft.neural.draft_model import Confidence

Said = tuple[list[int], list[float]]
"""Likely tokens, the likeliest first, and the probabilities that the network gives them."""


class NetworkTree:
    """Nodes, and what the network said behind those that it went on from.

    Attributes:
        tokens: of each node.
        parents: of each node, ``ROOT`` (-1) below the last committed token.
        survival: the chance that the target's path passes through each node.
    """

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.parents: list[int] = []
        self.survival: list[float] = []
        self._said: dict[int, Said] = {}
        self._place: dict[tuple[int, int], int] = {}
        self._rows: dict[int, int] = {}
        self._outputs: dict[int, torch.Tensor] = {}

    def put(self, parent: int, token: int, survival: float) -> int:
        """A node, or the chance of one that is there already if it is less; which one it is."""
        at = self._place.setdefault((parent, token), len(self.tokens))
        if at == len(self.tokens):
            self.tokens.append(token)
            self.parents.append(parent)
            self.survival.append(survival)
        else:
            self.survival[at] = max(self.survival[at], survival)
        return at

    def say(self, node: int, said: Said, confidence: Confidence) -> list[int]:
        """Nodes for what the network says behind a node; which ones they are."""
        self._said[node] = said
        before = self.survival[node] if node != ROOT else 1.0
        chances = [before * confidence.of(chance) for chance in said[1]]
        return [self.put(node, *pair) for pair in zip(said[0], chances, strict=True)]

    def rows(
        self, nodes: Sequence[int], before: Sequence[int], outputs: torch.Tensor, known: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows that go on from nodes of one depth: their states, and which rows each sees.

        Args:
            nodes: n nodes.
            before: those that the rows before went on from, which are their parents.
            outputs: [len(before), d] of these.
            known: rows of what is committed, which all see.

        Returns:
            [n, d]; and [n, known + rows of this draft so far], booleans.
        """
        places = {node: row for row, node in enumerate(before)}
        kept = len(self._rows)
        seen = torch.zeros(len(nodes), known + kept + len(nodes), dtype=torch.bool)
        seen[:, :known] = True
        for row, node in enumerate(nodes):
            self._rows[node] = known + kept + row
            above = node
            while above != ROOT:
                seen[row, self._rows[above]] = True
                above = self.parents[above]
        return outputs[[places[self.parents[node]] for node in nodes]], seen

    def best(self, limit: int, floor: float) -> DraftTree:
        """The nodes that may pay, best first (see ``Drafter.propose``)."""
        survival = self.survival
        for i, parent in enumerate(self.parents):
            if parent != ROOT:
                survival[i] = min(survival[i], survival[parent])
        order = sorted(range(len(self.tokens)), key=lambda i: (-survival[i], i))
        kept, promised = [], 1.0
        for i in order[:limit]:
            if survival[i] < floor * promised:
                break
            kept.append(i)
            promised += survival[i]
        place = {i: at for at, i in enumerate(kept)} | {ROOT: ROOT}
        return DraftTree(
            np.asarray([self.tokens[i] for i in kept], np.int32),
            np.asarray([place[self.parents[i]] for i in kept], np.int32),
            np.asarray([survival[i] for i in kept], np.float32),
            np.full(len(kept), Source.OTHER, np.int8),
        )

    def likeliest(self, nodes: Sequence[int], most: int, ends: Collection[int]) -> list[int]:
        """Of these nodes, those to go on from, the likeliest first: none behind an end."""
        open_ = [node for node in nodes if self.tokens[node] not in ends]
        return sorted(open_, key=lambda node: (-self.survival[node], node))[:most]

    def learn(self, tokens: IntArray, confidence: Confidence, hits: Trust) -> None:
        """Take what was committed: how good what was said along it was."""
        at = ROOT
        for token in tokens.tolist():
            if at not in self._said:
                return
            words, chances = self._said[at]
            for word, chance in zip(words, chances, strict=True):
                confidence.learn(chance, word == token)
            hits.record(1.0, words[0] == token)
            if (at, token) not in self._place:
                return
            at = self._place[at, token]

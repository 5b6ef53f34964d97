"""One tree of what the task's outputs and a trained network draft, each token weighed by both.

A token's chance is a logistic mixture (as in :mod:`tascade.draft.ngram.mixer`) of what the two say:
where one is silent, of the other's word and of what the silent one left for tokens it did not name.
The weights follow what the target said. So a network that says what the outputs cannot know takes
their nodes, and one that guesses beside a sure path does not: taking the surer one's word, as was
done before, yielded fewer tokens a step than the outputs alone at every size of tree
(``benchmarks/taps/budgets.py``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from tascade.core import ROOT, DraftTree, IntArray, Source

_CLIP = 0.0025
_RATE = 0.03
"""Of learning; 0.015 (the outputs' mixer) to 0.12 gave as many tokens a step, within 0.6 %."""
_START = {
    Source.BOTH: (0.6, 0.6, 0.0),
    Source.CORPUS: (0.7, 0.3, 0.0),
    Source.OTHER: (1.0, 0.0, 0.0),
}
"""Weights before anything was seen: two that agree are surer than each, the outputs' word counts
where the network does not name their token, and the network's token may have what they left."""
_GRAFTS = 3
"""Departures of the network behind which the task's outputs are asked, each some 0.2 ms."""


class JointOdds:
    """The chance of a token, from what the outputs and the network say of it."""

    def __init__(self) -> None:
        self._weights = {kind: list(start) for kind, start in _START.items()}

    def of(self, kind: Source, outputs: float, network: float) -> tuple[float, float, float]:
        """A token's chance, and the log-odds that it was made of.

        Args:
            kind: who names the token.
            outputs: their probability of it, or what they left.
            network: likewise.
        """
        if kind == Source.BOTH:
            first, second = _log_odds(outputs), _log_odds(network)
        elif kind == Source.OTHER:
            first, second = _log_odds(outputs * network), _log_odds(network)
        else:
            first, second = _log_odds(outputs), _log_odds(outputs * network)
        return self._chance(kind, first, second), first, second

    def _chance(self, kind: Source, first: float, second: float) -> float:
        a, b, bias = self._weights[kind]
        mixed = a * first + b * second + bias
        return 1.0 / (1.0 + math.exp(-min(max(mixed, -6.0), 6.0)))

    def learn(self, kind: Source, first: float, second: float, hit: bool) -> None:
        """Take the outcome of a token whose log-odds :meth:`of` gave."""
        error = _RATE * (hit - self._chance(kind, first, second))
        for at, part in enumerate((first, second, 1.0)):
            self._weights[kind][at] += error * part


def _log_odds(p: float) -> float:
    p = min(max(p, _CLIP), 1.0 - _CLIP)
    return math.log(p / (1.0 - p))


class JointTree:
    """A trie of both drafts.

    Args:
        outputs: the tree of the task's outputs.
        levels: of each place that the network was asked at, its tokens and their chances.
        followed: the token behind each of these places, which leads to the next.
        odds: what weighs the two, and learns.
    """

    def __init__(
        self,
        outputs: DraftTree,
        levels: Sequence[tuple[Sequence[int], Sequence[float]]],
        followed: Sequence[int],
        odds: JointOdds,
    ) -> None:
        self._odds = odds
        # By node, the root first: its parent, its token, the tokens below it.
        self._parents, self._tokens, self._below = [0], [-1], [dict[int, int]()]
        self._said: list[list[float | None]] = [[None, None]]  # by the outputs, by the network
        self._sources = [int(Source.OTHER)]
        self._graft(0, outputs)
        self._asked: dict[int, list[tuple[int, Source, float, float]]] = {}
        at: int | None = 0
        for depth, (words, chances) in enumerate(levels):
            if at is None:
                break
            self._asked[at] = []
            for word, chance in zip(words, chances, strict=True):
                self._said[self._add(at, word, Source.OTHER)][1] = chance
            at = self._below[at].get(followed[depth]) if depth < len(followed) else None
        self._weigh()

    def _add(self, parent: int, token: int, source: int) -> int:
        at = self._below[parent].setdefault(token, len(self._tokens))
        if at == len(self._tokens):
            self._parents.append(parent)
            self._tokens.append(token)
            self._below.append({})
            self._said.append([None, None])
            self._sources.append(source)
        return at

    def _graft(self, at: int, tree: DraftTree) -> None:
        """What the outputs say behind a node."""
        place, chances = {int(ROOT): at}, {int(ROOT): 1.0}
        for i, (token, parent, chance, source) in enumerate(tree.rows()):
            place[i], chances[i] = self._add(place[parent], token, source), chance
            self._said[place[i]][0] = chance / max(chances[parent], 1e-9)

    def _weigh(self) -> None:
        """The survival of every node; nothing below a node is more than certain together."""
        self.survival = [1.0] * len(self._tokens)
        for at, below in enumerate(self._below):  # parents come first
            nodes = list(below.values())
            shares = [self._said[node][0] or 0.0 for node in nodes]
            if at in self._asked:
                shares = self._weighed(at, nodes)
            total = max(1.0, sum(shares))
            for node, share in zip(nodes, shares, strict=True):
                self.survival[node] = self.survival[at] * share / total

    def _weighed(self, at: int, nodes: Sequence[int]) -> list[float]:
        said = [self._said[node] for node in nodes]
        left = [max(0.0, 1.0 - sum(pair[i] or 0.0 for pair in said)) for i in (0, 1)]
        shares, self._asked[at] = [], []
        for node, (outputs, network) in zip(nodes, said, strict=True):
            kind = Source.BOTH if outputs is not None else Source.OTHER
            kind = kind if network is not None else Source.CORPUS
            chance, first, second = self._odds.of(
                kind,
                left[0] if outputs is None else outputs,
                left[1] if network is None else network,
            )
            self._asked[at].append((self._tokens[node], kind, first, second))
            shares.append(chance)
        return shares

    def departures(self) -> Iterator[tuple[int, list[int]]]:
        """The likeliest nodes at which the network leaves the outputs, and the tokens to there."""
        own = [at for at, said in enumerate(self._said) if at == 0 or said[0] is not None]
        ends = [node for at in own for node in self._below[at].values()]
        ends = [node for node in ends if self._said[node][0] is None]
        for node in sorted(ends, key=lambda at: -self.survival[at])[:_GRAFTS]:
            path, at = [], node
            while at:
                path.append(self._tokens[at])
                at = self._parents[at]
            yield node, path[::-1]

    def extend(self, grafts: Sequence[tuple[int, DraftTree]]) -> None:
        """Take what the outputs say behind some nodes."""
        for at, tree in grafts:
            self._graft(at, tree)
        if any(len(tree) for _, tree in grafts):
            self._weigh()

    def best(self, limit: int, floor: float = 0.0) -> DraftTree:
        """The tree of the likeliest ``limit`` nodes that may pay, ordered by survival.

        ``floor``: see ``Drafter.propose``.
        """
        sources = [
            int(Source.BOTH) if None not in said else source
            for said, source in zip(self._said, self._sources, strict=True)
        ]
        above = [parent - 1 for parent in self._parents[1:]]  # without the root
        tokens, survival = self._tokens[1:], self.survival[1:]
        return DraftTree.best_first(tokens, above, survival, sources[1:], limit, floor)

    def learn(self, tokens: IntArray) -> None:
        """Take what the target said: which token followed at each place that was asked about."""
        at: int | None = 0
        for token in tokens.tolist():
            if at is None:
                break
            for word, kind, first, second in self._asked.get(at, ()):
                self._odds.learn(kind, first, second, word == token)
            at = self._below[at].get(token)

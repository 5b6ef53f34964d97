"""A trained drafter beside the task's outputs: one tree of both, within one budget."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from tascade.core import ROOT, DraftTree, FloatArray, IntArray, Source
from tascade.draft.budget import Budget
from tascade.draft.costs import Trust
from tascade.draft.neural.trained import ALONG, DEPTH, TrainedDrafter
from tascade.draft.ngram.drafter import NgramDrafter

_GRAFTS = 3
"""Departures of the network behind which the task's outputs are asked, each some 0.2 ms."""
_LIKELY = 0.5
"""From this chance of its first token on, the network goes along the outputs' likeliest path."""
_ADDED = 2.0
"""Tokens that it is expected to add for each miss of the outputs before anything was seen: less
would have it never asked, and so never known."""
_SPREAD = 8
"""Calls that the reading of a prompt is charged to, since all of them profit."""
_AHEAD = 2
"""What going along a path takes, in passes of one token."""


class MergedDrafter:
    """The task's outputs draft, and the trained network fills in what they lack.

    It is asked where the budget expects that what it adds is worth its time; what it added, it
    learns from what was accepted. Where the outputs have a likely path, the network goes along it,
    in one pass, and says what else may follow; where they have none, it drafts by itself. Where the
    network leaves the outputs' tree, the outputs draft on
    from its tokens. Equal paths are one, and of all nodes the best are verified, so that the merge
    takes no more of them than one drafter would (TAPS' merged trees take twice as many). A
    :class:`Drafter`.
    """

    name = "tasc-spec+taps"

    def __init__(self, corpus: NgramDrafter, trained: TrainedDrafter, budget: Budget) -> None:
        self.corpus, self.trained, self.budget = corpus, trained, budget
        self._reset()

    def _reset(self) -> None:
        self.added = Trust(0.5, _ADDED * 0.5, weight=1 / 32)
        self._alone: DraftTree | None = None
        self._missing, self._owed = 1.0, 0.0

    def refresh(self) -> None:
        """Take up what was added to the corpus index since it was opened."""
        self.corpus.refresh()

    def forget(self) -> None:
        """Begin anew with what was learned of the network; not with what the corpus learned."""
        self.trained.forget()
        self._reset()

    def start(self, prompt: IntArray) -> None:
        """Begin a request."""
        self._alone = None
        self.corpus.start(prompt)
        self.trained.start(prompt)

    def propose(self, limit: int, floor: float = 0.0) -> DraftTree:
        """The tree of both, or of the corpus alone (see ``Drafter.propose``)."""
        tree = self.corpus.propose(limit, floor)
        self._alone = None
        budget, trained = self.budget, self.trained
        if limit <= 0 or budget.calls_rest or not trained.fits():
            trained.propose(0)
            return tree
        path, chances = _likeliest_path(tree)
        along = bool(path) and chances[0] >= _LIKELY
        missing = _missing(chances if along else ())
        together = self._promise(tree, missing)
        seconds = np.full(len(together), trained.seconds * (_AHEAD if along else DEPTH))
        if not budget.worth_a_call(together, seconds, tree.survival):
            trained.propose(0)
            return tree
        started = trained.clock()
        if along:
            more = trained.draft_along(path, chances, limit, floor)
        else:
            more = trained.draft(limit, floor, float(budget.cost.upto(1)[0]))
        both = merge(tree, more, limit)
        for path, survival in _departures(tree, more):
            below = self.corpus.beyond(path, limit, min(1.0, floor / max(survival[-1], 1e-6)))
            both = merge(both, _behind(path, survival, below), limit)
        self._owed += trained.catching_up
        due = self._owed / _SPREAD
        self._owed -= due
        budget.called(trained.clock() - started - trained.catching_up + due, tree.survival)
        self._alone, self._missing = tree, missing
        return both

    def _promise(self, tree: DraftTree, missing: float) -> FloatArray:
        """Survival of the nodes of both: what the network adds, it adds where the tree misses."""
        extra = self.added.ratio * missing
        count = max(1, math.ceil(extra))
        more = np.full(count, extra / count, np.float32)
        both: FloatArray = np.sort(np.concatenate((tree.survival, more)))[::-1]
        return both

    def commit(self, tokens: IntArray, verified: int, path: Sequence[int]) -> None:
        """Tell both what was said; each learns whether it had foreseen it."""
        if self._alone is not None:
            accepted = len(path) - min(len(path), _followed(self._alone, tokens.tolist()))
            self.added.record(self._missing, accepted)
        self.corpus.commit(tokens, verified, path)
        self.trained.commit(tokens, verified, path)


def _likeliest_path(tree: DraftTree) -> tuple[list[int], list[float]]:
    """The tokens of the tree's likeliest path, and their survival: :data:`ALONG` at most."""
    path: list[int] = []
    survival: list[float] = []
    at = int(ROOT)
    for i, (token, parent, chance, _) in enumerate(_rows(tree)):  # the likeliest child comes first
        if parent == at and len(path) < ALONG:
            path.append(token)
            survival.append(chance)
            at = i
    return path, survival


def _missing(survival: Sequence[float]) -> float:
    """The chance that a path of such survival ends before its last token; 1 without any."""
    return max(0.02, 1.0 - survival[-1]) if survival else 1.0


def _followed(tree: DraftTree, tokens: Sequence[int]) -> int:
    """How many of these tokens are a path of the tree."""
    at, places = int(ROOT), _places(tree)
    for depth, token in enumerate(tokens):
        if (token, at) not in places:
            return depth
        at = places[token, at]
    return len(tokens)


def _departures(tree: DraftTree, more: DraftTree) -> Iterator[tuple[list[int], list[float]]]:
    """Where the network's likeliest paths leave the tree: tokens to there, and their survival."""
    known = {ROOT: ROOT}
    place = _places(tree)
    left = 0
    paths: dict[int, tuple[list[int], list[float]]] = {ROOT: ([], [])}
    for i, (token, parent, chance, _) in enumerate(_rows(more)):
        words, chances = paths[parent]
        paths[i] = [*words, token], [*chances, chance]
        if parent in known and (token, known[parent]) in place:
            known[i] = place[token, known[parent]]
        elif parent in known and left < _GRAFTS:
            left += 1
            yield paths[i]


def _places(tree: DraftTree) -> dict[tuple[int, int], int]:
    """Where each (token, parent) stands."""
    return {(token, parent): i for i, (token, parent, _, _) in enumerate(_rows(tree))}


def _behind(path: list[int], survival: list[float], below: DraftTree) -> DraftTree:
    """A path, and a tree below its end."""
    n = len(path)
    chain = DraftTree.chain(path, survival)
    parents = np.where(below.parents == ROOT, n - 1, below.parents + n).astype(np.int32)
    return DraftTree(
        np.concatenate((chain.tokens, below.tokens)),
        np.concatenate((chain.parents, parents)),
        np.concatenate((chain.survival, below.survival * np.float32(survival[-1]))),
        np.concatenate((chain.source, below.source)),
    )


def merge(first: DraftTree, second: DraftTree, limit: int) -> DraftTree:
    """The best ``limit`` nodes of two trees, equal paths as one.

    A token that both have below a node is as likely as the surer one says. Where what is below a
    node would then be more than certain, its tokens share what there is.
    """
    if not len(second) or not len(first):
        return (first if len(first) else second).first(limit)
    below: dict[int, dict[int, int]] = {ROOT: {}}
    # Of each node: its parent, its token, its share of the parent's survival, its source.
    nodes: list[list[float]] = []
    for tree in (first, second):
        place: dict[int, int] = {ROOT: ROOT}
        chances: dict[int, float] = {ROOT: 1.0}
        for i, (token, parent, chance, source) in enumerate(_rows(tree)):
            above, chances[i] = place[parent], chance
            share = chance / max(chances[parent], 1e-9)
            at = below[above].setdefault(token, len(nodes))
            place[i] = at
            if at == len(nodes):
                nodes.append([above, token, share, source])
                below[at] = {}
            else:
                nodes[at][2:] = max(nodes[at][2], share), Source.BOTH
    survival: dict[int, float] = {ROOT: 1.0}
    for at, node in enumerate(nodes):  # parents come first
        above, share = int(node[0]), node[2]
        total = sum(nodes[child][2] for child in below[above].values())
        survival[at] = survival[above] * share / max(1.0, total)
    order = sorted(range(len(nodes)), key=lambda at: (-survival[at], at))[:limit]
    final = {at: i for i, at in enumerate(order)} | {ROOT: ROOT}
    return DraftTree(
        np.asarray([nodes[at][1] for at in order], np.int32),
        np.asarray([final[int(nodes[at][0])] for at in order], np.int32),
        np.asarray([survival[at] for at in order], np.float32),
        np.asarray([nodes[at][3] for at in order], np.int8),
    )


def _rows(tree: DraftTree) -> Iterator[tuple[int, int, float, int]]:
    columns = (tree.tokens, tree.parents, tree.survival, tree.source)
    return zip(*(column.tolist() for column in columns), strict=True)

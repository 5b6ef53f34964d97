"""A trained drafter beside the task's outputs: one tree of both, within one budget."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from tascade.core import ROOT, DraftTree, FloatArray, IntArray, Source
from tascade.draft.budget import Budget
from tascade.draft.neural.trained import TrainedDrafter
from tascade.draft.ngram.drafter import NgramDrafter


class MergedDrafter:
    """The task's outputs draft, and the trained network fills in what they lack.

    It is called where the budget expects that what both promise together is worth its time. Equal
    paths of the two trees are one; of all nodes the best are verified, so that the merge takes no
    more of them than one drafter would (TAPS' merged trees take twice as many). A
    :class:`Drafter`.
    """

    name = "tasc-spec+taps"

    def __init__(self, corpus: NgramDrafter, trained: TrainedDrafter, budget: Budget) -> None:
        self.corpus, self.trained, self.budget = corpus, trained, budget

    def refresh(self) -> None:
        """Take up what was added to the corpus index since it was opened."""
        self.corpus.refresh()

    def start(self, prompt: IntArray) -> None:
        """Begin a request."""
        self.corpus.start(prompt)
        self.trained.start(prompt)

    def propose(self, limit: int, floor: float = 0.0) -> DraftTree:
        """The tree of both, or of the corpus alone (see ``Drafter.propose``)."""
        tree = self.corpus.propose(limit, floor)
        if limit <= 0 or not self.trained.fits():
            self.trained.propose(0)
            return tree
        budget, trained = self.budget, self.trained
        alone, seconds = trained.expected()
        together = _promise(tree, alone)
        if not budget.worth_a_call(together, np.full(len(together), seconds[-1]), tree.survival):
            trained.propose(0)
            return tree
        started = trained.clock()
        more = trained.draft(limit, floor, float(budget.cost.upto(1)[0]))
        budget.called(trained.clock() - started, tree.survival)
        return merge(tree, more, limit)

    def commit(self, tokens: IntArray, verified: int, path: Sequence[int]) -> None:
        """Tell both what was said; each learns whether it had foreseen it."""
        self.corpus.commit(tokens, verified, path)
        self.trained.commit(tokens, verified, path)


def _promise(tree: DraftTree, alone: FloatArray) -> FloatArray:
    """Survival of the nodes that both may have: of the network's, where the tree has none."""
    missing = max(0.0, 1.0 - float(tree.survival[tree.parents == -1].sum()))
    both: FloatArray = np.sort(np.concatenate((tree.survival, alone * np.float32(missing))))[::-1]
    return both


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

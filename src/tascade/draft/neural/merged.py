"""A trained drafter beside the task's outputs: one tree of both, within one budget."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from tascade.core import ROOT, DraftTree, FloatArray, IntArray
from tascade.draft.budget import Budget
from tascade.draft.costs import Trust
from tascade.draft.neural.joint import JointOdds, JointTree
from tascade.draft.neural.trained import ALONG, DEPTH, TrainedDrafter
from tascade.draft.ngram.drafter import NgramDrafter

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
    network leaves the outputs' tree, the outputs draft on from its tokens. Equal paths are one,
    each token is weighed by what both say of it (:class:`JointTree`), and of all nodes the best are
    verified, so that the merge takes no more of them than one drafter would (TAPS' merged trees
    take twice as many). A :class:`Drafter`.
    """

    name = "tasc-spec+taps"

    def __init__(self, corpus: NgramDrafter, trained: TrainedDrafter, budget: Budget) -> None:
        self.corpus, self.trained, self.budget = corpus, trained, budget
        self._reset()

    def _reset(self) -> None:
        self.added = Trust(0.5, _ADDED * 0.5, weight=1 / 32)
        self.odds = JointOdds()
        # Of a draft of both: the outputs' own tree, that of both, and what the former may miss.
        self._drafted: tuple[DraftTree, JointTree, float] | None = None
        self._owed = self._joining = 0.0

    def refresh(self) -> None:
        """Take up what was added to the corpus index since it was opened."""
        self.corpus.refresh()

    def forget(self) -> None:
        """Begin anew with what was learned of the network; not with what the corpus learned."""
        self.trained.forget()
        self._reset()

    def start(self, prompt: IntArray) -> None:
        """Begin a request."""
        self._drafted = None
        self.corpus.start(prompt)
        self.trained.start(prompt)

    def propose(self, limit: int, floor: float = 0.0) -> DraftTree:
        """The tree of both, or of the corpus alone (see ``Drafter.propose``)."""
        tree = self.corpus.propose(limit, floor)
        self._drafted = None
        budget, trained = self.budget, self.trained
        if limit <= 0 or budget.calls_rest or not trained.fits():
            trained.propose(0)
            return tree
        path, chances = _likeliest_path(tree)
        along = bool(path) and chances[0] >= _LIKELY
        missing = _missing(chances if along else ())
        together = self._promise(tree, missing)
        passes = trained.seconds * (_AHEAD if along else DEPTH)
        seconds = np.full(len(together), passes + self._joining)
        if not budget.worth_a_call(together, seconds, tree.survival):
            trained.propose(0)
            return tree
        started = trained.clock()
        if along:
            trained.look_along(path)
        else:
            trained.look(limit, floor, float(budget.cost.upto(1)[0]))
        looked = trained.clock()
        joint = JointTree(tree, trained.foreseen(), trained.followed, self.odds)
        grafts = []
        for at, words in joint.departures():
            low = min(1.0, floor / max(joint.survival[at], 1e-6))
            grafts.append((at, self.corpus.beyond(words, limit, low)))
        joint.extend(grafts)
        both = joint.best(limit, floor)
        self._owed += trained.catching_up
        due = self._owed / _SPREAD
        self._owed -= due
        ended = trained.clock()
        self._joining += (ended - looked - self._joining) / 8
        budget.called(ended - started - trained.catching_up + due, tree.survival)
        self._drafted = tree, joint, missing
        return both

    def _promise(self, tree: DraftTree, missing: float) -> FloatArray:
        """Survival of the nodes of both: what the network adds, it adds where the tree misses."""
        extra = max(0.0, self.added.ratio) * missing
        count = max(1, math.ceil(extra))
        more = np.full(count, extra / count, np.float32)
        both: FloatArray = np.sort(np.concatenate((tree.survival, more)))[::-1]
        return both

    def commit(self, tokens: IntArray, verified: int, path: Sequence[int]) -> None:
        """Tell both what was said; each learns whether it had foreseen it."""
        if self._drafted is not None:
            alone, joint, missing = self._drafted
            joint.learn(tokens)
            # Fewer than none, where the tree of both has lost what the outputs alone had.
            self.added.record(missing, len(path) - _followed(alone, tokens.tolist()))
        self.corpus.commit(tokens, verified, path)
        self.trained.commit(tokens, verified, path)


def _likeliest_path(tree: DraftTree) -> tuple[list[int], list[float]]:
    """The tokens of the tree's likeliest path, and their survival: :data:`ALONG` at most."""
    path: list[int] = []
    survival: list[float] = []
    at = int(ROOT)
    for i, (token, parent, chance, _) in enumerate(tree.rows()):  # the likeliest child comes first
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
    places = {(token, parent): i for i, (token, parent, _, _) in enumerate(tree.rows())}
    at = int(ROOT)
    for depth, token in enumerate(tokens):
        if (token, at) not in places:
            return depth
        at = places[token, at]
    return len(tokens)

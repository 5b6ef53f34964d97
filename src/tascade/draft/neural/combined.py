"""An assistant beside the task's outputs: who drafts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tascade.core import DraftTree, IntArray
from tascade.draft.budget import Budget
from tascade.draft.neural.draft_model import AssistantDrafter
from tascade.draft.ngram.drafter import NgramDrafter


class CorpusFirst:
    """The task's outputs draft first, and the assistant where they promise less than it does.

    It is called only if the budget expects more tokens a second from it, its own time included,
    than from the tree that is there already; what then promises more is verified. A
    :class:`Drafter`.
    """

    name = "tasc-spec+assistant"

    def __init__(self, corpus: NgramDrafter, assistant: AssistantDrafter, budget: Budget) -> None:
        self.corpus, self.assistant, self.budget = corpus, assistant, budget
        self._assisted = False

    def refresh(self) -> None:
        """Take up what was added to the corpus index since it was opened."""
        self.corpus.refresh()

    def start(self, prompt: IntArray) -> None:
        """Begin a request."""
        self._assisted = False
        self.corpus.start(prompt)
        self.assistant.start(prompt)

    def propose(self, limit: int, floor: float = 0.0) -> DraftTree:
        """The tree of the corpus, or the assistant's chain (see ``Drafter.propose``)."""
        tree = self.corpus.propose(limit, floor)
        self._assisted = False
        if limit <= 0 or not self.assistant.fits():
            return tree
        budget, assistant = self.budget, self.assistant
        if not budget.worth_a_call(*assistant.expected(), tree.survival):
            return tree
        started = assistant.clock()
        chain = assistant.draft(limit, floor, float(budget.cost.upto(1)[0]))
        budget.called(assistant.clock() - started, tree.survival)
        self._assisted = budget.rate(chain.survival) > budget.rate(tree.survival)
        return chain if self._assisted else tree

    def commit(self, tokens: IntArray, verified: int, path: Sequence[int]) -> None:
        """Tell both what was said; each learns whether it had foreseen it."""
        if self._assisted:
            self.corpus.commit(tokens, 0, ())
            self.assistant.commit(tokens, verified, path)
        else:
            self.corpus.commit(tokens, verified, path)
            self.assistant.commit(tokens, 0, ())


def assisted(
    assistant: AssistantDrafter, corpus: NgramDrafter, budget: Budget
) -> tuple[CorpusFirst, Budget]:
    """A pack's drafter and budget, joined by an assistant."""
    assistant.start(np.ones(32, np.int32))  # a few tokens, to have it warm and know their price
    assistant.propose(8)
    assistant.start(np.empty(0, np.int32))
    return CorpusFirst(corpus, assistant, budget), budget

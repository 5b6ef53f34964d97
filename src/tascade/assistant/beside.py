"""An assistant beside the task's outputs: who drafts, and who pays for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from tascade.assistant.account import AT_RISK, Account
from tascade.assistant.drafter import AssistantDrafter
from tascade.core import DraftTree, IntArray
from tascade.draft.budget import Budget
from tascade.draft.mix import MixDrafter


class CorpusFirst:
    """The task's outputs draft first, and the assistant where they promise less than it does.

    It is asked only if it is expected to yield more tokens a second, its own time included, than
    the tree that is there already; what then promises more is verified. A :class:`Drafter`.
    """

    name = "tasc-spec+assistant"

    def __init__(self, corpus: MixDrafter, assistant: AssistantDrafter) -> None:
        self.corpus, self.assistant, self._assisted = corpus, assistant, False

    def refresh(self) -> None:
        """Take up what was added to the corpus index since it was opened."""
        self.corpus.refresh()

    def start(self, prompt: IntArray) -> None:
        """Begin a request."""
        self.corpus.start(prompt)
        self.assistant.start(prompt)

    def propose(self, limit: int, floor: float = 0.0) -> DraftTree:
        """The tree of the corpus, or the assistant's chain (see ``Drafter.propose``)."""
        tree = self.corpus.propose(limit, floor)
        chain = self.assistant.draft(limit, floor, tree.survival)
        promise = self.assistant.account.best
        self._assisted = promise(chain.survival) > promise(tree.survival)
        return chain if self._assisted else tree

    def commit(self, tokens: IntArray, verified: int, path: Sequence[int]) -> None:
        """Tell both what was said; each learns whether it had foreseen it."""
        if self._assisted:
            self.corpus.commit(tokens, 0, ())
            self.assistant.commit(tokens, verified, path)
        else:
            self.corpus.commit(tokens, verified, path)
            self.assistant.commit(tokens, 0, ())


@dataclass(slots=True)
class AssistedBudget(Budget):
    """The budget beside an assistant, whose time is on its own account.

    :class:`Budget` charges a draft with the mean time of drafting, at most one step's: right for
    look-ups. A model's chain may cost several steps, and was weighed before it was made.
    """

    account: Account = field(default_factory=Account)

    def observe(self, nodes: int, seconds: float, draft_seconds: float) -> None:
        """Take what a step took; the assistant's part of the drafting is left out."""
        Budget.observe(self, nodes, seconds, max(0.0, draft_seconds - self.account.spent))
        self.account.drift = self._drift


def assisted(
    assistant: AssistantDrafter, corpus: MixDrafter, budget: Budget
) -> tuple[CorpusFirst, AssistedBudget]:
    """A pack's drafter and budget, joined by an assistant."""
    account = assistant.account
    account.cost = None
    assistant.start(np.ones(32, np.int32))  # a few tokens, to have it warm and know their price
    assistant.propose(8)
    assistant.start(np.empty(0, np.int32))
    account.cost = budget.cost
    account.balance = AT_RISK * account.step()
    beside = AssistedBudget(budget.cost, budget.max_nodes, account=account)
    return CorpusFirst(corpus, assistant), beside

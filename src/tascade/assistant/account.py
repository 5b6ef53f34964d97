"""What drafting with a model costs and brings."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tascade.core import FloatArray
from tascade.draft.budget import CostTable

_DEPTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24)
_MARGIN = 1.06
AT_RISK, _INCOME = 16, 0.02
FEW = 8
"""Tokens that an assistant runs in about the time of one."""


@dataclass(slots=True)
class Account:
    """What drafting with a model costs and brings, so that it is left where it does not pay.

    A budget chooses when a draft is there; the assistant's time is spent by then. So this is
    settled before: k drafted tokens, each right with chance a, yield 1 + a + ... + a^k tokens
    (Leviathan et al., eq. 1) for k steps of the assistant and one of the target over 1 + k tokens.
    An estimate may be wrong, or be of no use yet. So there is a balance: time saved less time
    spent, the prompt's prefill with it. While it is below zero no prompt is begun and nothing is
    tried; every step adds a fiftieth of its time, up to 16 steps' in all, and what a try saves,
    where drafts are not expected to pay, counts half.

    Attributes:
        cost: seconds of a target's step; ``None``: the assistant's time counts as nothing.
        clock: tells seconds.
        drift: how much slower than in ``cost`` the machine runs now.
        token: seconds of the assistant for a token; ``spent``: for the last proposal.
        balance: seconds; ``trying``: whether the last draft was a try.
    """

    cost: CostTable | None = None
    clock: Callable[[], float] = time.perf_counter
    drift: float = 1.0
    token: float = 0.0
    balance: float = 0.0
    spent: float = 0.0
    trying: bool = False

    def __deepcopy__(self, memo: object) -> Account:
        """Itself: a drafter and its budget keep one account."""
        return self

    def step(self, nodes: int = 0) -> float:
        """Seconds of a target's step over so many nodes."""
        assert self.cost is not None
        return self.drift * float(self.cost.upto(min(1 + nodes, self.cost.limit))[-1])

    def best(self, survival: FloatArray) -> float:
        """Tokens a second that verifying these nodes yields, or the best first part of them."""
        if self.cost is None:
            return 1.0 + float(survival.sum())
        n = min(len(survival), self.cost.limit - 1)
        tokens = 1.0 + np.concatenate(([0.0], np.cumsum(survival[:n])))
        return float((tokens / (self.drift * self.cost.upto(1 + n))).max())

    def pays(self, mean: float, other: FloatArray, warm: bool) -> bool:
        """Whether to draft, where ``other`` [N] could be verified; ``warm``: nearly all is read."""
        if self.cost is None:
            return True
        rival = self.best(other)
        yields = np.cumsum(mean ** np.arange(_DEPTHS[-1] + 1)).tolist()
        speed = max(yields[k] / (self.step(k) + k * self.token) for k in _DEPTHS)
        self.trying = speed <= _MARGIN * rival
        if self.trying:
            return self.balance >= 0 and rival * self.step() < 1.001
        return warm or self.balance >= 0

    def ran(self, tokens: int, seconds: float) -> None:
        """A pass of the assistant over so many tokens."""
        if tokens <= FEW:  # quickly down and slowly up: one slow pass is not what passes cost
            self.token = self.token or seconds
            gap = min(seconds, 4 * self.token) - self.token
            self.token += gap / (8 if gap > 0 else 2)

    def charge(self, seconds: float) -> None:
        """A proposal, and the seconds of the assistant in it."""
        self.spent = seconds
        if self.cost is not None:
            self.balance += _INCOME * self.step() - seconds

    def credit(self, accepted: int, verified: int) -> None:
        """So many of the assistant's nodes were verified, and so many of those accepted."""
        if self.cost is not None:
            plain = self.step()
            saved = accepted * plain * (0.5 if self.trying else 1.0)
            self.balance += saved - (self.step(verified) - plain)
            self.balance = min(self.balance, AT_RISK * plain)

"""How many nodes are worth verifying now: the cost of a step against calibrated survival."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from tascade.core import EMPTY_TREE, DraftTree, FloatArray, IntArray
from tascade.draft.costs import Backoff, CostTable, Trust


class NoDrafter:
    """Never drafts."""

    name = "plain"

    def start(self, prompt: IntArray) -> None:
        """Nothing to do."""

    def propose(self, limit: int, floor: float = 0.0) -> DraftTree:
        """An empty tree."""
        return EMPTY_TREE

    def commit(self, tokens: IntArray, verified: int, path: Sequence[int]) -> None:
        """Nothing to learn."""


# Set with benchmarks/never_slower.py; none was varied by itself.
_PROBE_NODES = 8
_DOUBT = 0.25
_REST_OF_CALLS, _CALLS_IN_DOUBT = 64, 8
_DEAR = 0.5


@dataclass(slots=True)
class Budget:
    """Chooses how many nodes to verify; nothing when nothing pays, and recovers.

    A proposal is a sequence of nodes ordered best first. Verifying its first ``n`` yields
    ``1 + sum(survival[:n])`` tokens at ``cost(1 + n)`` seconds; the budget takes the ``n`` with the
    best rate, 0 included. While nothing pays, proposals themselves are asked for ever more
    rarely, down to one in ``max_pause`` steps, and kept small.

    A drafter that is dear to call, such as a model, is asked only where :meth:`worth_a_call` says
    that the tokens expected from it are worth its seconds; :meth:`called` then tells what they
    were. What a call saved, by the rate that there was without it, has to make up for its time;
    else calls become ever rarer tries.

    Attributes:
        cost: seconds of a step.
        max_nodes: most nodes in a proposal.
        max_pause: most steps between two proposals.
        margin: how much faster than plain a draft has to promise to be.
        calls_rest: whether no drafter is to be called in this step.
    """

    cost: CostTable
    max_nodes: int = 63
    max_pause: int = 32
    margin: float = 1.06
    trust: Trust = field(default_factory=Trust)
    call_trust: Trust = field(default_factory=Trust)
    _looks: Backoff = field(init=False)
    _calls: Backoff = field(init=False)
    _draft_seconds: float = 0.0
    _probing: bool = False
    _idle: int = 0
    _chosen: int = 0
    _promised: float = 0.0
    calls_rest: bool = False
    _trying: bool = False
    _call: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        self._looks, self._calls = Backoff(self.max_pause), Backoff(_REST_OF_CALLS, _CALLS_IN_DOUBT)

    def plan(self) -> tuple[int, float]:
        """(most nodes, floor) for the drafter's proposal; (0, 0.0) to skip the look-up."""
        self._call, self.calls_rest = None, self._calls.rests()
        if self._looks.rests():
            return 0, 0.0
        limit = min(self.max_nodes, self.cost.limit - 1)
        if self.trust.credit < _DOUBT:
            limit = min(limit, _PROBE_NODES)
        # What a node more costs, in steps: the rate can only rise while a node's survival is above
        # this share of all that is promised so far.
        curve = self.cost.upto(limit + 1)
        slope = float(curve[-1] - curve[0]) / max(1, limit) / float(curve[0])
        return limit, 0.7 * max(0.0, slope)

    def choose(self, survival: FloatArray) -> int:
        """How many of the nodes to verify. ``survival``: [N], best first."""
        n = min(len(survival), self.cost.limit - 1)
        self._promised, self._chosen = 0.0, 0
        if n == 0:
            self._looks.failed()
            return 0
        trying = self._call is not None and self._trying
        credit, curve = self.trust.credit, self.cost.upto(n + 1).tolist()
        promised, best, best_rate = 0.0, 0, 0.0
        for i, share in enumerate(survival[:n].tolist()):  # a dozen: sooner done than numpy begins
            promised += share
            rate = (1.0 + credit * promised) / (curve[i + 1] + self._draft_seconds)
            if rate > best_rate:
                best, best_rate, self._promised = i, rate, promised
        if best_rate * curve[0] < self.margin and not trying:
            self._promised = 0.0
            self._looks.failed()
            return 0
        self._probing = credit < _DOUBT and not trying
        if self._probing:  # one try, then wait: only a draft that comes true brings the next
            self._looks.hold()
        else:
            self._looks.paid()
        self._chosen = best + 1
        return self._chosen

    def rate(self, survival: FloatArray, more: FloatArray | float = 0.0) -> float:
        """Tokens a second from the best first part of these nodes [N], or from none.

        ``more``: seconds besides the step, for each number of nodes [1 + N] or for all.
        """
        n = min(len(survival), self.cost.limit - 1)
        tokens = 1.0 + np.concatenate(([0.0], np.cumsum(survival[:n])))
        extra = more if isinstance(more, float) else more[: 1 + n]
        return float((tokens / (self.cost.upto(1 + n) + extra)).max())

    def worth_a_call(self, expected: FloatArray, seconds: FloatArray, other: FloatArray) -> bool:
        """Whether to call a drafter, or to try it again.

        Args:
            expected: [K] survival of the nodes that it is likely to draft.
            seconds: [K] what the first 1..K of them take it.
            other: [N] survival of the nodes that are there without it.
        """
        if self.calls_rest:
            return False
        rival = self.rate(other)
        own = self.rate(expected, np.concatenate((np.zeros(1, np.float32), seconds)))
        self._trying = own <= self.margin * rival or self._calls.failures > _CALLS_IN_DOUBT
        return not self._trying or rival * float(self.cost.upto(1)[0]) < 1.001

    def called(self, seconds: float, other: FloatArray) -> None:
        """A drafter was called, and took so long; without it ``other`` [N] were there."""
        self._call = seconds, self.rate(other)

    def observe(self, nodes: int, seconds: float, draft_seconds: float) -> None:
        """Take what a step took: nodes verified, seconds of the forward, seconds of the draft."""
        if nodes == 0:
            self._idle += 1
            if self._idle % 8:  # plain steps are many and alike
                return
        if draft_seconds > 0:
            own = draft_seconds - (self._call[0] if self._call else 0.0)
            most = float(self.cost.upto(min(nodes + 1, self.cost.limit))[-1])
            self._draft_seconds += 0.05 * (min(max(own, 0.0), most) - self._draft_seconds)
        self.cost.observe(1, nodes, seconds)

    def judge(self, accepted: int) -> None:
        """Compare what the last choice promised with how many of its nodes were accepted."""
        if self._call is not None:
            self._judge_call(accepted, *self._call)
        if self._promised > 0:
            self.trust.record(self._promised, accepted)
            if self._probing and accepted >= 2:
                self._looks.paid()
        self._promised = 0.0

    def _judge_call(self, accepted: int, seconds: float, rival: float) -> None:
        curve = self.cost.upto(1 + self._chosen)
        spent, saved = float(curve[-1]) + seconds, (1.0 + accepted) / rival
        self.call_trust.record(spent, saved)
        if saved >= spent:
            self._looks.paid()
        if saved >= spent or self.call_trust.ratio >= 1.0:
            self._calls.paid()
        else:
            if seconds > _DEAR * float(curve[0]):  # a dear call has one try, a cheap one some
                self._calls.failures = max(self._calls.failures, _CALLS_IN_DOUBT)
            self._calls.failed((spent - saved) / float(curve[0]))

"""How many nodes are worth verifying now: measured step cost against calibrated survival."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from tascade.core import FloatArray

SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96)
"""Tokens in a step at which the cost is measured; between them it is interpolated."""
_BENEFIT = 0.05
_REDRAW = 8
_PROBE_NODES = 8
_DOUBT = 0.25


class CostTable:
    """Seconds of one target step by the number of tokens in it, as measured.

    Never assumed linear, nor monotone: on some machines a step over two tokens is slower than
    one over four.
    """

    def __init__(self, sizes: Sequence[float], seconds: Sequence[float]) -> None:
        self.sizes = np.asarray(sizes, np.float64)
        self.seconds = np.asarray(seconds, np.float64)
        self._curve = self._interpolate()
        self._moved = 0
        grid = np.arange(1, self.limit + 1)
        self._nearest: list[int] = np.abs(grid[:, None] - self.sizes).argmin(1).tolist()

    @classmethod
    def flat(cls, limit: int = SIZES[-1]) -> CostTable:
        """Every size costs the same: the budget then takes all nodes offered."""
        return cls((1, limit), (1.0, 1.0))

    @classmethod
    def measure(
        cls, step: Callable[[int], float], *, sizes: Sequence[int] = SIZES, seconds: float = 1.0
    ) -> CostTable:
        """Time ``step(n)`` (returns seconds) for each size, in turns, for about ``seconds``.

        A round takes each size four times and keeps the last two, which find the caches as a run of
        like steps does; the lower quartile over rounds is kept, since a busy machine only adds.
        Large sizes are left out once a step costs more than eight single-token steps.
        """
        kept = list(sizes)
        first = [step(n) for n in kept[:1]]
        for n in kept[1:]:
            first.append(step(n))
            if first[-1] > 8 * first[0] and first[-1] > 8 * step(kept[0]):
                kept = kept[: len(first)]
                break
        rounds = int(np.clip(seconds / max(4 * sum(first), 1e-9), 1, 15))
        times = np.asarray([[[step(n) for _ in range(4)] for n in kept] for _ in range(rounds)])
        return cls(kept, np.quantile(times[:, :, 2:], 0.25, axis=(0, 2)).tolist())

    @property
    def limit(self) -> int:
        """Most tokens a step may hold."""
        return int(self.sizes[-1])

    def _interpolate(self) -> FloatArray:
        grid = np.arange(1, self.limit + 1)
        return np.interp(grid, self.sizes, self.seconds).astype(np.float32)

    def upto(self, n: int) -> FloatArray:
        """Seconds of steps of 1..n tokens, [n]."""
        return self._curve[:n]

    def observe(self, n: int, seconds: float, drift: float) -> None:
        """Move the nearest measured size a little towards what a step of ``n`` tokens took.

        ``drift`` is how much slower the whole machine runs now than when the table was made.
        """
        n = min(n, self.limit)
        at = self._nearest[n - 1]
        expected = float(self._curve[n - 1])
        ratio = seconds / (expected * drift)
        if 0.3 < ratio < 3.0:  # a pause of the machine says nothing about the model
            self.seconds[at] *= 1.0 + 0.02 * (ratio - 1.0)
            self._moved += 1
            if self._moved % _REDRAW == 0:
                self._curve = self._interpolate()

    def to_json(self) -> dict[str, list[float]]:
        """As plain lists."""
        return {"sizes": self.sizes.tolist(), "seconds": self.seconds.tolist()}


@dataclass(slots=True)
class Budget:
    """Chooses how many nodes to verify; nothing when nothing pays, and recovers.

    A proposal is a sequence of nodes ordered best first. Verifying its first ``n`` yields
    ``1 + sum(survival[:n])`` tokens at ``cost(1 + n)`` seconds; the budget takes the ``n`` with the
    best rate, 0 included. While nothing pays, proposals themselves are asked for ever more
    rarely, down to one in ``max_pause`` steps, and kept small.
    """

    cost: CostTable
    max_nodes: int = 63
    max_pause: int = 32
    margin: float = 1.06
    _pause: int = 0
    _skip: int = 0
    _drift: float = 1.0
    _draft_seconds: float = 0.0
    _probing: bool = False
    _idle: int = 0
    _given: float = 0.5
    _kept: float = 0.5
    _promised: float = 0.0

    def plan(self) -> tuple[int, float]:
        """(most nodes, floor) for the drafter's proposal; (0, 0.0) to skip the look-up."""
        if self._skip > 0:
            self._skip -= 1
            return 0, 0.0
        limit = min(self.max_nodes, self.cost.limit - 1)
        if self._credit() < _DOUBT:
            limit = min(limit, _PROBE_NODES)
        return limit, 0.7 * self._slope(limit)

    def _slope(self, limit: int) -> float:
        # What a node more costs, in steps: the rate can only rise while a node's survival is above
        # this share of all that is promised so far.
        curve = self.cost.upto(limit + 1)
        return max(0.0, float(curve[-1] - curve[0]) / max(1, limit) / float(curve[0]))

    def choose(self, survival: FloatArray) -> int:
        """How many of the nodes to verify. ``survival``: [N], best first."""
        n = min(len(survival), self.cost.limit - 1)
        self._promised = 0.0
        if n == 0:
            self._rest()
            return 0
        credit, curve = self._credit(), self.cost.upto(n + 1).tolist()
        promised, best, best_rate = 0.0, 0, 0.0
        for i, share in enumerate(survival[:n].tolist()):  # a dozen: sooner done than numpy begins
            promised += share
            rate = (1.0 + credit * promised) / (curve[i + 1] + self._draft_seconds)
            if rate > best_rate:
                best, best_rate, self._promised = i, rate, promised
        if best_rate * curve[0] < self.margin:
            self._promised = 0.0
            self._rest()
            return 0
        self._probing = credit < _DOUBT
        if self._probing:  # one try, then wait: only a draft that comes true brings the next
            self._pause = self._skip = self.max_pause
        else:
            self._pause = 0
        return best + 1

    def _credit(self) -> float:
        # Ordinary luck is no reason for doubt; promises broken again and again are, and more so
        # the more often: where a few nodes cost next to nothing, a small promise is easily made.
        trust = (self._kept + _BENEFIT) / (self._given + _BENEFIT)
        return 1.0 if trust > 0.5 else max(0.1, 4.0 * trust * trust)

    def _rest(self) -> None:
        self._pause = min(self.max_pause, 2 * self._pause + 1)
        self._skip = self._pause

    def observe(self, nodes: int, seconds: float, draft_seconds: float) -> None:
        """Take what a step took: nodes verified, seconds of the forward, seconds of the draft."""
        if nodes == 0:
            self._idle += 1
            if self._idle % 8:  # plain steps are many and alike
                return
        expected = float(self.cost.upto(nodes + 1)[-1]) if nodes < self.cost.limit else 0.0
        if draft_seconds > 0:
            self._draft_seconds += 0.05 * (min(draft_seconds, expected) - self._draft_seconds)
        if expected <= 0:
            return
        ratio = seconds / expected
        if 0.2 < ratio < 5.0:
            self._drift += 0.1 * (ratio - self._drift)
        self.cost.observe(nodes + 1, seconds, self._drift)

    def judge(self, accepted: int) -> None:
        """Compare what the last choice promised with how many of its nodes were accepted."""
        if self._promised > 0:
            self._given += 0.1 * (self._promised - self._given)
            self._kept += 0.1 * (accepted - self._kept)
            if self._probing and accepted >= 2:
                self._pause = self._skip = 0
        self._promised = 0.0

"""What steps cost, which promises were kept, when to try again: what a budget rests on.

One request's budget, a batch's, and a drafter whose every call costs rest on the same three.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tascade.core import FloatArray

Curve = tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]
"""Drafted tokens and seconds, [n] each, the first for none drafted."""

SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96)
"""Tokens in a step at which the cost is measured; between them it is interpolated."""

# Of the constants here none was ever varied by itself. Together they were judged by
# benchmarks/never_slower.py (one request) and benchmarks/vllm_path.py (an engine's batches).
_KEPT_TIMES = 9
_SHRINK = 4.0
_REDRAW = 8
_DRIFT, _MOVE = 0.1, 0.02
_FORGET = 0.995
_PRIOR = np.asarray((0.9, 0.1, 0.1, 0.2))
_PRECISION = np.asarray((0.02, 0.02, 0.05, 0.02))
_PLENTY = (8.0, 64.0)
"""Requests, and drafted tokens, that weigh about as much as a step's start does."""
_RISK = 0.02
_BENEFIT = 0.05
_FEW_ROUNDS = 4
_ODD, _BELIEVED, _TRIES = 1.25, 3, 12


class CostTable:
    """Seconds of a target's step by its requests and its drafted tokens.

    For one request it is measured at the start (:meth:`measure`), and follows what steps take. For
    a batch it is learned from the engine's own steps: where a size is often met its own median
    counts, where it is rarely met a plane through all steps does. Nothing has to be linear or
    monotone: on some machines a step over two tokens is slower than one over four.

    Args:
        sizes: tokens in a measured step of one request, ascending from 1.
        seconds: what these steps took.
    """

    def __init__(self, sizes: Sequence[float] = (), seconds: Sequence[float] = ()) -> None:
        self.sizes = np.asarray(sizes, np.float64)
        self.seconds = np.array(seconds, np.float64)
        self.plain_seen = 0
        self._cells: dict[tuple[int, int], list[float]] = {}
        self._curves: dict[int, tuple[int, Curve]] = {}
        self._drift, self._unit, self._moved = 1.0, 0.0, 0
        self._moment, self._target, self._plane = np.zeros((4, 4)), np.zeros(4), _PRIOR
        if len(self.sizes):
            grid = np.arange(1, self.limit + 1)
            self._nearest: list[int] = np.abs(grid[:, None] - self.sizes).argmin(1).tolist()
            self._interpolate()

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
        like steps does (once, where that takes longer than ``seconds``); the lower quartile over
        rounds is kept, of few rounds the least, since a busy machine only adds. Sizes that seem
        disturbed all the same are timed again (:func:`_confirm`).
        Large sizes are left out once a step costs more than eight single-token steps.
        """
        kept = list(sizes)
        first = [step(n) for n in kept[:1]]
        for n in kept[1:]:
            first.append(step(n))
            if first[-1] > 8 * first[0] and first[-1] > 8 * step(kept[0]):
                kept = kept[: len(first)]
                break
        whole = sum(first)
        rounds = int(np.clip(seconds / max(4 * whole, 1e-9), 1, 15))
        taken = 4 if 4 * whole <= seconds else 1
        times = np.asarray([[[step(n) for _ in range(taken)] for n in kept] for _ in range(rounds)])
        kept_share = 0.25 if rounds >= _FEW_ROUNDS else 0.0
        found = np.quantile(times[:, :, taken // 2 :], kept_share, axis=(0, 2)).tolist()
        _confirm(step, kept, found)
        return cls(kept, found)

    def copy(self) -> CostTable:
        """A copy of the measured part: sizes and seconds, not how the machine runs just now."""
        return CostTable(self.sizes.tolist(), self.seconds.tolist())

    @property
    def limit(self) -> int:
        """Most tokens a measured step may hold."""
        return int(self.sizes[-1])

    def upto(self, n: int) -> FloatArray:
        """Seconds of one request's steps of 1..n tokens, [n], where that was measured."""
        return self._dense[:n]

    def observe(self, rows: int, drafted: int, seconds: float) -> None:
        """Take what a step over ``rows`` requests and ``drafted`` tokens of theirs took."""
        if rows == 1 and len(self.sizes):
            self._move(drafted, seconds)
            return
        batch, at = _bucket(rows, 4), 1 + _bucket(drafted, 2) if drafted else 0
        self._fit(rows, drafted, seconds)
        self.plain_seen += drafted == 0
        times = self._cells.setdefault((batch, at), [])
        times.append(seconds)
        if len(times) > _KEPT_TIMES:
            times.pop(0)
        if len(times) <= 2:  # later the curve hardly moves
            self._curves.pop(batch, None)

    def _move(self, drafted: int, seconds: float) -> None:
        """Move all measured sizes towards the machine's speed, and the nearest one by itself."""
        if drafted >= self.limit:
            return
        ratio = seconds / float(self._shape[drafted])
        if not 0.2 < ratio / self._drift < 5.0:  # a pause says nothing about the model
            return
        self._drift += _DRIFT * (ratio - self._drift)
        self.seconds[self._nearest[drafted]] *= 1.0 + _MOVE * (ratio / self._drift - 1.0)
        self._moved += 1
        if self._moved % _REDRAW == 0:
            self._interpolate()

    def curve(self, rows: int) -> Curve | None:
        """Cost by drafted tokens at this batch size; ``None`` until a plain step was seen."""
        batch = _bucket(rows, 4)
        age, drawn = self._curves.get(batch, (2 * _REDRAW, None))
        if drawn is None or age >= 2 * _REDRAW:
            if self.plain_seen == 0:
                return None
            age, drawn = 0, self._draw(rows, batch)
        self._curves[batch] = age + 1, drawn
        return drawn

    def _interpolate(self) -> None:
        grid = np.arange(1, self.limit + 1)
        self._shape = np.interp(grid, self.sizes, self.seconds).astype(np.float32)
        self._dense = self._shape * np.float32(self._drift)

    def _draw(self, rows: int, batch: int) -> Curve:
        moment, target = self._moment + np.diag(_PRECISION), self._target + _PRECISION * _PRIOR
        self._plane = np.maximum(np.linalg.solve(moment, target), 0.0) * self._unit
        sizes = np.concatenate(([0.0], 2.0 ** (np.arange(2 * (10 + batch // 4)) / 2)))
        trend = _features(rows, sizes) @ self._plane
        plain = self._cells.get((batch, 0))
        base = trend[0] if plain is None else _median(plain)
        seconds = np.maximum(base, trend - trend[0] + base)
        for at in range(1, len(sizes)):
            if times := self._cells.get((batch, at)):
                n = len(times)
                seconds[at] = (_SHRINK * seconds[at] + n * _median(times)) / (_SHRINK + n)
        return sizes, seconds

    def _fit(self, rows: int, drafted: int, seconds: float) -> None:
        # Least squares of relative errors; old steps fade, and one slow step counts for three.
        if not self._unit:
            self._unit, self._plane = seconds, _PRIOR * seconds
        x = _features(rows, np.asarray([drafted]))[0]
        y = min(seconds, 3.0 * max(float(x @ self._plane), 0.3 * self._unit)) / self._unit
        self._moment = _FORGET * self._moment + np.outer(x, x) / (y * y)
        self._target = _FORGET * self._target + x / y

    def to_json(self) -> dict[str, list[float]]:
        """What was measured, as plain lists."""
        return {"sizes": self.sizes.tolist(), "seconds": self.seconds.tolist()}

    def observed(self) -> list[dict[str, float]]:
        """What was seen of batches: rows and drafted tokens (about), seconds, times kept."""
        return [
            {
                "rows": round(2 ** (batch / 4)),
                "drafted": round(2 ** ((at - 1) / 2)) if at else 0,
                "seconds": _median(times),
                "kept": len(times),
            }
            for (batch, at), times in sorted(self._cells.items())
        ]


def _confirm(step: Callable[[int], float], sizes: Sequence[int], seconds: list[float]) -> None:
    """Time again, in place, the sizes whose time only a disturbed machine would show.

    That is one well above a larger size's, or above what the next smaller one would take for as
    many tokens. The least counts, and what comes out alike some times is believed: there are
    machines on which three tokens cost more than eight. A burst of other work of a second or two
    once made four tokens nine times as dear as they are, in a pack that was slow for good.
    """
    alike = [0] * len(seconds)
    for _ in range(_TRIES):
        tokens = [t / n for t, n in zip(seconds, sizes, strict=True)]
        most = [min(seconds[i:]) for i in range(len(sizes))]
        for i in range(1, len(sizes)):
            most[i] = min(most[i], tokens[i - 1] * sizes[i])
        odd = [i for i, t in enumerate(seconds) if t > _ODD * most[i] and alike[i] < _BELIEVED]
        if not odd:
            return
        for i in odd:
            step(sizes[i])  # the caches, as above
            again = step(sizes[i])
            alike[i] += seconds[i] < _ODD * again
            seconds[i] = min(seconds[i], again)


def _bucket(n: int, parts: int) -> int:
    return round(parts * math.log2(n))


def _median(times: list[float]) -> float:
    # Even counts take the lower of the middle two: a busy machine only adds.
    return sorted(times)[(len(times) - 1) // 2]


def _features(rows: int, drafted: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """A step's start, its requests, drafting at all, its drafted tokens: [n, 4]."""
    out = np.ones((len(drafted), 4))
    out[:, 1], out[:, 2], out[:, 3] = rows / _PLENTY[0], drafted > 0, drafted / _PLENTY[1]
    return out


@dataclass(slots=True)
class Trust:
    """What drafts promised, and what of it came true: means to which a step adds ``weight``."""

    promised: float = 0.5
    kept: float = 0.5
    weight: float = 0.1

    def record(self, promised: float, kept: float) -> None:
        """Take what one step promised and kept."""
        self.promised += self.weight * (promised - self.promised)
        self.kept += self.weight * (kept - self.kept)

    @property
    def ratio(self) -> float:
        """Kept by promised."""
        return (self.kept + _BENEFIT) / (self.promised + _BENEFIT)

    @property
    def credit(self) -> float:
        """What to count of a promise: all of it while half is kept, then less, a tenth at least.

        A ratio above a half is ordinary luck. Below it, the credit falls with its square, since
        small promises are easily made where a few nodes cost next to nothing.
        """
        return 1.0 if self.ratio > 0.5 else max(0.1, 4.0 * self.ratio * self.ratio)


@dataclass(slots=True)
class Backoff:
    """Ever rarer tries while nothing pays.

    After each failure twice as many steps are left alone, up to ``most``; and after one that lost
    ``x`` steps' time, ``50 x``, so that tries never cost more than a fiftieth of all time.
    ``patience``: failures that are let pass.
    """

    most: int = 32
    patience: int = 0
    failures: int = 0
    _pause: int = 0
    _left: int = 0

    def rests(self) -> bool:
        """Whether to leave this step alone; called once a step."""
        self._left -= 1
        return self._left >= 0

    def failed(self, lost: float = 0.0) -> None:
        """A try did not pay, and lost the time of so many steps."""
        self.failures += 1
        if self.failures > self.patience:
            self._pause = min(self.most, 2 * self._pause + 1)
            self._left = max(self._pause, math.ceil(lost / _RISK))

    def hold(self) -> None:
        """Wait as long as after many failures."""
        self._pause = self._left = self.most

    def paid(self) -> None:
        """A try paid: go on without a rest."""
        self.failures = self._pause = self._left = 0

"""What an engine's step costs by its requests and drafted tokens, learned from its own steps."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Curve = tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]
"""Drafted tokens and seconds, [n] each, the first for none drafted."""

_KEPT_TIMES = 9
_PLAIN_FIRST = 3
_PLAIN_LATER = 48
_PLAIN_EVERY = 256
_REDRAW = 16
_FORGET = 0.995
_SHRINK = 4.0
_PRIOR = (0.9, 0.1, 0.1, 0.2)
_PRECISION = (0.02, 0.02, 0.05, 0.02)
_PLENTY = (8.0, 64.0)
"""Requests, and drafted tokens, that weigh about as much as a step's start does."""
_REFIT = 8


@dataclass(slots=True)
class _Cell:
    """Times of like steps: the last few seconds, and their median."""

    seconds: list[float] = field(default_factory=list)
    median: float = 0.0

    def add(self, seconds: float) -> None:
        self.seconds.append(seconds)
        if len(self.seconds) > _KEPT_TIMES:
            self.seconds.pop(0)
        ordered = sorted(self.seconds)
        # Even counts take the lower of the middle two: a busy machine only adds.
        self.median = ordered[(len(ordered) - 1) // 2]


def _octave(n: int, parts: int) -> int:
    return round(parts * math.log2(n)) if n > 0 else -1


class _Trend:
    """The least-squares plane through all steps: a start, a request, drafting at all, a token.

    Relative errors count, old steps fade. It says what a size costs that was hardly ever tried.
    """

    def __init__(self, unit: float) -> None:
        self._unit = unit
        self._moment = np.diag(_PRECISION).astype(np.float64)
        self._target = self._moment @ np.asarray(_PRIOR)
        self._plane: tuple[float, ...] = _PRIOR
        self._waiting: list[tuple[int, int, float]] = []
        self._fits = 0

    def add(self, rows: int, extra: int, seconds: float) -> None:
        # A fit costs more than a step can spare: the first ones are made at once, later a few
        # steps share one.
        self._waiting.append((rows, extra, seconds))
        if len(self._waiting) >= min(_REFIT, 1 + self._fits):
            self._fit()

    def _fit(self) -> None:
        for rows, extra, seconds in self._waiting:
            y = min(seconds / self._unit, 3.0 * max(self.at(rows, extra) / self._unit, 0.3))
            x = np.asarray(_features(rows, extra)) / y
            self._moment = _FORGET * self._moment + np.outer(x, x)
            self._target = _FORGET * self._target + x
        ridge = 0.02 * np.diag(_PRECISION)
        prior = ridge @ np.asarray(_PRIOR)
        plane = np.linalg.solve(self._moment + ridge, self._target + prior)
        self._plane = tuple(np.maximum(plane, 0.0).tolist())
        self._waiting.clear()
        self._fits += 1

    def at(self, rows: int, extra: float) -> float:
        features = _features(rows, extra)
        return sum(a * b for a, b in zip(features, self._plane, strict=True)) * self._unit


def _features(rows: int, extra: float) -> tuple[float, ...]:
    return 1.0, rows / _PLENTY[0], float(extra > 0), extra / _PLENTY[1]


class StepCosts:
    """Seconds of an engine step, as observed.

    Where a size was seen often, its own median counts, so that nothing has to be linear or
    monotone; where it was seen rarely, the trend of all steps fills in.
    """

    def __init__(self) -> None:
        self._cells: dict[tuple[int, int], _Cell] = {}
        self._visits: dict[int, int] = {}
        self._curves: dict[int, tuple[int, Curve | None]] = {}
        self._trend: _Trend | None = None
        self._plain_seen = 0

    def observe(self, rows: int, extra: int, seconds: float) -> None:
        """Take what a step over ``rows`` requests and ``extra`` drafted tokens took."""
        if self._trend is None:
            self._trend = _Trend(seconds)
        self._trend.add(rows, extra, seconds)
        self._plain_seen += extra == 0
        cell = self._cells.setdefault((_octave(rows, 4), _octave(extra, 2)), _Cell())
        cell.add(seconds)
        if len(cell.seconds) <= 2:  # else the curve hardly moved: it is drawn again now and then
            self._curves.pop(_octave(rows, 4), None)

    def needs_plain(self, rows: int) -> bool:
        """Whether it is time to see again what a step without drafts costs at this batch size.

        The first steps of all are such, then the trend tells; a size that is often met is looked
        at by itself, and now and then again.
        """
        key = _octave(rows, 4)
        visit = self._visits.get(key, 0)
        self._visits[key] = visit + 1
        return (
            self._plain_seen < _PLAIN_FIRST
            or (visit == _PLAIN_LATER and (key, -1) not in self._cells)
            or visit % _PLAIN_EVERY == _PLAIN_EVERY - 1
        )

    def curve(self, rows: int) -> Curve | None:
        """Cost by drafted tokens at this batch size; ``None`` until a plain step was seen."""
        key = _octave(rows, 4)
        age, drawn = self._curves.get(key, (_REDRAW, None))
        if age >= _REDRAW:
            age, drawn = 0, self._draw(rows)
        self._curves[key] = (age + 1, drawn)
        return drawn

    def _draw(self, rows: int) -> Curve | None:
        key, trend = _octave(rows, 4), self._trend
        if trend is None or self._plain_seen == 0:
            return None
        plain = self._cells.get((key, -1))
        base = trend.at(rows, 0) if plain is None else plain.median
        sizes, seconds = [0.0], [base]
        offset = base - trend.at(rows, 0)
        for octave in range(2 * (10 + key // 4)):
            size = 2.0 ** (octave / 2)
            expected = max(base, trend.at(rows, size) + offset)
            cell = self._cells.get((key, octave))
            if cell is not None:
                n = len(cell.seconds)
                expected = (_SHRINK * expected + n * cell.median) / (_SHRINK + n)
            sizes.append(size)
            seconds.append(expected)
        return np.asarray(sizes), np.asarray(seconds)

    def to_json(self) -> list[dict[str, float]]:
        """Every cell: rows and drafted tokens (about), seconds, how many observations it keeps."""
        return [
            {
                "rows": round(2 ** (rows / 4)),
                "drafted": round(2 ** (extra / 2)) if extra >= 0 else 0,
                "seconds": cell.median,
                "kept": len(cell.seconds),
            }
            for (rows, extra), cell in sorted(self._cells.items())
        ]

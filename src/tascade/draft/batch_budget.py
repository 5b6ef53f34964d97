"""How many drafted tokens a whole batch should verify, from the engine's own step times."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from tascade.draft.batch_kernels import SURVIVAL_BINS

_KEPT_TIMES = 9
_TRUSTED_TIMES = 3
_PRIOR_SLOPE = 0.004
_PROBE_VISITS = (0, 2, 12, 60)
_PROBE_EVERY = 256
_MARGIN = 1.03
_BENEFIT = 0.5
_PATIENCE = 3
_REDRAW = 16
_LONGEST_DRAFT = 0.01
_MANY = 16

Curve = tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]
"""Drafted tokens and seconds, [n] each."""


@dataclass(slots=True)
class _Cell:
    """Times of like steps: their drafted tokens (a running mean) and the last few seconds."""

    extra: float = 0.0
    seconds: list[float] = field(default_factory=list)
    median: float = 0.0

    @property
    def fresh(self) -> bool:
        """Whether its median still moves with every observation."""
        return len(self.seconds) <= _TRUSTED_TIMES

    def add(self, extra: int, seconds: float) -> None:
        weight = 1.0 / min(len(self.seconds) + 1, _KEPT_TIMES)
        self.extra += weight * (extra - self.extra)
        self.seconds.append(seconds)
        if len(self.seconds) > _KEPT_TIMES:
            self.seconds.pop(0)
        ordered = sorted(self.seconds)
        middle = len(ordered) // 2
        # Even counts take the lower: a busy machine only adds.
        self.median = ordered[middle] if len(ordered) % 2 else ordered[middle - 1]


def _octave(n: int, parts: int) -> int:
    return round(parts * math.log2(n)) if n > 0 else -1


class StepCosts:
    """Seconds of an engine step by its rows and its drafted tokens, as observed.

    Nothing is assumed monotone. Where nothing was observed yet, a drafted token is taken to cost
    next to nothing, so that it is tried once and then known.
    """

    def __init__(self) -> None:
        self._cells: dict[int, dict[int, _Cell]] = {}
        self._visits: dict[int, int] = {}
        self._curves: dict[int, tuple[int, Curve | None]] = {}

    def observe(self, rows: int, extra: int, seconds: float) -> None:
        """Take what a step over ``rows`` requests and ``extra`` drafted tokens took."""
        cells = self._cells.setdefault(_octave(rows, 4), {})
        cell = cells.setdefault(_octave(extra, 2), _Cell())
        cell.add(extra, seconds)
        if cell.fresh:  # else the curve hardly moved: it is drawn again now and then
            self._curves.pop(_octave(rows, 4), None)

    def needs_plain(self, rows: int) -> bool:
        """Whether it is time to see again what a step without drafts costs at this batch size."""
        key = _octave(rows, 4)
        visit = self._visits.get(key, 0)
        self._visits[key] = visit + 1
        return visit in _PROBE_VISITS or visit % _PROBE_EVERY == _PROBE_EVERY - 1

    def curve(self, rows: int) -> Curve | None:
        """(drafted tokens, seconds) at the points known, a step without drafts first; or ``None``.

        The last point is far out, extended at the slope of the points before it.
        """
        key = _octave(rows, 4)
        age, drawn = self._curves.get(key, (_REDRAW, None))
        if age >= _REDRAW:
            age, drawn = 0, self._draw(rows)
        self._curves[key] = (age + 1, drawn)
        return drawn

    def _draw(self, rows: int) -> Curve | None:
        cells = self._cells.get(_octave(rows, 4))
        if not cells or -1 not in cells:
            return None
        points = sorted(
            (cell.extra, cell.median)
            for key, cell in cells.items()
            if key < 0 or len(cell.seconds) >= _TRUSTED_TIMES
        )
        base, last = points[0], points[-1]
        slope = _PRIOR_SLOPE * base[1] / rows
        if len(points) > 1:
            slope = max(slope, (last[1] - base[1]) / (last[0] - base[0]))
        far = 4.0 * last[0] + 1024.0
        points.append((far, last[1] + slope * (far - last[0])))
        sizes, seconds = zip(*points, strict=True)
        return np.asarray(sizes), np.asarray(seconds)

    def to_json(self) -> list[dict[str, float]]:
        """Every cell: rows (about), drafted tokens, seconds, how many observations it keeps."""
        return [
            {
                "rows": round(2 ** (key / 4)),
                "drafted": round(cell.extra, 1),
                "seconds": cell.median,
                "kept": len(cell.seconds),
            }
            for key, cells in sorted(self._cells.items())
            for _, cell in sorted(cells.items())
        ]


class BatchBudget:
    """Shares the drafted tokens worth verifying over a batch by expected gain, down to none.

    A step over ``B`` requests and ``n`` drafted tokens yields ``B + sum(survival)`` tokens in
    ``cost(B, n)`` seconds. The nodes of all requests compete: the surest are taken as long as the
    rate rises. While nothing pays, drafts are made ever more rarely, down to one step in
    ``max_pause``; they are learned from whether they are verified or not.
    """

    def __init__(self, most: int, max_pause: int = 32) -> None:
        self.most, self.max_pause = most, max_pause
        self.costs = StepCosts()
        self._draft_seconds = self._node_seconds = 0.0
        self._pause = self._skip = self._fruitless = 0
        self._given = self._kept = 1.0

    def rests(self) -> bool:
        """Whether to leave this step alone, since drafts did not pay; called once a step."""
        self._skip -= 1
        return self._skip >= 0

    def plan(self, rows: int) -> tuple[int, float]:
        """(most tokens to draft for a request, least survival worth drafting); (0, 1.0) to skip."""
        if self.costs.needs_plain(rows):
            return 0, 1.0
        curve = self.costs.curve(rows)
        if curve is None:
            return 0, 1.0
        sizes, seconds = curve
        reach = min(len(sizes) - 1, int(np.searchsorted(sizes, rows * self.most)))
        slope = max(0.0, (seconds[reach] - seconds[0]) / max(sizes[reach], 1.0))
        # A token is worth its slot while it adds to the rate; half of that leaves room for errors.
        # Where requests are many, drafting it costs as well.
        cost = slope + (self._node_seconds if rows > _MANY else 0.0)
        return self.most, float(min(0.9, 0.5 * cost * rows / seconds[0]))

    def choose(
        self, rows: int, counts: npt.NDArray[np.int64], sums: npt.NDArray[np.float64]
    ) -> int:
        """How many of the survival bins to verify, for a batch of ``rows`` requests.

        ``counts``, ``sums``: [SURVIVAL_BINS] nodes and summed survival by bin, the surest first.
        """
        curve = self.costs.curve(rows)
        if curve is None or not counts.any():
            self._rest()
            return 0
        sizes, seconds = curve
        drafted = np.cumsum(counts)
        trust = min(1.0, (self._kept + _BENEFIT) / (self._given + _BENEFIT))
        rate = (rows + trust * np.cumsum(sums)) / (
            np.interp(drafted, sizes, seconds) + self._draft_seconds
        )
        best = int(rate.argmax())
        if rate[best] * seconds[0] < _MARGIN * rows:
            self._rest()
            return 0
        self._pause = self._fruitless = 0
        return min(best + 1, SURVIVAL_BINS)

    def _rest(self) -> None:
        # An answer's end has no draft either: one step without says nothing.
        self._fruitless += 1
        if self._fruitless >= _PATIENCE:
            self._pause = min(self.max_pause, 2 * self._pause + 1)
            self._skip = self._pause

    def drafted_in(self, seconds: float, nodes: int) -> None:
        """Take what drafting ``nodes`` tokens for the batch took."""
        seconds = min(seconds, _LONGEST_DRAFT)  # the first one of a request looks around
        self._draft_seconds += 0.1 * (seconds - self._draft_seconds)
        if nodes:
            self._node_seconds += 0.1 * (seconds / nodes - self._node_seconds)

    def judge(self, promised: float, kept: int) -> None:
        """Compare the survival promised for verified drafts with how many were accepted."""
        if promised > 0:
            weight = min(0.2, 0.02 * promised)
            self._given += weight * (promised - self._given)
            self._kept += weight * (kept - self._kept)

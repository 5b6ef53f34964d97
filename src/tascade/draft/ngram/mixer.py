"""Numba kernels that mix the sources' evidence into one probability, and learn to.

Four stages, all learned online: a table maps (source, match length, vote share) to the rate at
which such a vote came true; a logistic mixer weighs the sources' log-odds, with one weight set for
each combination of sources present; a table maps the mixed log-odds to the realised rate; and,
since steps along a path are not independent, a last table maps the product of their probabilities
to the rate at which such paths came true.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tascade.draft.ngram.candidates import SOURCES
from tascade.util.jit import inner

MATCH_BUCKETS = 16
SHARE_BUCKETS = 13
WEIGHT_SETS = 1 << SOURCES
FINAL_BUCKETS = 25
_CLIP = 6.0
_CELL_LIMIT = 600.0
_PATH_LIMIT = 2000.0
_LEARNING_RATE = 0.015


@inner
def _stretch(p: float) -> Any:
    p = min(max(p, 0.0025), 0.9975)
    return np.log(p / (1.0 - p))


@inner
def _squash(x: float) -> Any:
    return 1.0 / (1.0 + np.exp(-min(max(x, -_CLIP), _CLIP)))


@inner
def share_bucket(share: float) -> int:
    """0 for a source that is silent on the token, else 1..12, finer towards certainty."""
    if share <= 0.0:
        return 0
    if share > 0.97:
        return 12
    if share > 0.93:
        return 11
    return min(1 + int(share * 10.0), 10)


@inner
def match_bucket(match: int) -> int:
    """0..15: exact up to 10 tokens, then coarser."""
    if match <= 10:
        return match
    if match < 13:
        return 11
    if match < 17:
        return 12
    if match < 24:
        return 13
    if match < 32:
        return 14
    return 15


@inner
def probability(shares: Any, match: Any, odds: Any, weights: Any, final: Any) -> Any:
    """Calibrated probability of one candidate.

    ``shares``: [3], ``match``: [3]; ``odds``: [3, 16, 13] log-odds of the cells; ``weights``:
    [8, 4]; ``final``: [25, 2].
    """
    mixed = _mix(shares, match, odds, weights)
    return _finish(mixed, final)


@inner
def _present(match: Any) -> int:
    mask = 0
    for s in range(SOURCES):
        if match[s] > 0:
            mask |= 1 << s
    return mask


@inner
def _mix(shares: Any, match: Any, odds: Any, weights: Any) -> Any:
    mask = _present(match)
    x = weights[mask, SOURCES]
    for s in range(SOURCES):
        if match[s] > 0:
            x += weights[mask, s] * odds[s, match_bucket(match[s]), share_bucket(shares[s])]
    return min(max(x, -_CLIP), _CLIP)


@inner
def _finish(mixed: float, final: Any) -> Any:
    at = (mixed + _CLIP) * (FINAL_BUCKETS - 1) / (2.0 * _CLIP)
    i = min(int(at), FINAL_BUCKETS - 2)
    f = at - i
    low = final[i, 0] / final[i, 1]
    high = final[i + 1, 0] / final[i + 1, 1]
    return low * (1.0 - f) + high * f


@inner
def learn(shares: Any, match: Any, hit: float, stages: Any) -> None:
    """Take one outcome (``hit`` 1.0 or 0.0) into all three stages, in place.

    ``stages``: cells [3, 16, 13, 2] (hits, trials), weights, final, path, and odds, which follow
    cells.
    """
    cells, weights, final, _, odds = stages
    mask = _present(match)
    mixed = _mix(shares, match, odds, weights)
    error = hit - _squash(mixed)
    at = (mixed + _CLIP) * (FINAL_BUCKETS - 1) / (2.0 * _CLIP)
    i = min(int(at), FINAL_BUCKETS - 2)
    f = at - i
    _count(final[i], hit, 1.0 - f, _CELL_LIMIT)
    _count(final[i + 1], hit, f, _CELL_LIMIT)
    weights[mask, SOURCES] += _LEARNING_RATE * error
    for s in range(SOURCES):
        if match[s] > 0:
            m, b = match_bucket(match[s]), share_bucket(shares[s])
            weights[mask, s] += _LEARNING_RATE * error * odds[s, m, b]
            _count(cells[s, m, b], hit, 1.0, _CELL_LIMIT)
            odds[s, m, b] = _stretch(cells[s, m, b, 0] / cells[s, m, b, 1])


@inner
def survive(raw: float, path: Any) -> Any:
    """Survival of a node whose path's probabilities multiply to ``raw``."""
    return _finish(min(max(_stretch(raw), -_CLIP), _CLIP), path)


@inner
def learn_path(raw: float, hit: float, path: Any) -> None:
    """Take into the last stage whether the target's path passed a node."""
    mixed = min(max(_stretch(raw), -_CLIP), _CLIP)
    at = (mixed + _CLIP) * (FINAL_BUCKETS - 1) / (2.0 * _CLIP)
    i = min(int(at), FINAL_BUCKETS - 2)
    f = at - i
    _count(path[i], hit, 1.0 - f, _PATH_LIMIT)
    _count(path[i + 1], hit, f, _PATH_LIMIT)


@inner
def _count(cell: Any, hit: float, weight: float, limit: float) -> None:
    if cell[1] >= limit:
        decay = 1.0 - weight / limit
        cell[0] *= decay
        cell[1] *= decay
    cell[0] += weight * hit
    cell[1] += weight


def log_odds(cells: Any) -> Any:
    """The log-odds of every cell's rate, [3, 16, 13], held to what the mixer can take."""
    rate = np.clip(cells[..., 0] / cells[..., 1], 0.0025, 0.9975)
    return np.log(rate / (1.0 - rate))


def fresh_state() -> tuple[Any, Any, Any, Any]:
    """Untrained stages: a vote's rate starts near its share, more so the longer the match.

    Returns (cells [3, 16, 13, 2], weights [8, 4], final [25, 2], path [25, 2]), all float64.
    """
    cells = np.empty((SOURCES, MATCH_BUCKETS, SHARE_BUCKETS, 2))
    for m in range(MATCH_BUCKETS):
        trust = min(0.25 + 0.08 * m, 0.9)
        for b in range(SHARE_BUCKETS):
            share = (
                0.005 if b == 0 else (0.05 + 0.1 * (b - 1) if b <= 10 else 0.95 + 0.03 * (b - 11))
            )
            rate = 0.005 + min(share, 0.99) * trust
            cells[:, m, b, 0], cells[:, m, b, 1] = 4.0 * rate, 4.0
    weights = np.zeros((WEIGHT_SETS, SOURCES + 1))
    for mask in range(WEIGHT_SETS):
        count = max(1, bin(mask).count("1"))
        weights[mask, :SOURCES] = (1.0, 0.7, 0.5)[count - 1]
    grid = np.linspace(-_CLIP, _CLIP, FINAL_BUCKETS)
    final = np.empty((FINAL_BUCKETS, 2))
    final[:, 1] = 16.0
    final[:, 0] = 16.0 / (1.0 + np.exp(-grid))
    return cells, weights, final, 2.0 * final

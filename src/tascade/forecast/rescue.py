"""What a trained drafter could add to these drafts at most, before one is trained.

A step of TASC-spec ends at a miss: a token of the target's that no node held. A trained drafter
earns its time where it has that token, since the drafts below it then go on in the same step. So a
miss that is rescued makes one step of two, as large as both together, and everything that a
drafter could do there is in how many misses it rescues. Nothing is drafted or decoded again: the
steps of a replay say it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tascade.core import FloatArray, Generation, StepStats

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Shares of the misses that are assumed to be rescued."""
CALL = 0.06
"""A call of the drafter once a step, in plain steps: a layer of its own and a small LM head."""
_DRAWS = 32
_RESAMPLES = 1000


@dataclass(frozen=True, slots=True)
class Rescue:
    """What drafts would gain if a share of their misses were drafted after all.

    tokens_per_step: committed tokens a target forward
    speedup: against the same drafts without it, :data:`CALL` paid in every step
    low, high: between them 95 % of what other outputs like these would give, by resampling
    """

    share: float
    tokens_per_step: float
    speedup: float
    low: float
    high: float


def misses(made: Generation) -> list[int]:
    """Places in an output of the tokens that ended a step and did not end the output."""
    first = len(made.tokens) - made.stepped_tokens
    ends = first - 1 + np.cumsum([step.committed for step in made.steps], dtype=np.int64)
    return [int(end) for end in ends[:-1]]


def gain_at(found: Sequence[Rescue], share: float) -> float:
    """The speed-up at a share between those of :data:`SHARES`, on a straight line."""
    return float(np.interp(share, [r.share for r in found], [r.speedup for r in found]))


def rescues(
    said: Sequence[Generation], curve: FloatArray, draft_seconds: float = 0.0
) -> tuple[Rescue, ...]:
    """Upper bounds by the share of misses that are rescued.

    Every rescue is at hand at once, at any depth, and costs one node. No step becomes larger than
    the drafts' own budget.

    Args:
        said: replayed outputs, with their steps.
        curve: [n] seconds of a step over 1 to n tokens; no step becomes larger than n.
        draft_seconds: of all the drafts of one output, paid with the rescues as without.
    """
    stepped = sum(made.stepped_tokens for made in said)
    before = np.asarray(
        [float(curve[[step.drafted for step in made.steps]].sum()) for made in said]
    )
    # A token of a prefill that carried no draft costs a step, as in the forecast.
    outside = np.asarray([len(made.tokens) - made.stepped_tokens for made in said])
    rest = outside * float(curve[0]) + draft_seconds
    rng = np.random.default_rng(0)
    lots = [rng.random((_DRAWS, max(0, len(made.steps) - 1))) for made in said]
    found, call = [], CALL * float(curve.min())
    for share in SHARES:
        merged = [_merged(m.steps, lot < share, curve) for m, lot in zip(said, lots, strict=True)]
        steps = np.asarray([count for count, _ in merged])
        spent = np.asarray([seconds for _, seconds in merged]) + call * steps
        ratio = ratio_of_sums(before + rest, spent + rest)
        found.append(Rescue(share, stepped / max(1.0, float(steps.sum())), *ratio))
    return tuple(found)


def ratio_of_sums(
    before: npt.NDArray[np.float64], after: npt.NDArray[np.float64]
) -> tuple[float, float, float]:
    """Of the sums; and its 95 % by resampling the outputs (percentile bootstrap)."""
    if not after.sum():
        return 1.0, 1.0, 1.0
    drawn = np.random.default_rng(0).integers(0, len(after), (_RESAMPLES, len(after)))
    low, high = np.percentile(before[drawn].sum(1) / after[drawn].sum(1), (2.5, 97.5))
    return float(before.sum() / after.sum()), float(low), float(high)


def _merged(
    steps: Sequence[StepStats], rescued: npt.NDArray[np.bool_], curve: FloatArray
) -> tuple[float, float]:
    """Steps and their seconds, on average over the draws ``rescued`` [D, S - 1]."""
    if not steps:
        return 0.0, 0.0
    nodes = np.full(len(rescued), steps[0].drafted)
    count, seconds = np.ones(len(rescued)), np.zeros(len(rescued))
    for i, step in enumerate(steps[1:]):
        both = nodes + 1 + step.drafted
        goes_on = rescued[:, i] & (both < len(curve))
        seconds += np.where(goes_on, 0.0, curve[nodes])
        count += ~goes_on
        nodes = np.where(goes_on, both, step.drafted)
    return float(count.mean()), float((seconds + curve[nodes]).mean())

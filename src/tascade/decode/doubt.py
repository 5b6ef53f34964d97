"""Whether a guess of a small head is to be doubted: what its own logits say of the full head's."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

import numpy as np
import torch

from tascade.core import FloatArray

Signs = tuple[float, float]
"""Of one guess: log of the sum of the small head's exponentials, log probability of its best."""

_MEMORY = 1024
_FEW = 16
"""Guesses whose outcome is known before signs are read: until then, none is known to be low."""
_REFIT = 32
_NEWTON = 6
_SLOPES = (-1.0, -0.5)
_LOOSE = (1.5, 1.0, 1.0)
_FAR = 6.0


@torch.inference_mode()
def signs_of(logits: torch.Tensor) -> list[Signs]:
    """The signs of each row of a small head's logits [N, n]."""
    values = logits.float()
    if values.device.type == "cpu":  # where a few hundred numbers are NumPy's
        table = values.numpy()
        most = table.max(-1, keepdims=True)
        sums = np.log(np.exp(table - most).sum(-1))
        return [(a + b, -b) for a, b in zip(most[:, 0].tolist(), sums.tolist(), strict=True)]
    sure = torch.log_softmax(values, -1).amax(-1)  # one kernel, which logsumexp is not
    pairs: list[list[float]] = torch.stack((values.amax(-1) - sure, sure), -1).tolist()
    return [(a, b) for a, b in pairs]


class Doubt:
    """Learns from checked guesses how likely one with such signs is a miss.

    A token that the small head lacks takes its share of the full head's sum along. As that sum
    varies less from place to place than a missing share does, a low sum of what is there is a sign
    of a miss; and so is an undecided head. A logistic regression over the two, in units of their
    spread among the guesses of late: maximum a posteriori, with normal priors that expect the
    profile's rate and a low sum to be a bad sign. Where signs tell nothing, slopes go to zero and
    what is left is the rate.

    Args:
        rate: misses a guess that are expected.
        memory: how many guesses to learn from, the latest ones.
    """

    def __init__(self, rate: float = 0.01, memory: int = _MEMORY) -> None:
        rate = min(max(rate, 1e-4), 0.5)
        self._prior = np.asarray((math.log(rate / (1 - rate)), *_SLOPES))
        self._seen: deque[tuple[float, float, bool]] = deque(maxlen=memory)
        self._weights: FloatArray | None = None
        self._middle = self._spread = (0.0, 0.0)
        self._new = 0

    def chance(self, signs: Signs) -> float:
        """How likely a guess with these signs is a miss, 0 to 1."""
        if self._weights is None:
            return float(1 / (1 + math.exp(-self._prior[0])))
        if not all(map(math.isfinite, signs)):
            return 1.0
        at, slope, other = self._weights.tolist()
        for value, middle, spread, weight in zip(
            signs, self._middle, self._spread, (slope, other), strict=True
        ):
            at += weight * max(-_FAR, min(_FAR, (value - middle) / spread))
        return 1 / (1 + math.exp(-max(-30.0, min(30.0, at))))

    def learn(self, signs: Sequence[Signs], missed: bool) -> None:
        """These guesses were checked, in their order; ``missed``: the last of them was wrong."""
        for i, (mass, sure) in enumerate(signs):
            if math.isfinite(mass) and math.isfinite(sure):
                self._seen.append((mass, sure, missed and i == len(signs) - 1))
                self._new += 1
        enough = len(self._seen) >= _FEW
        if enough and (missed or self._new >= _REFIT or self._weights is None):
            self._new = 0
            self._fit()

    def _fit(self) -> None:
        seen = np.asarray(self._seen, np.float64)
        middle, spread = seen[:, :2].mean(0), np.maximum(seen[:, :2].std(0), 1e-6)
        places = np.clip((seen[:, :2] - middle) / spread, -_FAR, _FAR)
        x, y = np.column_stack((np.ones(len(seen)), places)), seen[:, 2]
        firm = 1 / np.square(_LOOSE)
        weights = self._prior.copy()
        for _ in range(_NEWTON):
            p = 1 / (1 + np.exp(-np.clip(x @ weights, -30, 30)))
            slope = x.T @ (y - p) - firm * (weights - self._prior)
            bend = (x * (p * (1 - p))[:, None]).T @ x + np.diag(firm)
            # A step of Newton's may overshoot where one sign is nearly sure.
            weights = weights + np.clip(np.linalg.solve(bend, slope), -2, 2)
        self._weights = weights
        self._middle = (float(middle[0]), float(middle[1]))
        self._spread = (float(spread[0]), float(spread[1]))

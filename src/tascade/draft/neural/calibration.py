"""How far an assistant's own probabilities can be trusted."""

from __future__ import annotations

import math

import numpy as np

_BINS, _MEMORY = 13, 256.0


class Confidence:
    """How often a drafted token is right, given the probability its model gave it.

    Beta counts in bins of the probability's log-odds, from -6 to 6; each bin begins with what the
    probability says, for four trials' worth, and forgets what is older than some 256 trials.
    """

    def __init__(self) -> None:
        at = 1 / (1 + np.exp(-np.linspace(-6, 6, _BINS)))
        self._hits, self._trials = 4 * at, np.full(_BINS, 4.0)

    def of(self, probability: float) -> float:
        """Chance that a token with this probability is right, if all before it are."""
        at = self._bin(probability)
        return float(self._hits[at] / self._trials[at])

    def learn(self, probability: float, right: bool) -> None:
        """Take the outcome of one drafted token."""
        at = self._bin(probability)
        keep = min(1.0, _MEMORY / (self._trials[at] + 1))
        self._hits[at] = keep * (self._hits[at] + right)
        self._trials[at] = keep * (self._trials[at] + 1)

    @staticmethod
    def _bin(probability: float) -> int:
        p = min(max(probability, 0.0025), 0.9975)
        return round(math.log(p / (1 - p))) + _BINS // 2

"""How many tokens to guess with a small head before the full one checks them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

_SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
_FIRST = 8
_MEMORY = 512
_BETTER = 1.02
_TRIED = 6
"""Steps with the full head before the first guess."""


@dataclass(slots=True)
class Deferral:
    """Learns how often the small head misses and what steps cost, and plans by it.

    With a miss in a share m of tokens, k guesses yield E = (1 - (1 - m)^k) / m tokens: those before
    the first miss, and what is right there. They cost k small steps and one check of k states.
    Where no k yields tokens faster than steps with the full head do, there is nothing to defer;
    the first few steps are such, to know what they cost in the loop.

    Attributes:
        check: seconds that the full head takes for so many states.
        most: most guesses between checks; 0 never defers.
        rate: misses a token; at first what the profile expects.
    """

    check: Callable[[int], float]
    most: int = 32
    rate: float = 0.01
    _small: _Mean = field(default_factory=lambda: _Mean())
    _full: _Mean = field(default_factory=lambda: _Mean())
    _first: float = 0.0

    def __post_init__(self) -> None:
        self._first = self.rate

    def again(self) -> Deferral:
        """One that has learned nothing yet."""
        return type(self)(self.check, self.most, self._first)

    def plan(self, requests: int = 1) -> int:
        """Guesses before the next check; 0 to use the full head at once.

        Args:
            requests: how many are decoded together; each makes so many guesses.
        """
        if self.most == 0 or self._full.weight < _TRIED:
            return 0  # what is at stake is measured first: a check alone is not what a step saves
        if not self._small.weight:
            return min(_FIRST, self.most)
        best, best_speed = 0, _BETTER / self._full.seconds
        for k in (k for k in _SIZES if k <= self.most):
            check = self.check(k * requests) / requests
            speed = self._yield(k) / (k * self._small.seconds + check)
            if speed > best_speed:
                best, best_speed = k, speed
        return best

    def _yield(self, k: int) -> float:
        if self.rate < 1e-9:
            return float(k)
        return float((1 - (1 - self.rate) ** k) / self.rate)

    def guessed(self, tokens: int, seconds: float) -> None:
        """A step with the small head: tokens it gave, seconds."""
        self._small.add(tokens, seconds)

    def stepped(self, tokens: int, seconds: float, missing: int) -> None:
        """A step with the full head; ``missing``: how many tokens the small head has not."""
        self._full.add(tokens, seconds)
        self._learn(tokens, missing)

    def checked(self, right: int, missed: bool) -> None:
        """A check: guesses that were right up to the first miss, and whether there was one."""
        self._learn(right + missed, int(missed))

    def _learn(self, tokens: int, missing: int) -> None:
        keep = (1 - 1 / _MEMORY) ** tokens
        self.rate = min(1.0, keep * self.rate + (1 - keep) * missing / max(tokens, 1))


@dataclass(slots=True)
class _Mean:
    """Running mean over the last steps or so: seconds a token."""

    weight: float = 0.0
    seconds: float = 0.0

    def add(self, tokens: int, seconds: float) -> None:
        self.weight = min(self.weight + 1, 32)
        # Not more than four times the mean: one slow step of a busy machine is not what steps cost.
        each = seconds / max(tokens, 1)
        if self.seconds:
            each = min(each, 4 * self.seconds)
        self.seconds += (each - self.seconds) / self.weight

"""When the full head checks what a small head guessed, and when not to guess at all."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch

_SURE = 0.85
"""From 0.85 to 0.9 guesses and checks cost within 2 % of the least on the tasks of
benchmarks/doubt.py, be a check a third of a step or a whole one."""
_MEMORY = 512
"""Guesses that averages go back. Never varied, like all that follow."""
_LEARNING_RATE = 0.05
_FEW = 16
"""Guesses seen before the predictor reads their logsumexp."""
_LOOK = 24
"""Guesses before it is judged whether they pay."""
_BEGIN = 4
"""Guesses in the first round; twice as many after each that was right, half after one that was not.
A list that does not fit an answer costs a few steps, not a whole round (an answer of 19 tokens took
32 steps of a model of 135M parameters)."""
_REST = (12, 384)
"""Steps with the full head before the next look, at first and at most: each is twice the last."""
_FADED = 0.25
"""What is left of old rounds' weight in the next look."""
_WORTH = 0.01
"""Of the steps' time, what rounds must save to pay: what cannot be measured costs about as much
(the loop's own part; benchmarks/tailored_now)."""
_RECENT = 256


@torch.inference_mode()
def logsumexp_rows(logits: torch.Tensor) -> list[float]:
    """The logsumexp of each row of ``logits`` [N, n]."""
    found: list[float] = logits.float().logsumexp(-1).tolist()
    return found


class MissPredictor:
    """Learns from checked guesses how likely a guess is wrong.

    If the wanted token is missing, the small head's logsumexp tends to be low: a logistic
    regression over it, in standard deviations from its mean, learned a guess at a time.

    Args:
        rate: misses a guess that are expected at first.
    """

    def __init__(self, rate: float = 0.01) -> None:
        rate = min(max(rate, 1e-3), 0.5)
        self._bias, self._slope = math.log(rate / (1 - rate)), -1.0
        self._mean = self._variance = 0.0
        self._seen = 0

    def chance(self, logsumexp: float) -> float:
        """How likely a guess is a miss, 0 to 1."""
        if not math.isfinite(logsumexp):
            return 1.0
        total = self._bias + self._slope * self._scaled(logsumexp)
        return 1 / (1 + math.exp(-max(-30.0, min(30.0, total))))

    def learn(self, logsumexps: Sequence[float], missed: bool) -> None:
        """These guesses were checked, in order; ``missed``: the last of them was wrong."""
        for i, value in enumerate(logsumexps):
            if not math.isfinite(value):
                continue
            self._seen += 1
            share, off = max(1 / self._seen, 1 / _MEMORY), value - self._mean
            self._mean += share * off
            self._variance = (1 - share) * (self._variance + share * off * off)
            error = (missed and i == len(logsumexps) - 1) - self.chance(value)
            self._bias += _LEARNING_RATE * error
            self._slope += _LEARNING_RATE * error * self._scaled(value)

    def _scaled(self, value: float) -> float:
        if self._seen < _FEW:
            return 0.0
        off = (value - self._mean) / math.sqrt(max(self._variance, 1e-12))
        return max(-6.0, min(6.0, off))


@dataclass(slots=True)
class CheckSchedule:
    """Decides how many guesses are made before a check, and whether any.

    A round is some steps with the small head, and one check of their guesses by the full head. It
    ends when the chance that all its guesses are right falls below 0.85, or at ``max_unchecked``.
    Of the guesses, the share ``kept`` passes. Rounds pay while

        kept * (what the small head saves in their steps)
            > (1 - kept) * (their steps) + (checks) + 0.01 * (their steps)

    in seconds. What guesses cost beside the head's products is taken from what it saves. Where
    rounds do not pay, steps use the full head, and guessing is looked at again, ever more rarely.

    Attributes:
        full: seconds of the full head for so many states, measured beforehand.
        small: the same of the small head.
        max_unchecked: most guesses of a request between checks; 0 never guesses.
        miss_rate: misses a guess that are expected at first.
        predictor: which guesses may be misses.
    """

    full: Callable[[int], float]
    small: Callable[[int], float]
    max_unchecked: int = 32
    miss_rate: float = 0.01
    predictor: MissPredictor = field(init=False)
    _recent: dict[int, None] = field(default_factory=dict)
    _rounds: _Rounds = field(default_factory=lambda: _Rounds())
    _looked: int = 0
    _rest: int = 0
    _next_rest: int = _REST[0]
    _most: int = _BEGIN

    def __post_init__(self) -> None:
        self.predictor = MissPredictor(self.miss_rate)

    def fresh(self) -> CheckSchedule:
        """One that has learned nothing yet."""
        return type(self)(self.full, self.small, self.max_unchecked, self.miss_rate)

    def plan(self) -> int:
        """Most guesses before the next check; 0 to use the full head at once."""
        return 0 if self._rest else min(self._most, self.max_unchecked)

    def should_check(self, right: Sequence[float]) -> bool:
        """Whether to check now.

        Args:
            right: of each request, the chance that all its guesses so far are right.
        """
        return bool(right) and sum(right) / len(right) < _SURE

    def small_step(self, seconds: float, states: int = 1, beside: float = 0.0) -> None:
        """A step with the small head took so long and had logits for so many states.

        Args:
            seconds: of the whole step.
            states: how many there were.
            beside: seconds of keeping guesses, which plain decoding has not.
        """
        self._rounds.steps += seconds
        self._rounds.saved += self.full(states) - self.small(states) - beside

    def full_step(self) -> None:
        """A step with the full head."""
        self._rest = max(0, self._rest - 1)

    def checked(
        self,
        outcomes: Iterable[tuple[Sequence[float], bool]],
        guesses: int,
        seconds: float,
        product: float = 0.0,
    ) -> None:
        """A pass of the full head over the guesses of one request or more.

        Args:
            outcomes: of each request, the logsumexp of its guesses up to the first miss, that one
                included, and whether there was one.
            guesses: how many were checked.
            seconds: what the pass took, going back to the misses included.
            product: seconds of the logits and their argmax alone; 0 if they were not measured.
        """
        rounds, wrong = self._rounds, False
        for logsumexps, missed in outcomes:
            rounds.passed += len(logsumexps)
            wrong |= missed
            self.predictor.learn(logsumexps, missed)
        self._most = max(_BEGIN, self._most // 2) if wrong else min(2 * self._most, 1 << 20)
        rounds.guesses += guesses
        rounds.checks += seconds
        if product:
            rounds.products += product
            rounds.foreseen += self.full(guesses)
        self._looked += guesses
        hopeless = 2 * rounds.passed < rounds.guesses
        if self._looked < _LOOK and not hopeless:
            return
        if rounds.pay:
            self._next_rest = _REST[0]
            rounds.fade(max(0.0, 1 - guesses / _MEMORY))
        else:
            self._rest, self._looked = self._next_rest, 0
            self._next_rest = min(2 * self._next_rest, _REST[1])
            rounds.fade(_FADED)

    @property
    def recent_misses(self) -> list[int]:
        """The last 256 tokens that answers had and the small head had not: what the next request's
        head has from the start. That changes how soon an answer is there, never the answer.
        """
        return list(self._recent)

    def lacked(self, tokens: Iterable[int]) -> None:
        """The small head had not these tokens."""
        for token in tokens:
            self._recent.pop(token, None)
            self._recent[token] = None
        for token in list(self._recent)[:-_RECENT]:
            del self._recent[token]


@dataclass(slots=True)
class _Rounds:
    """What the latest rounds came to: guesses, those that passed with what was put right, and
    seconds: of all steps, saved in them by the small head, of checks, and of the full head's
    products in these, measured and as foreseen.
    """

    guesses: float = 0.0
    passed: float = 0.0
    steps: float = 0.0
    saved: float = 0.0
    checks: float = 0.0
    products: float = 0.0
    foreseen: float = 0.0

    @property
    def pay(self) -> bool:
        kept = self.passed / self.guesses
        # The machine may be slower now than when the heads were measured, and the full head's
        # products tell by how much: else a slow hour would speak against guessing.
        slower = self.products / self.foreseen if self.foreseen else 1.0
        saved = kept * self.saved * (slower if self.saved > 0 else 1.0)
        return saved > (1 - kept + _WORTH) * self.steps + self.checks

    def fade(self, share: float) -> None:
        """Have the next rounds count for more than these."""
        for name in self.__slots__:
            setattr(self, name, share * getattr(self, name))

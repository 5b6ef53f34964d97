"""How many tokens to guess with a small head before the full one checks them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from tascade.decode.lacking import Lacking

_SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
_FIRST = 8
_MEMORY = 512
_BETTER = 1.02
_TRIED = 6
"""Steps in a row of one kind that the next ones of the other are compared with; to begin with, as
many with the full head."""
_LOOK_BACK = 16
"""Checks before another step with the full head, whose cost may have changed."""
_LOOK_AGAIN = (24, 384)
"""Steps with the full head before a few guesses, where guessing did not pay: at first, and at most.
It is twice as many each time."""
_LOOK = 4
_HOPELESS = 0.2
"""Misses a token at which it need not be tried."""


@dataclass(slots=True)
class Deferral:
    """Learns how often the small head misses and what steps cost, and plans by it.

    With a miss in a share m of tokens, k guesses yield E = (1 - (1 - m)^k) / m tokens: those before
    the first miss, and what is right there. They cost k small steps (fewer with drafts, which give
    a step several tokens, whatever the head) and one check of k states. Where no k yields tokens
    faster than steps with the full head do, there is nothing to defer.

    What the two kinds of step cost is measured in the loop, and compared where one follows the
    other, between steps of about one size: over longer times and with the trees of drafts both
    change more than heads save. So the first few steps are with the full head, and one now and
    then; and where guessing does not pay, it is tried again, ever more rarely.

    Attributes:
        check: seconds that the full head takes for so many states.
        most: most guesses between checks; 0 never defers.
        rate: misses a token; at first what the profile expects.
        lacking: tokens that the small head lacked of late.
    """

    check: Callable[[int], float]
    most: int = 32
    rate: float = 0.01
    lacking: Lacking = field(default_factory=Lacking)
    _small: _Steps = field(default_factory=lambda: _Steps())
    _full: _Steps = field(default_factory=lambda: _Steps())
    _ratio: _Pace = field(default_factory=lambda: _Pace())
    _checks: _Pace = field(default_factory=lambda: _Pace())
    _tokens: _Pace = field(default_factory=lambda: _Pace())
    _guessing: bool = False
    _run: int = 0
    _run_before: int = 0
    _passes: int = 0
    _patience: int = _LOOK_AGAIN[0]
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
        if self.most == 0 or (not self._ratio.steps and not self._guessing and self._run < _TRIED):
            return 0  # what is at stake is measured first: a check alone is not what a step saves
        if not self._ratio.steps:  # no two steps of a size yet
            return min(_FIRST, self.most) if self._passes < 2 else 0
        best = self._best(requests)
        if not best:
            look = self.rate < _HOPELESS and not self._guessing and self._run >= self._patience
            return min(_LOOK, self.most) if look else 0
        return best if self._passes < _LOOK_BACK else 0

    @property
    def _costs(self) -> tuple[float, float]:
        """Seconds of a step, for each request: with the small head, with the full one."""
        if self._guessing:
            small = self._small.all.each
            return small, small * self._ratio.each
        full = self._full.all.each
        return full / self._ratio.each, full

    def _best(self, requests: int) -> int:
        """Guesses that yield most a second by what is known now; 0 if the full head does."""
        per = self._tokens.each
        small, full = self._costs
        best, best_speed = 0, _BETTER * per / full
        checks = self._checks.each or 1.0
        for k in (k for k in _SIZES if k <= self.most):
            steps = max(1.0, k / per)
            tokens = steps * per
            check = checks * self.check(round(tokens * requests)) / requests
            speed = self._yield(tokens) / (steps * small + check)
            if speed > best_speed:
                best, best_speed = k, speed
        return best

    def _yield(self, k: float) -> float:
        if self.rate < 1e-9:
            return k
        return float((1 - (1 - self.rate) ** k) / self.rate)

    def guessed(self, tokens: int, seconds: float, requests: int = 1, size: int = 1) -> None:
        """A step with the small head.

        Args:
            tokens: how many it gave.
            seconds: what it took.
            requests: how many it was of.
            size: places it computed, drafts among them.
        """
        self._went(guessing=True)
        self._tokens.add(requests, tokens)
        self._small.add(requests, seconds, size)
        full = self._full.of_size(size).each * requests
        if self._comparable and full:
            # A small head costs no more than a full one: else something else had the machine.
            self._ratio.add(min(seconds, 1.5 * full), full)

    def stepped(
        self, tokens: int, seconds: float, missing: int, requests: int = 1, size: int = 1
    ) -> None:
        """A step with the full head, otherwise as :meth:`guessed`; ``missing``: how many of its
        tokens the small head has not.
        """
        if self._guessing:
            self._full.by_size.clear()
            paid = self._passes >= _LOOK_BACK
            self._patience = _LOOK_AGAIN[0] if paid else min(2 * self._patience, _LOOK_AGAIN[1])
        self._went(guessing=False)
        self._tokens.add(requests, tokens)
        self._full.add(requests, seconds, size)
        small = self._small.of_size(size).each * requests
        if self._comparable and small:
            self._ratio.add(small, seconds)
        self._learn(tokens, missing)

    def checked(self, right: int, missed: bool, states: int = 0, seconds: float = 0.0) -> None:
        """A check: guesses that were right up to the first miss, and whether there was one.

        Args:
            right: guesses of one request.
            missed: whether there was a miss in that one.
            states: of all requests that were checked together, said once for them all.
            seconds: what that took, with all that follows from it.
        """
        if states:
            self._passes += 1
            self._checks.add(self.check(states), seconds)
        self._learn(right + missed, int(missed))

    @property
    def _comparable(self) -> bool:
        """Whether this step is one of the first behind many of the other kind."""
        return self._run <= _TRIED <= self._run_before

    def _went(self, guessing: bool) -> None:
        if guessing != self._guessing:
            self._run, self._run_before, self._passes = 0, self._run, 0
        self._guessing = guessing
        self._run += 1

    def _learn(self, tokens: int, missing: int) -> None:
        keep = (1 - 1 / _MEMORY) ** tokens
        self.rate = min(1.0, keep * self.rate + (1 - keep) * missing / max(tokens, 1))


@dataclass(slots=True)
class _Pace:
    """Seconds (or what else is counted) for each of something, over the last steps or so."""

    steps: float = 0.0
    amount: float = 0.0
    seconds: float = 0.0

    @property
    def each(self) -> float:
        """Seconds for one; 0 where nothing is known."""
        return self.seconds / self.amount if self.amount else 0.0

    def add(self, amount: float, seconds: float) -> None:
        """A step that came to so much."""
        # Not more than four times the mean: one slow step of a busy machine is not what steps cost.
        if self.steps:
            seconds = min(seconds, 4 * max(self.seconds / self.steps, self.each * amount))
        keep = min(1.0, 31 / self.steps) if self.steps else 1.0
        self.steps = keep * self.steps + 1
        self.amount = keep * self.amount + amount
        self.seconds = keep * self.seconds + seconds


@dataclass(slots=True)
class _Steps:
    """What one kind of step costs: all of them, and those of about one size."""

    all: _Pace = field(default_factory=_Pace)
    by_size: dict[int, _Pace] = field(default_factory=dict)

    def of_size(self, size: int) -> _Pace:
        """The pace of steps of up to 1, 2, 4, 8 ... places."""
        return self.by_size.setdefault((size - 1).bit_length(), _Pace())

    def add(self, requests: int, seconds: float, size: int) -> None:
        """A step of so many places."""
        self.all.add(requests, seconds)
        self.of_size(size).add(requests, seconds)

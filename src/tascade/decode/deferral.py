"""How many tokens to guess with a small head before the full one checks them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tascade.decode.doubt import Doubt, Signs
from tascade.decode.lacking import Lacking
from tascade.decode.pace import Pace, Steps

_FIRST = 8
_FORESEEN = 4
"""Rounds that what is expected counts for."""
_MEMORY = 512
_FOREKNOWN = 64
"""How many checked tokens the rate that is expected at first counts for."""
_BETTER = (1.005, 1.02)
"""How much more guessing must yield to go on with it, and to begin."""
_TRIED = 6
"""Steps in a row of one kind that the next ones of the other are compared with; to begin with, as
many with the full head."""
_LOOK_BACK = (4, 16)
"""Checks before another step with the full head, whose cost is not known well or may have changed:
at first, and once there were as many such steps as are remembered."""
_LOOK_AGAIN = (12, 384)
"""Steps with the full head before a few guesses, where guessing did not pay: at first, and at most.
It is twice as many each time."""
_LOOK = 24
"""Steps before it is judged whether guessing pays."""
_HOPELESS = 0.2
"""Misses a token at which it need not be tried."""
_SLOW = 2.0
"""Times the mean beyond which a comparison is taken for another process's doing."""
_GUESSES = 1024
"""Guesses whose checks it is judged by."""
_FADED = 0.25
"""What is left of their weight where guessing did not pay, when it is tried again."""


@dataclass(slots=True)
class Deferral:
    """Learns how often the small head misses and what steps cost, and decides by it.

    A round is some steps with the small head and one check of what they guessed; it yields the
    guesses before the first miss, and what is right there. How long a round is best is a question
    of optimal stopping: with the best yield in tokens a second, g, known, another step is worth its
    time s as long as the chance that all guesses so far are right is above g s for each token that
    it gives (renewal-reward; g is that of the latest rounds, which such decisions improve). That
    chance is :class:`Doubt`'s for each guess: a round ends where a guess is doubtful, and is long
    where none is. Where rounds yield less than steps with the full head do, there is nothing to
    defer.

    What the two kinds of step cost is measured in the loop, and compared where one follows the
    other, between steps of about one size: over longer times and with the trees of drafts both
    change more than heads save. So the first few steps are with the full head, and one now and
    then; and where guessing does not pay, it is tried again, ever more rarely.

    Attributes:
        check: seconds that the full head takes for so many states.
        most: most guesses between checks; 0 never defers.
        rate: misses a token; at first what the profile expects.
        lacking: tokens that the small head lacked of late.
        doubt: which guesses may be misses.
    """

    check: Callable[[int], float]
    most: int = 32
    rate: float = 0.01
    lacking: Lacking = field(default_factory=Lacking)
    doubt: Doubt = field(init=False)
    _rounds: _Rounds = field(default_factory=lambda: _Rounds())
    _small: Steps = field(default_factory=Steps)
    _full: Steps = field(default_factory=Steps)
    _ratio: Pace = field(default_factory=Pace)
    _tokens: Pace = field(default_factory=Pace)
    _guessing: bool = False
    _run: int = 0
    _run_before: int = 0
    _passes: int = 0
    _patience: int = _LOOK_AGAIN[0]
    _learned: int = _FOREKNOWN
    _pays: bool = False
    _first: float = 0.0
    _least: float = 0.0

    def __post_init__(self) -> None:
        self._first = self.rate
        self.doubt = Doubt(self.rate)

    def again(self) -> Deferral:
        """One that has learned nothing yet."""
        return type(self)(self.check, self.most, self._first)

    def plan(self, requests: int = 1) -> int:
        """Most guesses before the next check; 0 to use the full head at once.

        Args:
            requests: how many are decoded together; each makes so many guesses.
        """
        self._least = 0.0
        if self.most == 0 or (not self._ratio.steps and not self._guessing and self._run < _TRIED):
            return 0  # what is at stake is measured first: a check alone is not what a step saves
        first = min(_FIRST, self.most)
        if not self._ratio.steps:  # no two steps of a size yet
            return first if self._passes < 2 else 0
        pays = self._pays = self._judge(requests)
        if self._guessing:
            go_on = self._passes < self._look_back if pays else self._run < _LOOK
        else:
            go_on = pays or self._run >= self._patience
        if not go_on or (not pays and self.rate > _HOPELESS):
            return 0
        return self.most if pays else first

    def enough(self, sure: Sequence[float]) -> bool:
        """Whether to check now.

        Args:
            sure: of each request, the chance that all its guesses so far are right.
        """
        return bool(len(sure)) and sum(sure) / len(sure) < self._least

    @property
    def _costs(self) -> tuple[float, float]:
        """Seconds of a step, for each request: with the small head, with the full one."""
        if self._guessing:
            small = self._small.all.each
            return small, small * self._ratio.each
        full = self._full.all.each
        return full / self._ratio.each, full

    def _judge(self, requests: int) -> bool:
        """Whether guesses yield more a second than the full head; sets when there are enough."""
        per = self._tokens.each
        small, full = self._costs
        rounds = self._rounds
        if not rounds.count:
            self._foresee(per, requests)
        states = round(rounds.states / rounds.count)
        # Of steps with either head alike: drafts make their tokens vary more than heads save.
        passing = per * rounds.tokens / rounds.states
        speed = passing / (small + rounds.seconds / rounds.steps)
        more = max(1, round(per * requests))
        further = (self.check(states + more) - self.check(states)) / requests
        self._least = speed * (small + max(further, 0.0)) / max(self._yield(per), 1e-9)
        return speed > _BETTER[not self._guessing] * per / full

    def _foresee(self, per: float, requests: int) -> None:
        """What a few rounds would yield without doubt, by the rate that is expected."""
        k = float(min(_FIRST, self.most))
        states = round(k * requests)
        for _ in range(_FORESEEN):
            self._rounds.add(self.check(states), states, k * requests / per)
            self._rounds.tokens += self._yield(k) * requests

    def _yield(self, k: float) -> float:
        """Tokens of ``k`` guesses: those before the first miss, and what is right there."""
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
        self._rounds.made += requests
        full = self._full.of_size(size).each * requests
        if self._comparable and full:
            # A small head costs no more than a full one: else something else had the machine.
            self._ratio.add(min(seconds, 1.5 * full), full, _SLOW)

    def stepped(
        self, tokens: int, seconds: float, missing: int, requests: int = 1, size: int = 1
    ) -> None:
        """A step with the full head, otherwise as :meth:`guessed`; ``missing``: how many of its
        tokens the small head has not.
        """
        if self._guessing:
            self._full.by_size.clear()
            self._patience = min(2 * self._patience, _LOOK_AGAIN[1])
            if self._pays:
                self._patience = _LOOK_AGAIN[0]
            else:
                self._rounds.fade()
        self._went(guessing=False)
        self._tokens.add(requests, tokens)
        self._full.add(requests, seconds, size)
        small = self._small.of_size(size).each * requests
        if self._comparable and small:
            self._ratio.add(small, seconds, _SLOW)
        self._learn(tokens, missing)

    def checked(
        self, signs: Sequence[Signs], missed: bool, states: int = 0, seconds: float = 0.0
    ) -> None:
        """A check of one request's guesses.

        Args:
            signs: of its guesses up to the first miss, that one included.
            missed: whether there was one.
            states: of all requests that were checked together, said once for them all.
            seconds: what that took, with all that follows from it.
        """
        if states:
            self._passes += 1
            self._rounds.add(seconds, states)
        self._rounds.tokens += len(signs)
        self._learn(len(signs), int(missed))
        self.doubt.learn(signs, missed)

    @property
    def _look_back(self) -> int:
        return _LOOK_BACK[self._ratio.is_full]

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
        self._learned = min(self._learned + tokens, _MEMORY)
        keep = (1 - 1 / self._learned) ** tokens
        self.rate = min(1.0, keep * self.rate + (1 - keep) * missing / max(tokens, 1))


@dataclass(slots=True)
class _Rounds:
    """What the latest rounds of all requests came to.

    Attributes:
        count: how many.
        tokens: that passed.
        steps: of a request each: a step of three requests is three.
        states: that were checked.
        seconds: that took.
        made: steps since the last check.
    """

    count: float = 0.0
    tokens: float = 0.0
    steps: float = 0.0
    states: float = 0.0
    seconds: float = 0.0
    made: float = 0.0

    def add(self, seconds: float, states: int, steps: float | None = None) -> None:
        """A check, of the steps since the last one or of so many."""
        if self.count:  # another process may have had the machine
            most = max(1 / self.count, states / self.states) * self.seconds
            seconds = min(seconds, 4 * most)
        self._keep(max(0.0, 1 - states / _GUESSES))
        self.count += 1
        self.steps += self.made if steps is None else steps
        self.states += states
        self.seconds += seconds
        if steps is None:
            self.made = 0.0

    def fade(self) -> None:
        """Have the next rounds count for more than these."""
        self._keep(_FADED)
        self.made = 0.0

    def _keep(self, share: float) -> None:
        self.count, self.tokens = share * self.count, share * self.tokens
        self.steps *= share
        self.states, self.seconds = share * self.states, share * self.seconds

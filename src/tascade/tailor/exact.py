"""Exact decoding with a small head: guess, then check all guesses with the full head in one pass.

The final hidden states do not depend on the head, so up to the first wrong guess they are plain
decoding's. There the full head's token takes the guess's place, the cache is rewound, and it goes
on. What is given out has passed the check: tokens come some steps late, and are plain decoding's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from tascade.core import Drafter, DraftTree, Source
from tascade.decode.loop import Decoder, NodeBudget, Request
from tascade.decode.sampling import Sampler, argmax_rows, log_probability
from tascade.decode.stop import StopRule
from tascade.decode.target import Target
from tascade.decode.verify import Walk
from tascade.errors import ConfigError
from tascade.tailor.schedule import CheckSchedule, logsumexp_rows

_KEEPING = {
    "PrefixConstrainedLogitsProcessor",  # asks a function of the caller's
    "SynthIDTextWatermarkLogitsProcessor",
    "UnbatchedClassifierFreeGuidanceLogitsProcessor",
}
"""Transformers' processors that keep something from call to call, or may."""


def guesses_for(request: Request, tokenizer: Any) -> Request:
    """A request for guesses behind what ``request`` has: it ends as that will, but asks no
    caller's rule, which may count what it is asked.
    """
    quiet, done = StopRule(request.stop.params, tokenizer), request.result
    made = replace(done, tokens=[*done.tokens], sources=[*done.sources], extra={})
    made.logprobs = [*done.logprobs]
    return Request(request.prompt, request.chooser, quiet, made, request.device)


def may_repeat(chooser: Sampler) -> bool:
    """Whether scores may be asked for twice at one place, which a caller's own processor may not
    bear. Transformers' own keep nothing from call to call, but for a few.
    """
    return all(map(_bears_repeats, chooser.given))


def _bears_repeats(given: Any) -> bool:
    if isinstance(given, list):  # Transformers' list of processors, which may hold anybody's
        return all(map(_bears_repeats, given))
    kind = type(given)
    return kind.__module__.startswith("transformers.") and kind.__name__ not in _KEEPING


@torch.inference_mode()
def take_checked(
    request: Request, guess: Request, logits: torch.Tensor, best: Sequence[int] | None
) -> bool:
    """Take the guesses up to the first one that the full head would not have made, and there its
    own token. Returns whether there was one; ``Generation.extra`` counts.

    Args:
        request: what has passed so far.
        guess: the same tokens, and the guesses behind them.
        logits: [K, V] the full head's at the places of the guesses.
        best: [K] the token of the largest of each, where that is what is taken.
    """
    result, chooser = request.result, request.chooser
    first = len(result.tokens)
    passed: list[int] = []
    missed = False
    for i, token in enumerate(guess.result.tokens[first:]):
        right = best[i] if best else _choice(request, logits[i], passed)
        passed.append(right)
        missed = right != token
        if (top := chooser.params.logprobs) is not None:
            result.logprobs.append(log_probability(logits[i], right, top))
        request.done = request.stop.is_last(result.tokens + passed)
        if missed or request.done:
            break
    result.extra["checks"] += 1
    result.extra["misses"] += missed
    _take(request, guess, passed)
    if missed:
        result.sources[-1] = int(Source.TARGET)
    return missed


def take_unchecked(request: Request, guess: Request) -> None:
    """Take tokens that the full head chose itself; a caller's rule may end them early."""
    result, first = request.result, len(request.result.tokens)
    result.extra["full_steps"] += 1
    passed: list[int] = []
    for token in guess.result.tokens[first:]:
        passed.append(token)
        request.done = request.stop.is_last(result.tokens + passed)
        if request.done:
            break
    result.logprobs += guess.result.logprobs[first : first + len(passed)]
    _take(request, guess, passed)


def rewind(request: Request, guess: Request) -> None:
    """Put the guesses back to what has passed, as if the last token had been guessed right."""
    result, made = request.result, guess.result
    made.stepped_tokens -= len(made.tokens) - len(result.tokens)
    made.tokens, made.sources = list(result.tokens), list(result.sources)
    made.logprobs = list(result.logprobs)
    guess.known = min(guess.known, len(result.tokens) - 1)
    guess.done = request.done


def account(request: Request, guess: Request) -> None:
    """Put down to the request what the forwards of its guesses came to."""
    result, made = request.result, guess.result
    outside = len(made.tokens) - made.stepped_tokens
    result.steps, result.forwards = made.steps, made.forwards
    result.prefill_seconds = made.prefill_seconds
    result.stepped_tokens = len(result.tokens) - outside


def _take(request: Request, guess: Request, passed: Sequence[int]) -> None:
    result, first = request.result, len(request.result.tokens)
    result.tokens += passed
    result.sources += guess.result.sources[first : first + len(passed)]


def _choice(request: Request, logits: torch.Tensor, passed: list[int]) -> int:
    """What plain decoding takes behind ``passed``. ``logits``: [V]."""
    chooser = request.chooser
    before = request.prefix(passed) if chooser.needs_prefix else logits.new_empty(1, 0).long()
    return chooser.choose(logits, before, len(request.result.tokens) + len(passed))


Full = Callable[[torch.Tensor], torch.Tensor]
"""[K, d] final states -> [K, V] the model's logits."""


class ExactHeadDecoder(Decoder):
    """Decodes one request at a time with a small head, and gives plain decoding's tokens.

    Works with any drafter: drafts are verified with the small head and then checked like guesses.

    Args:
        target: with a small head.
        drafter, budget, tokenizer: as in :class:`Decoder`.
        full: the full head, with what the model does to its logits.
        schedule: how many guesses to make before a check.

    In ``Generation.extra``: ``checks``, ``misses`` (guesses put right) and ``full_steps`` (steps
    taken with the full head because guessing did not pay).
    """

    def __init__(
        self,
        target: Target,
        drafter: Drafter,
        full: Full,
        schedule: CheckSchedule,
        budget: NodeBudget | None = None,
        tokenizer: Any = None,
    ) -> None:
        super().__init__(target, drafter, budget, tokenizer)
        if target.head is None:
            raise ConfigError("there is nothing to defer", got="no head", wanted="a small head")
        self.head, self.full, self.schedule = target.head, full, schedule
        self._states: list[torch.Tensor] = []
        self._logsumexps: list[float] = []
        self._right, self._ready, self._kept = 1.0, False, 0.0

    def begin(self, request: Request) -> None:
        """Forget the request before. Its small head is made ready when guessing begins."""
        self._without_head(super().begin, request)
        self._behind(request)
        request.result.extra |= {"misses": 0, "checks": 0, "full_steps": 0}

    def go_on(self, request: Request) -> None:
        """Take up a request that others have come between: nothing is guessed between rounds."""
        self._without_head(super().go_on, request)
        self._behind(request)

    def _advance(self, request: Request) -> list[int]:
        """One round: guesses up to a check, and the check. Returns the tokens that passed.

        Or, where guessing does not pay, one step with the full head.
        """
        if not may_repeat(request.chooser) or not (wanted := self.schedule.plan()):
            return self._step_full(request)
        start, first = time.perf_counter(), len(request.result.tokens)
        guess = request.guess or self._catch_up(request)
        self._kept += time.perf_counter() - start
        while not guess.done and len(guess.result.tokens) - first < wanted:
            self._guess_once(guess)
            if self.schedule.should_check([self._right]):
                break
        self._check(request, guess)
        account(request, guess)
        return request.result.tokens[first:]

    def _step_full(self, request: Request) -> list[int]:
        """Plain decoding's step."""
        tokens: list[int] = self._without_head(super()._advance, request)
        request.result.extra["full_steps"] += 1
        request.guess = None
        self.schedule.full_step()
        return tokens

    def _without_head(self, call: Callable[[Request], Any], request: Request) -> Any:
        self.target.head = None
        try:
            return call(request)
        finally:
            self.target.head = self.head  # others may decode with this target

    def _behind(self, request: Request) -> None:
        request.guess, self._ready = None, False
        self._forget_guesses()

    def _catch_up(self, request: Request) -> Request:
        """Have the small head know the request as far as it has come, and a twin for guesses."""
        if not self._ready:
            self.head.begin(request.prompt)
            self.head.extend(self.schedule.recent_misses)
            self._ready = True
        self._take_in(request.result.tokens)
        request.guess = guesses_for(request, self.tokenizer)
        return request.guess

    def _guess_once(self, guess: Request) -> None:
        start, first = time.perf_counter(), not guess.result.tokens
        super()._advance(guess)
        kept, self._kept = self._kept, 0.0
        if not first:  # a prefill is not what a step costs
            seconds = time.perf_counter() - start
            self.schedule.small_step(seconds, 1 + guess.result.steps[-1].drafted, kept)

    def _take_in(self, tokens: Sequence[int]) -> None:
        """Give the head those of these tokens that it lacks, and remember them."""
        if missing := [token for token in tokens if token not in self.head]:
            self.head.extend(missing)
            self.schedule.lacked(missing)

    def commit(self, request: Request, base: int, tree: DraftTree, outcome: Walk) -> None:
        """Keep what was accepted, and the states that its tokens were chosen from."""
        if self.target.head is not None:  # what the full head has chosen needs no check
            start = time.perf_counter()
            rows: Any = [0, *(node + 1 for node in outcome.path)][: len(outcome.tokens)]
            rows = rows if len(rows) > 1 else slice(0, 1)  # which is much quicker
            self._states.append(self.target.states[rows])
            for logsumexp in logsumexp_rows(self.target.scores[rows]):
                self._logsumexps.append(logsumexp)
                self._right *= 1 - self.schedule.predictor.chance(logsumexp)
            self._kept += time.perf_counter() - start
        super().commit(request, base, tree, outcome)

    @torch.inference_mode()
    def _check(self, request: Request, guess: Request) -> None:
        """Compare the guesses with the full head's choices; rewind to the first wrong one."""
        start, first = time.perf_counter(), len(request.result.tokens)
        states, logsumexps = torch.cat(self._states), self._logsumexps
        self._forget_guesses()
        logits = self.full(states)
        best = argmax_rows(logits) if request.chooser.is_argmax else None
        made = time.perf_counter() - start
        missed = take_checked(request, guess, logits, best)
        if missed:
            self._rewind(request, guess)
        outcome = logsumexps[: len(request.result.tokens) - first], missed
        seconds = time.perf_counter() - start
        self.schedule.checked([outcome], len(states), seconds, made if best else 0.0)

    def _forget_guesses(self) -> None:
        self._states, self._logsumexps, self._right = [], [], 1.0

    def _rewind(self, request: Request, guess: Request) -> None:
        rewind(request, guess)
        tokens = request.result.tokens
        self.target.keep(len(request.prompt) + len(tokens) - 1, ())
        self._take_in(tokens[-1:])
        self.retell(request)

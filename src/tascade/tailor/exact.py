"""Exact decoding with a small head: guess, then check all guesses with the full head in one pass.

The final hidden states do not depend on the head, so up to the first wrong guess they are plain
decoding's. There the full head's token takes the guess's place, the cache is rewound, and it goes
on. What is given out has passed the check: tokens come some steps late, and are plain decoding's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from tascade.core import Drafter, DraftTree
from tascade.decode.loop import Decoder, NodeBudget, Request
from tascade.decode.target import Target
from tascade.decode.verify import Walk
from tascade.errors import ConfigError
from tascade.tailor.head_check import (
    account,
    guesses_for,
    may_repeat,
    rewind,
    take_checked,
    take_unchecked,
)
from tascade.tailor.schedule import CheckSchedule, logsumexp_rows

Full = Callable[[torch.Tensor], torch.Tensor]
"""[K, d] final states -> [K, V] the model's logits."""


class DeferredDecoder(Decoder):
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
        self._right = 1.0

    def begin(self, request: Request) -> None:
        """Forget the request before."""
        super().begin(request)
        self.head.extend(self.schedule.recent_misses)
        request.guess = guesses_for(request, self.tokenizer)
        self._forget_guesses()
        request.result.extra |= {"misses": 0, "checks": 0, "full_steps": 0}

    def go_on(self, request: Request) -> None:
        """Take up a request that others have come between: nothing is guessed between rounds."""
        super().go_on(request)
        self.head.extend([*self.schedule.recent_misses, *request.result.tokens])
        self._forget_guesses()

    def _advance(self, request: Request) -> list[int]:
        """One round: guesses up to a check, and the check. Returns the tokens that passed."""
        guess = request.guess
        assert guess is not None
        wanted = self.schedule.plan() if may_repeat(request.chooser) else 0
        first = len(request.result.tokens)
        self.target.head = self.head if wanted else None
        try:
            while not guess.done and len(guess.result.tokens) - first < max(wanted, 1):
                self._guess_once(guess, wanted > 0)
                if wanted and self.schedule.should_check([self._right]):
                    break
        finally:
            self.target.head = self.head  # others may decode with this target
        if wanted:
            self._check(request, guess)
        else:
            take_unchecked(request, guess)
        account(request, guess)
        return request.result.tokens[first:]

    def _guess_once(self, guess: Request, small: bool) -> None:
        start, before = time.perf_counter(), len(guess.result.tokens)
        super()._advance(guess)
        new = guess.result.tokens[before:]
        if not before:
            return  # a prefill is not what a step costs
        seconds = time.perf_counter() - start
        if small:
            self.schedule.small_step(seconds, 1 + guess.result.steps[-1].drafted)
        else:
            self.schedule.full_step()
            self._take_in(new)

    def _take_in(self, tokens: Sequence[int]) -> None:
        """Give the head those of these tokens that it lacks, and remember them."""
        if missing := [token for token in tokens if token not in self.head]:
            self.head.extend(missing)
            self.schedule.lacked(missing)

    def commit(self, request: Request, base: int, tree: DraftTree, outcome: Walk) -> None:
        """Keep what was accepted, and the states that its tokens were chosen from."""
        if self.target.head is not None:  # what the full head has chosen needs no check
            rows: Any = [0, *(node + 1 for node in outcome.path)][: len(outcome.tokens)]
            rows = rows if len(rows) > 1 else slice(0, 1)  # which is much quicker
            self._states.append(self.target.states[rows])
            for logsumexp in logsumexp_rows(self.target.scores[rows]):
                self._logsumexps.append(logsumexp)
                self._right *= 1 - self.schedule.predictor.chance(logsumexp)
        super().commit(request, base, tree, outcome)

    @torch.inference_mode()
    def _check(self, request: Request, guess: Request) -> None:
        """Compare the guesses with the full head's choices; rewind to the first wrong one."""
        start, first = time.perf_counter(), len(request.result.tokens)
        states, logsumexps = torch.cat(self._states), self._logsumexps
        self._forget_guesses()
        missed = take_checked(request, guess, self.full(states))
        passed = time.perf_counter()
        if missed:
            self._rewind(request, guess)
        outcome = logsumexps[: len(request.result.tokens) - first], missed
        rewinding = time.perf_counter() - passed
        self.schedule.checked([outcome], len(states), passed - start, rewinding)

    def _forget_guesses(self) -> None:
        self._states, self._logsumexps, self._right = [], [], 1.0

    def _rewind(self, request: Request, guess: Request) -> None:
        rewind(request, guess)
        tokens = request.result.tokens
        self.target.keep(len(request.prompt) + len(tokens) - 1, ())
        self._take_in(tokens[-1:])
        self.retell(request)

"""Decoding several requests together: each answer is what it would be alone."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from tascade.core import Generation, IntArray, Source, StepStats
from tascade.decode.batch_target import BatchTarget
from tascade.decode.check import (
    account,
    guesses_for,
    may_repeat,
    rewind,
    take_checked,
    take_unchecked,
)
from tascade.decode.deferred import Full
from tascade.decode.heads import SharedHead
from tascade.decode.loop import Request
from tascade.decode.sample import Chooser, Processor, SamplingParams, argmax_rows, log_probability
from tascade.decode.schedule import CheckSchedule, logsumexp_rows
from tascade.decode.stop import StopRule
from tascade.errors import ConfigError, TascadeError

MOST_STATES = 128
"""States that a pass of the full head takes at most: their logits are V numbers each."""


@dataclass(slots=True)
class _Row:
    """A request in the batch. ``guess`` is ``request`` itself where nothing is guessed; ``right``
    is the chance that all its guesses since the last check are right.
    """

    index: int
    request: Request
    guess: Request
    ticket: int
    states: list[torch.Tensor] = field(default_factory=list)
    logsumexps: list[float] = field(default_factory=list)
    right: float = 1.0
    given: int = 0

    def forget_guesses(self) -> None:
        """They have been checked."""
        self.states, self.logsumexps, self.right = [], [], 1.0

    @property
    def pending(self) -> int:
        """Guesses that have not been checked."""
        return len(self.guess.result.tokens) - len(self.request.result.tokens)


class BatchDecoder:
    """Decodes requests together, new ones as others end; no drafts.

    Each is decoded with its own options, noise and part of the head: its answer is the one it
    would have alone, up to the rounding of a product of another shape.

    Args:
        target: the model.
        head: a small head; ``None`` for the model's own.
        full: the model's own head, where the small head's guesses are to be checked (exact).
        schedule: how many guesses to make before a check; with ``full``.
        tokenizer: for texts and stop strings.
        size: most requests at once.

    Raises:
        ConfigError: ``size`` below 1, or a check without guesses.
    """

    def __init__(
        self,
        target: BatchTarget,
        head: SharedHead | None = None,
        *,
        full: Full | None = None,
        schedule: CheckSchedule | None = None,
        tokenizer: Any = None,
        size: int = 8,
    ) -> None:
        if size < 1:
            raise ConfigError("a batch has requests", got=size, wanted="1 or more", where="size")
        if full is not None and (head is None or schedule is None):
            raise ConfigError("nothing to check", got="no small head or schedule", wanted="both")
        self.target, self.head, self.full, self.tokenizer = target, head, full, tokenizer
        self.schedule = schedule or CheckSchedule(float, float, max_unchecked=0)
        self.size = 1 if target.alone else size
        self._busy, self._lock = False, threading.RLock()

    def generate(
        self,
        prompts: Sequence[Sequence[int] | IntArray],
        params: SamplingParams | Sequence[SamplingParams],
        processors: Sequence[Processor] = (),
    ) -> list[Generation]:
        """Decode them all; other threads wait. Arguments and errors as for :meth:`stream`."""
        with self._lock, closing(self.stream(prompts, params, processors)) as stream:
            out = {i: made for i, _, made in stream}
        return [out[i] for i in range(len(prompts))]

    def stream(
        self,
        prompts: Sequence[Sequence[int] | IntArray],
        params: SamplingParams | Sequence[SamplingParams],
        processors: Sequence[Processor] = (),
    ) -> Generator[tuple[int, list[int], Generation]]:
        """Decode them all, a round at a time.

        Args:
            prompts: token ids, [T] each.
            params: for all, or for each.
            processors: logits processors; each is shown one request at a time.

        Yields:
            (which prompt, its new ids, its result so far), of requests that have new ids.

        Raises:
            ConfigError: an empty prompt, or not as many ``params`` as prompts.
            TascadeError: another batch is being decoded.
        """
        waiting = deque(enumerate(self._requests(prompts, params, processors)))
        if self._busy:
            raise TascadeError("this decoder is busy", fix="finish or close the other stream first")
        rows: list[_Row] = []
        self._busy = True
        try:
            while waiting or rows:
                free = self.size - len(rows)
                coming = [waiting.popleft() for _ in range(min(len(waiting), free))]
                yield from self._round(rows, coming)
                for at in reversed(range(len(rows))):
                    if rows[at].request.done:
                        self._remove(rows, at)
        finally:
            for row in rows:
                self._leave(row)
            self.target.cache.clear()
            self._busy = False

    def _requests(
        self,
        prompts: Sequence[Sequence[int] | IntArray],
        params: SamplingParams | Sequence[SamplingParams],
        processors: Sequence[Processor],
    ) -> list[Request]:
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(prompts):
            raise ConfigError("params do not fit", got=len(each), wanted=f"{len(prompts)}, or one")
        return [
            Request.new(
                prompt,
                Chooser(own, processors),
                StopRule(own, self.tokenizer),
                self.target.device,
                f"prompt {i}",
            )
            for i, (prompt, own) in enumerate(zip(prompts, each, strict=True))
        ]

    # --- a round -------------------------------------------------------------------------------

    @torch.inference_mode()
    def _round(
        self, rows: list[_Row], coming: Sequence[tuple[int, Request]]
    ) -> list[tuple[int, list[int], Generation]]:
        """Read the prompts of those who come; then a token of each row, or guesses and a check."""
        repeatable = all(may_repeat(r.request.chooser) for r in rows)
        repeatable &= all(may_repeat(request.chooser) for _, request in coming)
        wanted = self.schedule.plan() if self.full and repeatable else 0
        small = self.head is not None and (self.full is None or wanted > 0)
        for index, request in coming:
            self._enter(rows, index, request, small)
        for _ in range(max(wanted, 1)):
            live = [row.right for row in rows if not row.guess.done]
            if not live or (wanted and self.schedule.should_check(live)):
                break
            self._step(rows, small)
        if self.full is not None:
            self._settle(rows, checking=wanted > 0)
        return [told for row in rows if (told := self._told(row))]

    def _enter(self, rows: list[_Row], index: int, request: Request, small: bool) -> None:
        """Add a row: read its prompt, which gives its first token."""
        request.started = time.perf_counter()
        guess = request
        if self.full is not None:
            guess = guesses_for(request, self.tokenizer)
            request.result.extra |= {"misses": 0, "checks": 0, "full_steps": 0}
        ticket = -1 if self.head is None else self.head.join(self._foreseen(request))
        rows.append(_Row(index, request, guess, ticket))
        self._forward(rows[-1:], [request.prompt.tolist()], small, len(rows) - 1)
        guess.result.prefill_seconds = time.perf_counter() - request.started

    def _foreseen(self, request: Request) -> IntArray:
        """The tokens that a request's part of the head has from the start, beside the list's."""
        if self.full is None:
            return request.prompt
        return np.concatenate((request.prompt, np.asarray(self.schedule.recent_misses, np.int32)))

    def _step(self, rows: Sequence[_Row], small: bool) -> None:
        start = time.perf_counter()
        live = [row for row in rows if not row.guess.done]
        tokens = [row.guess.result.tokens[-1:] for row in rows]
        self._forward(rows, tokens, small, 0)
        seconds = time.perf_counter() - start
        for row in live:
            made = row.guess.result
            made.steps.append(StepStats(0, 0, 1, 0.0, seconds / len(rows)))
            made.forwards, made.stepped_tokens = made.forwards + 1, made.stepped_tokens + 1
        if self.full is not None and small:
            self.schedule.small_step(seconds, len(rows))
        elif self.full is not None:
            self.schedule.full_step()

    def _forward(
        self, rows: Sequence[_Row], tokens: Sequence[Sequence[int]], small: bool, first: int
    ) -> None:
        """One forward, and each row's next token; rows that are done are only carried along."""
        head = self.head if small and self.head is not None else self.target.whole
        logits, states = self.target.forward(tokens, head, first)
        at = [i for i, row in enumerate(rows) if not row.guess.done]
        live = [rows[i] for i in at]
        if len(at) < len(rows):
            logits, states = logits[at], states[at]
            for i in set(range(len(rows))) - set(at):
                self.target.cache.lengths[first + i] -= 1  # so that no place passes the last one
        guessing = small and self.full is not None
        logsumexps = logsumexp_rows(logits) if guessing else []
        for i, (row, token) in enumerate(zip(live, self._choose(live, logits, small), strict=True)):
            made = row.guess.result
            made.tokens.append(token)
            made.sources.append(int(Source.TARGET))
            if guessing:
                row.states.append(states[i : i + 1])
                row.logsumexps.append(logsumexps[i])
                row.right *= 1 - self.schedule.predictor.chance(logsumexps[i])
            row.guess.done = row.guess.stop.is_last(made.tokens)

    def _choose(self, rows: Sequence[_Row], logits: torch.Tensor, small: bool) -> list[int]:
        """What decoding alone takes behind each row. ``logits``: [N, n]."""
        head = self.head if small else None
        tickets = [row.ticket for row in rows]
        plain = [self._is_plain(row, small) for row in rows]
        best: list[int] = []
        if any(plain):
            best = argmax_rows(logits) if head is None else head.best(logits, tickets)
        out = []
        for i, row in enumerate(rows):
            if plain[i]:
                out.append(best[i])
                continue
            wide = logits[i] if head is None else head.spread(logits[i : i + 1], [row.ticket])[0]
            out.append(self._draw(row, wide, small))
        return out

    def _is_plain(self, row: _Row, small: bool) -> bool:
        chooser = row.request.chooser
        checked = small and self.full is not None
        return chooser.is_argmax and (chooser.params.logprobs is None or checked)

    def _draw(self, row: _Row, logits: torch.Tensor, small: bool) -> int:
        """One row's choice from its own logits [V]."""
        chooser, made = row.request.chooser, row.guess.result
        before = row.guess.prefix([]) if chooser.needs_prefix else logits.new_empty(1, 0).long()
        token = chooser.choose(logits, before, len(made.tokens))
        if (top := chooser.params.logprobs) is not None and not (small and self.full is not None):
            made.logprobs.append(log_probability(logits, token, top))
        return token

    # --- checks --------------------------------------------------------------------------------

    def _settle(self, rows: Sequence[_Row], checking: bool) -> None:
        """Give out what was guessed, if it is right, or said by the full head."""
        if checking:
            for some in _shares(rows):
                self._check(some)
        for row in rows:
            if not checking:
                self._take(row)
            account(row.request, row.guess)
        lengths = self.target.cache.lengths
        for at, row in enumerate(rows):
            lengths[at] = len(row.request.prompt) + len(row.request.result.tokens) - 1

    def _check(self, rows: Sequence[_Row]) -> None:
        assert self.full is not None
        assert self.head is not None
        start = time.perf_counter()
        states = torch.cat([state for row in rows for state in row.states])
        parts: Any = torch.split(self.full(states), [len(row.states) for row in rows])
        outcomes = []
        for row, part in zip(rows, parts, strict=True):
            before = len(row.request.result.tokens)
            missed = take_checked(row.request, row.guess, part)
            passed = row.request.result.tokens[before:]
            outcomes.append((row.logsumexps[: len(passed)], missed))
            row.forget_guesses()
            if missed:
                rewind(row.request, row.guess)
                self._take_in(row, passed[-1:])
        self.schedule.checked(outcomes, len(states), time.perf_counter() - start)

    def _take(self, row: _Row) -> None:
        before = len(row.request.result.tokens)
        take_unchecked(row.request, row.guess)
        self._take_in(row, row.request.result.tokens[before:])

    def _take_in(self, row: _Row, tokens: Sequence[int]) -> None:
        """Give a row's part of the head those of these tokens that it lacks, and remember them."""
        if self.head is None:
            return
        if lacking := [token for token in tokens if not self.head.has(row.ticket, token)]:
            self.head.extend(row.ticket, lacking)
            self.schedule.lacked(lacking)

    # --- rows ----------------------------------------------------------------------------------

    def _told(self, row: _Row) -> tuple[int, list[int], Generation] | None:
        """What a row has to give out; its text where it has ended."""
        request, result = row.request, row.request.result
        new, row.given = result.tokens[row.given :], len(result.tokens)
        if request.done:
            result.finish_reason = request.stop.reason
            result.text = request.stop.text(result.tokens)
            result.seconds = time.perf_counter() - request.started
        return (row.index, new, result) if new else None

    def _remove(self, rows: list[_Row], at: int) -> None:
        """Take a row out; the last one takes its place, in the cache as well."""
        gone, rows[at] = rows[at], rows[-1]
        rows.pop()
        self.target.cache.remove(at)
        self._leave(gone)

    def _leave(self, row: _Row) -> None:
        if self.head is not None:
            self.head.leave(row.ticket)


def _shares(rows: Sequence[_Row]) -> Iterator[list[_Row]]:
    """Rows whose guesses one pass of the full head takes."""
    share: list[_Row] = []
    states = 0
    for row in rows:
        if share and states + row.pending > MOST_STATES:
            yield share
            share, states = [], 0
        share.append(row)
        states += row.pending
    if share:
        yield share

"""Several requests together over a small head whose guesses the full head checks."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from tascade.core import Generation
from tascade.decode.batch import BatchDecoder, Row
from tascade.decode.batch_target import BatchTarget
from tascade.decode.lm_head import SharedHead
from tascade.decode.loop import Request
from tascade.decode.sampling import argmax_rows
from tascade.tailor.exact import (
    Full,
    account,
    guesses_for,
    may_repeat,
    rewind,
    take_checked,
    take_unchecked,
)
from tascade.tailor.schedule import CheckSchedule, logsumexp_rows

MOST_STATES = 128
"""States that a pass of the full head takes at most: their logits are V numbers each."""


@dataclass(slots=True)
class _Row(Row):
    """Its ``running`` request has the guesses behind ``request``'s tokens. ``right`` is the chance
    that all its guesses since the last check are.
    """

    states: list[torch.Tensor] = field(default_factory=list)
    logsumexps: list[float] = field(default_factory=list)
    right: float = 1.0

    def forget_guesses(self) -> None:
        """They have been checked."""
        self.states, self.logsumexps, self.right = [], [], 1.0

    @property
    def pending(self) -> int:
        """Guesses that have not been checked."""
        return len(self.running.result.tokens) - len(self.request.result.tokens)


class ExactBatchDecoder(BatchDecoder):
    """As :class:`BatchDecoder`, and each answer is plain decoding's.

    All requests guess, and one pass of the full head checks the guesses of all.

    Args:
        target, tokenizer, size: as there.
        head: a small head.
        full: the model's own head, with what the model does to its logits.
        schedule: how many guesses to make before a check.
    """

    head: SharedHead

    def __init__(
        self,
        target: BatchTarget,
        head: SharedHead,
        full: Full,
        schedule: CheckSchedule,
        *,
        tokenizer: Any = None,
        size: int = 8,
    ) -> None:
        super().__init__(target, head, tokenizer=tokenizer, size=size)
        self.full, self.schedule, self._beside = full, schedule, 0.0

    @torch.inference_mode()
    def _round(
        self, rows: list[Any], coming: Sequence[tuple[int, Request]]
    ) -> list[tuple[int, list[int], Generation]]:
        """Read the prompts of those who come; then guesses and a check, or a token of each row."""
        requests = [row.request for row in rows] + [request for _, request in coming]
        repeatable = all(may_repeat(request.chooser) for request in requests)
        wanted = self.schedule.plan() if repeatable else 0
        head = self.head if wanted else None
        for index, request in coming:
            self._enter(rows, index, request, head)
        if not wanted and self._step(rows, None):
            self.schedule.full_step()
        for _ in range(wanted):
            live = [row.right for row in rows if not row.running.done]
            if not live or self.schedule.should_check(live):
                break
            self._beside = 0.0
            seconds = self._step(rows, head)
            self.schedule.small_step(seconds, len(rows), self._beside)
        self._settle(rows, checking=wanted > 0)
        return [told for row in rows if (told := self._told(row))]

    def _settle(self, rows: Sequence[_Row], checking: bool) -> None:
        """Give out what was guessed, if it is right, or said by the full head."""
        for some in _shares(rows) if checking else ():
            self._check(some)
        for at, row in enumerate(rows):
            if not checking:
                self._take(row)
            account(row.request, row.running)
            said = len(row.request.prompt) + len(row.request.result.tokens)
            self.target.cache.lengths[at] = said - 1

    def _row(self, index: int, request: Request) -> Row:
        request.result.extra |= {"misses": 0, "checks": 0, "full_steps": 0}
        recent = np.asarray(self.schedule.recent_misses, np.int32)
        request_id = self.head.add_request(np.concatenate((request.prompt, recent)))
        return _Row(index, request, guesses_for(request, self.tokenizer), request_id)

    def _is_final(self, head: SharedHead | None) -> bool:
        return head is None

    def _keep(
        self,
        rows: Sequence[Any],
        logits: torch.Tensor,
        states: torch.Tensor,
        head: SharedHead | None,
    ) -> None:
        if head is None:
            return
        start = time.perf_counter()
        for i, (row, logsumexp) in enumerate(zip(rows, logsumexp_rows(logits), strict=True)):
            row.states.append(states[i : i + 1])
            row.logsumexps.append(logsumexp)
            row.right *= 1 - self.schedule.predictor.chance(logsumexp)
        self._beside += time.perf_counter() - start

    def _check(self, rows: Sequence[_Row]) -> None:
        """Give out what was guessed up to a miss, and what is right there."""
        start = time.perf_counter()
        states = torch.cat([state for row in rows for state in row.states])
        logits = self.full(states)
        best = argmax_rows(logits)
        made = time.perf_counter() - start
        parts: Any = torch.split(logits, [len(row.states) for row in rows])
        outcomes = []
        for row, part in zip(rows, parts, strict=True):
            before = len(row.request.result.tokens)
            right, best = best[: len(part)], best[len(part) :]
            chosen = right if row.request.chooser.is_argmax else None
            missed = take_checked(row.request, row.running, part, chosen)
            passed = row.request.result.tokens[before:]
            outcomes.append((row.logsumexps[: len(passed)], missed))
            row.forget_guesses()
            if missed:
                rewind(row.request, row.running)
                self._take_in(row, passed[-1:])
        self.schedule.checked(outcomes, len(states), time.perf_counter() - start, made)

    def _take(self, row: Row) -> None:
        before = len(row.request.result.tokens)
        take_unchecked(row.request, row.running)
        self._take_in(row, row.request.result.tokens[before:])

    def _take_in(self, row: Row, tokens: Sequence[int]) -> None:
        """Give a row's part of the head those of these tokens that it lacks, and remember them."""
        if lacking := [token for token in tokens if not self.head.has(row.request_id, token)]:
            self.head.extend(row.request_id, lacking)
            self.schedule.lacked(lacking)


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

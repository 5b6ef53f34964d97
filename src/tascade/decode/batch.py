"""Decoding several requests together: each answer is what it would be alone."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tascade.core import Generation, IntArray, Source, StepStats
from tascade.decode.batch_target import BatchTarget
from tascade.decode.lm_head import SharedHead
from tascade.decode.loop import Request
from tascade.decode.sampling import Processor, Sampler, SamplingParams, argmax_rows, log_probability
from tascade.decode.stop import StopRule, bounded
from tascade.decode.supported import check_ids, warn_of_length
from tascade.errors import ConfigError, TascadeError


@dataclass(slots=True)
class Row:
    """A request in the batch.

    Attributes:
        index: which prompt it is of.
        request: what may be given out.
        running: the request that steps add tokens to: ``request``, where nothing has to be checked
            before it is given out.
        request_id: of its part of a small head.
        given: how many tokens were given out.
    """

    index: int
    request: Request
    running: Request
    request_id: int
    given: int = 0


class BatchDecoder:
    """Decodes requests together, new ones as others end; no drafts.

    Each is decoded with its own options, noise and part of the head: its answer is the one it
    would have alone, up to the rounding of a product of another shape.

    Args:
        target: the model.
        head: a small head; ``None`` for the model's own.
        tokenizer: for texts and stop strings.
        size: most requests at once.

    Raises:
        ConfigError: ``size`` below 1.
    """

    def __init__(
        self,
        target: BatchTarget,
        head: SharedHead | None = None,
        *,
        tokenizer: Any = None,
        size: int = 8,
    ) -> None:
        if size < 1:
            raise ConfigError("a batch has requests", got=size, wanted="1 or more", where="size")
        self.target, self.head, self.tokenizer = target, head, tokenizer
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
        rows: list[Row] = []
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
        found = []
        for i, (prompt, own) in enumerate(zip(prompts, each, strict=True)):
            ids = np.ascontiguousarray(prompt, dtype=np.int32)
            check_ids(ids, self.target.rows, f"prompt {i}")
            limited = bounded(own, len(ids), self.target.positions, f"prompt {i}")
            warn_of_length(len(ids), self.target.context)
            sampler = Sampler(limited, processors, ids)
            stop = StopRule(limited, self.tokenizer)
            found.append(Request.new(ids, sampler, stop, self.target.device, f"prompt {i}"))
        return found

    # --- a round -------------------------------------------------------------------------------

    @torch.inference_mode()
    def _round(
        self, rows: list[Row], coming: Sequence[tuple[int, Request]]
    ) -> list[tuple[int, list[int], Generation]]:
        """Read the prompts of those who come; then a token of each row."""
        for index, request in coming:
            self._enter(rows, index, request, self.head)
        self._step(rows, self.head)
        return [told for row in rows if (told := self._told(row))]

    def _row(self, index: int, request: Request) -> Row:
        request_id = -1 if self.head is None else self.head.add_request(request.prompt)
        return Row(index, request, request, request_id)

    def _enter(
        self, rows: list[Row], index: int, request: Request, head: SharedHead | None
    ) -> None:
        """Add a row: read its prompt, which gives its first token."""
        request.started = time.perf_counter()
        row = self._row(index, request)
        rows.append(row)
        at = len(rows) - 1
        unread = request.prompt[self.target.recall(at, request.prompt) :]
        self._forward([row], [unread.tolist()], head, at)
        row.running.result.prefill_seconds = time.perf_counter() - request.started

    def _step(self, rows: Sequence[Row], head: SharedHead | None) -> float:
        """A token for each row; the seconds that it took."""
        start = time.perf_counter()
        live = [row for row in rows if not row.running.done]
        if not live:
            return 0.0
        unread = [
            self.target.unread(at, row.request.prompt, row.running.result.tokens)
            for at, row in enumerate(rows)
        ]
        self._forward(rows, unread, head, 0)
        seconds = time.perf_counter() - start
        for row in live:
            made = row.running.result
            made.steps.append(StepStats(0, 0, 1, 0.0, seconds / len(rows)))
            made.forwards, made.stepped_tokens = made.forwards + 1, made.stepped_tokens + 1
        return seconds

    def _forward(
        self,
        rows: Sequence[Row],
        tokens: Sequence[Sequence[int]],
        head: SharedHead | None,
        first: int,
    ) -> None:
        """One forward, and each row's next token; rows that are done are only carried along."""
        whole = self.target.whole if head is None else head
        logits, states = self.target.forward(tokens, whole, first)
        at = [i for i, row in enumerate(rows) if not row.running.done]
        live = [rows[i] for i in at]
        if len(at) < len(rows):
            logits, states = logits[at], states[at]
            for i in set(range(len(rows))) - set(at):
                self.target.cache.lengths[first + i] -= 1  # so that no place passes the last one
        chosen = self._choose(live, logits, head)
        self._keep(live, logits, states, head)
        for row, token in zip(live, chosen, strict=True):
            made = row.running.result
            made.tokens.append(token)
            made.sources.append(int(Source.TARGET))
            row.running.done = row.running.stop.is_last(made.tokens)

    def _keep(
        self,
        rows: Sequence[Row],
        logits: torch.Tensor,
        states: torch.Tensor,
        head: SharedHead | None,
    ) -> None:
        """What rows' tokens were just chosen from: [N, n] and [N, d]. For subclasses."""

    def _choose(
        self, rows: Sequence[Row], logits: torch.Tensor, head: SharedHead | None
    ) -> list[int]:
        """What decoding alone takes behind each row. ``logits``: [N, n]."""
        request_ids = [row.request_id for row in rows]
        final = self._is_final(head)
        choosers = [row.request.chooser for row in rows]
        plain = [c.is_argmax and (c.params.logprobs is None or not final) for c in choosers]
        best: list[int] = []
        if any(plain):
            best = argmax_rows(logits) if head is None else head.argmax(logits, request_ids)
        out = []
        for i, row in enumerate(rows):
            if plain[i]:
                out.append(best[i])
                continue
            wide = (
                logits[i] if head is None else head.scatter(logits[i : i + 1], [row.request_id])[0]
            )
            out.append(self._draw(row, wide, final))
        return out

    def _is_final(self, head: SharedHead | None) -> bool:
        """Whether tokens chosen with this head are given out as they are."""
        return True

    def _draw(self, row: Row, logits: torch.Tensor, final: bool) -> int:
        """One row's choice from its own logits [V]."""
        chooser, made = row.request.chooser, row.running.result
        before = row.running.prefix([]) if chooser.needs_prefix else logits.new_empty(1, 0).long()
        token = chooser.choose(logits, before, len(made.tokens))
        if (top := chooser.params.logprobs) is not None and final:
            made.logprobs.append(log_probability(logits, token, top))
        return token

    # --- rows ----------------------------------------------------------------------------------

    def _told(self, row: Row) -> tuple[int, list[int], Generation] | None:
        """What a row has to give out; its text where it has ended."""
        request, result = row.request, row.request.result
        new, row.given = result.tokens[row.given :], len(result.tokens)
        if request.done:
            result.finish_reason = request.stop.reason
            result.text = request.stop.text(result.tokens)
            result.seconds = time.perf_counter() - request.started
        return (row.index, new, result) if new else None

    def _remove(self, rows: list[Row], at: int) -> None:
        """Take a row out; the last one takes its place, in the cache as well."""
        gone, rows[at] = rows[at], rows[-1]
        rows.pop()
        self.target.cache.remove(at)
        self._leave(gone)

    def _leave(self, row: Row) -> None:
        if self.head is not None:
            self.head.remove_request(row.request_id)

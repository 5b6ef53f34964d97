"""Drafts for a whole batch at once, for engines that move requests between rows and name none."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tascade.core import IntArray
from tascade.draft.batch_budget import BatchBudget
from tascade.draft.batch_kernels import (
    SURVIVAL_BINS,
    LongArray,
    clear_slot,
    cut_rows,
    draft_rows,
    match_rows,
    new_batch_work,
    new_slots,
    tally,
)
from tascade.draft.calibrate import Calibration
from tascade.draft.context import HashChain
from tascade.draft.mix import SimilarView
from tascade.draft.shards import CorpusView, shard_table
from tascade.errors import ConfigError

MAX_DRAFT = 64
_SEPARATED = np.array([-1, -1], np.int32)
_NO_TOKENS = np.empty(0, np.int32)


@dataclass(frozen=True, slots=True)
class Task:
    """What drafts are made from: a task's outputs, its similar examples, its learned trust.

    ``corpus`` is ``None`` to draft from the requests alone, ``similar`` to go without examples.
    """

    corpus: CorpusView | None
    similar: SimilarView | None = None
    calibration: Calibration = field(default_factory=Calibration)


@dataclass(slots=True)
class BatchStats:
    """Counters since the start. Times in seconds."""

    steps: int = 0
    rows: int = 0
    requests: int = 0
    drafted: int = 0
    accepted: int = 0
    draft_seconds: float = 0.0


class BatchDrafter:
    """Drafts chains for the rows of a batch; a request is known by its tokens alone.

    Args:
        tasks: one or more tasks; a request belongs to one of them.
        end_tokens: ids that end an answer: nothing is drafted after one.
        requests: most requests in a batch.
        length: most tokens in a request.
        most: most tokens drafted for a request.
        budget: shares the tokens worth verifying; ``None`` verifies all that are drafted.

    Raises:
        ConfigError: ``most`` is out of range.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        *,
        end_tokens: Sequence[int] = (),
        requests: int,
        length: int,
        most: int,
        budget: BatchBudget | None = None,
    ) -> None:
        if not 1 <= most <= MAX_DRAFT:
            raise ConfigError(
                "the number of drafted tokens is out of range",
                got=most,
                wanted=f"1 to {MAX_DRAFT}",
                fix="set num_speculative_tokens in that range",
            )
        self.tasks = list(tasks)
        self.budget, self.most, self.length = budget, most, length
        self.stats = BatchStats()
        self._barriers = np.asarray(end_tokens, np.int32)
        self._slots = new_slots(requests, length, most)
        self._work = new_batch_work(most)
        self._last = np.full(requests, -1, np.int64)
        self._claimed = np.zeros(requests, np.int8)
        self._seen = np.zeros(requests, np.int64)
        self._given = np.zeros(requests, np.int64)
        self._counts = np.zeros(SURVIVAL_BINS, np.int64)
        self._sums = np.zeros(SURVIVAL_BINS, np.float64)
        self._recent = HashChain(16, bits=16)
        self._stages = _stacked([task.calibration for task in self.tasks])
        self._ended = 0.0
        self.refresh()
        self._compile()

    def _compile(self) -> None:
        ids = np.zeros((1, 4), np.int32)
        one = np.zeros(1, np.int64)
        for task in self.tasks:
            if task.similar is not None:
                task.similar.lookup(ids[0])
        self._admit(ids[0], 0, 0)
        self._draft(ids, one, one + 3, one, (1, 0.5))
        self._share(one)
        match_rows(ids, one, one + 3, one + 1, self._slots, self._last, self._claimed, one + 0)
        self._slots.known[0], self._slots.nodes[0] = 0, -1
        self.stats, self._ended = BatchStats(), 0.0

    def refresh(self) -> None:
        """Take up what was added to the corpus indexes since they were opened."""
        tables = [shard_table(task.corpus) for task in self.tasks]
        self._keep_alive = [arrays for _, arrays in tables]
        self._shards = np.concatenate([rows for rows, _ in tables])
        self._begins = np.cumsum([0] + [len(rows) for rows, _ in tables])
        corpus = self.tasks[0].corpus if len(self.tasks) == 1 else None
        if corpus is not None:
            self._recent.follow(corpus.delta_tokens)

    def propose(
        self,
        sampled: Sequence[Sequence[int]],
        lengths: IntArray,
        ids: IntArray,
        task_of: Callable[[int], int] | None = None,
    ) -> list[list[int]]:
        """Drafts for every row of a batch.

        Args:
            sampled: [B] the tokens each row has just been given; none while its prompt is still
                being read, and then nothing is drafted for it.
            lengths: [>= B] int32, valid tokens of each row, those just given included.
            ids: [>= B, L] int32, the rows' tokens. Rows may have moved since the last call.
            task_of: which task a row not seen before belongs to; the first one by default.

        Returns:
            [B] lists of at most ``most`` token ids; empty where nothing pays.
        """
        start = time.perf_counter()
        fresh = np.fromiter(map(len, sampled), np.int64, len(sampled))
        rows = np.flatnonzero(fresh)
        drafts: list[list[int]] = [[] for _ in sampled]
        if len(rows) == 0:
            self._ended = 0.0
            return drafts
        held = lengths[rows].astype(np.int64)
        if len(rows) < len(sampled):
            self._ended = 0.0  # a step that read a prompt says nothing about drafts
        slot_of = self._find(ids, rows, held, fresh[rows], task_of)
        limit, floor = self.budget.plan(len(rows)) if self.budget else (self.most, 0.0)
        self._draft(ids, rows, held, slot_of, (limit, floor))
        if limit > 0:
            kept = self._share(slot_of)
            taken = self._slots.draft[slot_of].tolist()
            for row, tokens, n in zip(rows.tolist(), taken, kept.tolist(), strict=True):
                drafts[row] = tokens[:n]
        else:
            self._given[slot_of] = 0
        self._ended = time.perf_counter()
        self.stats.draft_seconds += self._ended - start
        if self.budget and limit > 0:
            self.budget.drafted_in(self._ended - start)
        return drafts

    def _find(
        self,
        ids: IntArray,
        rows: LongArray,
        held: LongArray,
        fresh: LongArray,
        task_of: Callable[[int], int] | None,
    ) -> LongArray:
        """The rows' slots, new ones where needed; learns from what became of the last drafts."""
        now = time.perf_counter()
        slot_of = np.empty(len(rows), np.int64)
        match_rows(ids, rows, held, fresh, self._slots, self._last, self._claimed, slot_of)
        known = slot_of >= 0
        self._learn_step(slot_of[known], fresh[known], now, bool(known.all()))
        for b in np.flatnonzero(~known).tolist():
            task = task_of(int(rows[b])) if task_of else 0
            slot_of[b] = self._admit(ids[rows[b]], int(held[b] - fresh[b]), task)
        self._last[rows] = slot_of
        self.stats.steps += 1
        self.stats.rows += len(rows)
        self._seen[slot_of] = self.stats.steps
        return slot_of

    def _learn_step(self, slots: LongArray, fresh: LongArray, now: float, alike: bool) -> None:
        given = self._given[slots]
        accepted = int(np.minimum(fresh - 1, given).sum())
        self.stats.accepted += accepted
        if self.budget is None or len(slots) == 0:
            return
        if alike and self._ended:
            self.budget.costs.observe(len(slots), int(given.sum()), now - self._ended)
        if given.any():
            reach = np.arange(self.most) < given[:, None]
            promised = float((self._slots.survival[slots] * reach).sum())
            self.budget.judge(promised, accepted)

    def _admit(self, row: IntArray, prompt: int, task: int) -> int:
        """Give a request that was not seen before the slot longest unused."""
        free = np.where(self._claimed == 0, self._seen, np.iinfo(np.int64).max)
        slot = int(free.argmin())
        self._claimed[slot] = 1
        pieces: list[IntArray] = []
        similar = self.tasks[task].similar
        if similar is not None and prompt:
            for output in similar.lookup(row[:prompt]):
                pieces += [_SEPARATED, output]
        examples = np.concatenate(pieces) if pieces else _NO_TOKENS
        clear_slot(self._slots, slot, task, prompt, examples)
        self._given[slot] = 0
        self.stats.requests += 1
        return slot

    def _draft(
        self,
        ids: IntArray,
        rows: LongArray,
        held: LongArray,
        slot_of: LongArray,
        plan: tuple[int, float],
    ) -> None:
        draft_rows(
            ids,
            rows,
            held,
            slot_of,
            self._slots,
            (self._shards, self._begins, self._recent.arrays(), self._stages),
            self._barriers,
            plan[0],
            plan[1],
            self.length,
            self._work,
        )

    def _share(self, slot_of: LongArray) -> Any:
        bins = SURVIVAL_BINS
        if self.budget is not None:
            tally(slot_of, self._slots, self._counts, self._sums)
            bins = self.budget.choose(len(slot_of), self._counts, self._sums)
        kept = np.empty(len(slot_of), np.int64)
        cut_rows(slot_of, self._slots, bins, kept)
        self._given[slot_of] = kept
        self.stats.drafted += int(kept.sum())
        return kept


def _stacked(calibrations: Sequence[Calibration]) -> tuple[Any, ...]:
    """Copies of the calibrations' arrays, each stage with a leading axis over tasks."""
    stages = zip(*(calibration.arrays() for calibration in calibrations), strict=True)
    return tuple(np.stack(stage) for stage in stages)

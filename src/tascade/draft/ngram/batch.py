"""Drafts for a whole batch at once, for engines that move requests between rows and name none."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from tascade.core import IntArray, LongArray
from tascade.draft.ngram.batch_bounds import check_batch, check_tasks, leave_strange
from tascade.draft.ngram.batch_budget import BatchBudget
from tascade.draft.ngram.batch_kernels import SURVIVAL_BINS, cut_rows, draft_rows, new_batch_work
from tascade.draft.ngram.drafter import concat_documents
from tascade.draft.ngram.mixer_calibration import Calibration
from tascade.draft.ngram.request_states import clear_slots, match_rows, new_slots
from tascade.draft.ngram.sources import Task
from tascade.errors import ConfigError
from tascade.index.hash_chain import HashChain
from tascade.index.lookup import MAX_LEVELS
from tascade.index.view import shard_table

_SPLIT_FROM = 64
"""Rows from which a batch is split. ``benchmarks/batch_draft.py`` has 256; it was never varied."""


class RowThreads:
    """Threads that share the rows of a large batch, each with working memory of its own.

    Args:
        threads: how many; 0 for all cores, at most four.
        new_work: makes one thread's working memory.
    """

    def __init__(self, threads: int, new_work: Callable[[], Any]) -> None:
        threads = threads or min(4, os.cpu_count() or 1)
        self._works = [new_work() for _ in range(threads)]
        self._pool = ThreadPoolExecutor(threads, "tascade-draft")

    def run(self, part: Callable[[slice, Any], None], rows: int) -> list[Any]:
        """Call ``part`` with slices of ``range(rows)``; returns the working memories used."""
        works = self._works if rows >= _SPLIT_FROM else self._works[:1]
        bounds = [i * rows // len(works) for i in range(len(works) + 1)]
        pieces = [slice(a, b) for a, b in pairwise(bounds)]
        others = [self._pool.submit(part, *job) for job in zip(pieces[1:], works[1:], strict=True)]
        part(pieces[0], works[0])
        for other in others:
            other.result()
        return works


MAX_DRAFT = 64
_EXAMPLES = 8
Ended = Callable[[IntArray, IntArray], object]
"""Takes the prompt and the output, [T] int32 each, of a request that met an end token."""
_NO_TOKENS = np.empty(0, np.int32)
_NO_BOUND = np.iinfo(np.int32).max


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
        on_end: called once with prompt and output [T] of a request that meets an end token: what
            was sampled for it, up to its first one.
        threads: threads that draft for a large batch; 0 for all cores, at most four.

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
        threads: int = 0,
        on_end: Ended | None = None,
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
        self._on_end: Ended | None = None  # not while compiling
        self.end_tokens = np.asarray(end_tokens, np.int32)
        self._slots = new_slots(requests, length, most)
        self._lanes = RowThreads(threads, lambda: _new_work(most))
        self._last = np.full(requests, -1, np.int64)
        self._since = np.zeros(requests, np.int64)
        self._alone = self._others = 0
        self._claimed = np.zeros(requests, np.int8)
        self._seen = np.zeros(requests, np.int64)
        self._slot_of = np.zeros(requests, np.int64)
        self._wanted = np.zeros(requests, np.int64)
        self._outcome = np.zeros(4)
        self._drafts = np.zeros(requests * most, np.int32)
        self._row_ends = np.zeros(requests, np.int64)
        self._recent = [HashChain(16, bits=16) for _ in self.tasks]
        self._stages = _stacked([task.calibration for task in self.tasks])
        self._ended = 0.0
        self.refresh()
        self._compile()
        self._on_end = on_end

    def _compile(self) -> None:
        ids = np.zeros((2, 4), np.int32)
        for task in self.tasks:
            if task.similar is not None:
                task.similar.lookup(ids[0])
        budget, self.budget = self.budget, None
        for length in (3, 4):
            self.propose([[0]], np.full(2, length, np.int32), ids)
        self._slots.known[:] = 0
        self._last[:] = -1
        self._stages = _stacked([task.calibration for task in self.tasks])  # nothing was learned
        self.budget, self.stats, self._ended = budget, BatchStats(), 0.0

    def refresh(self) -> None:
        """Take up what was added to the corpus indexes since they were opened."""
        tables = [shard_table(task.corpus) for task in self.tasks]
        self._keep_alive = [arrays for _, arrays in tables]
        self._shards = np.concatenate([rows for rows, _ in tables])
        self._begins = np.cumsum([0] + [len(rows) for rows, _ in tables])
        # A shard's ``head`` has an entry for each token, and two more.
        self._vocabulary = int(self._shards[:, 5].min(initial=_NO_BOUND)) - 2
        self._slots.held[:, :, MAX_LEVELS] = 0  # voters stand in the shards of before
        for task, recent in zip(self.tasks, self._recent, strict=True):
            if task.corpus is not None:
                recent.follow(task.corpus.delta_tokens)
        self._appended = _side_by_side([recent.arrays() for recent in self._recent])

    def propose(
        self,
        sampled: Sequence[Sequence[int]],
        lengths: IntArray,
        ids: IntArray,
        task_of: Callable[[int], int] | None = None,
        prompts: LongArray | None = None,
    ) -> list[list[int]]:
        """Drafts for every row of a batch.

        Args:
            sampled: [B] the tokens each row has just been given; none while its prompt is still
                being read, and then nothing is drafted for it.
            lengths: [>= B] int32, valid tokens of each row, those just given included.
            ids: [>= B, L] int32, the rows' tokens. Rows may have moved since the last call.
            task_of: which task a row belongs to, below 0 for none, and then nothing is drafted for
                it; the first one by default.
            prompts: [>= B], how many of each row's tokens are its prompt, where the engine tells.

        Returns:
            [B] lists of at most ``most`` token ids; empty where nothing pays, and for a row that
            is longer than a request may be or holds ids that are not in the vocabulary.

        Raises:
            ConfigError: arrays of another type or shape, too many rows, a length that a row does
                not have, or a task that is not there.
        """
        start = time.perf_counter()
        budget = self.budget
        rests = budget is not None and budget.rests()
        if rests and self._on_end is None:
            self._ended = 0.0
            return [[] for _ in sampled]
        sizes = {"requests": len(self._last), "longest": self.length}
        fresh, lengths = check_batch(sampled, lengths, ids, **sizes)
        slot_of = self._find(ids, lengths, fresh, start, task_of)
        rows = int(self._outcome[0]) + self._admitted + self._alone
        limit, floor = budget.plan(rows) if budget else (self.most, 0.0)
        limit = 0 if rests else limit
        self._draft(ids, lengths, slot_of, (limit, floor, self.length))
        if self._on_end is not None:
            self._tell_ends(sampled, lengths, ids, slot_of, prompts)
        drafts = self._share(slot_of, rows) if limit > 0 else [[] for _ in sampled]
        self._ended = time.perf_counter()
        self.stats.draft_seconds += self._ended - start
        if budget and limit > 0:
            budget.drafted_in(self._ended - start, int(self._counts.sum()))
        return drafts

    def promises(self, drafts: Sequence[Sequence[int]]) -> list[float]:
        """How many tokens of each row's draft, just made, are expected to be accepted."""
        survival, slots = self._slots.survival, self._slot_of
        return [
            float(survival[slots[row], : len(draft)].sum()) if draft else 0.0
            for row, draft in enumerate(drafts)
        ]

    def replaced(self, rows: Sequence[int], tokens: int) -> None:
        """For some rows another drafter's tokens, so many in all, are verified in place of ours.

        Nothing is learned from how ours did, and what the other one took is no part of the step.
        """
        for slot in self._slot_of[list(rows)].tolist():
            if slot >= 0:
                self.stats.drafted -= int(self._slots.given[slot])
                self._slots.given[slot] = 0
        self._others = tokens
        if self._ended:
            self._ended = time.perf_counter()

    def _find(
        self,
        ids: IntArray,
        lengths: IntArray,
        fresh: LongArray,
        now: float,
        task_of: Callable[[int], int] | None,
    ) -> LongArray:
        """The rows' slots, new ones where needed; learns from what became of the last drafts."""
        slot_of = self._slot_of[: len(fresh)]
        wanted = self._wanted[: len(fresh)]
        if task_of is not None:
            tasks = [task_of(row) if n else 0 for row, n in enumerate(fresh.tolist())]
            check_tasks(tasks, len(self.tasks))
            wanted[:] = tasks
            fresh[wanted < 0] = 0
        self._alone = int(np.count_nonzero(wanted < 0))
        found = (self._slots, self._last, self._claimed, slot_of, self._outcome)
        self._admitted = match_rows(ids, lengths, fresh, wanted, *found)
        known, accepted, given, promised = self._outcome.tolist()
        if self.budget is not None and known + self._alone == len(fresh) and self._ended:
            # Only then: a step that read a prompt says nothing about drafts.
            count = int(given) + self._others
            self.budget.costs.observe(len(fresh), count, now - self._ended)
        self._others = 0
        if self.budget is not None:
            self.budget.judge(promised, int(accepted))
        leave_strange(ids, lengths, slot_of, self._slots.known, self._vocabulary)
        if self._admitted:
            self._admitted = int((slot_of == -1).sum())
        if self._on_end is not None:
            # A row that went on unseen may be another request that repeats the one before: what
            # was sampled for it begins anew.
            rows = np.flatnonzero(slot_of >= 0)
            before = lengths[rows] - fresh[rows]
            unseen = self._slots.known[slot_of[rows]] != before
            self._since[slot_of[rows[unseen]]] = before[unseen]
        if self._admitted:
            rows = np.flatnonzero(slot_of == -1)
            prompts = np.asarray(lengths[rows] - fresh[rows], np.int64)
            slot_of[rows] = self._admit(ids, rows, prompts, wanted[rows])
            self._since[slot_of[rows]] = prompts
        self.stats.steps += 1
        self.stats.rows += int(known) + self._admitted
        self.stats.accepted += int(accepted)
        self._last[: len(fresh)] = slot_of
        self._seen[slot_of[slot_of >= 0]] = self.stats.steps
        return slot_of

    def _admit(
        self, ids: IntArray, rows: LongArray, prompts: LongArray, wanted: LongArray
    ) -> LongArray:
        """Give requests that were not seen before the slots longest unused."""
        free = np.where(self._claimed == 0, self._seen, np.iinfo(np.int64).max)
        slots = np.argsort(free, kind="stable")[: len(rows)]
        self._claimed[slots] = 1
        examples = [
            examples_of(self.tasks[task], ids[row, :prompt])
            for row, prompt, task in zip(
                rows.tolist(), prompts.tolist(), wanted.tolist(), strict=True
            )
        ]
        ends = np.cumsum([len(some) for some in examples])
        clear_slots(self._slots, slots, wanted, prompts, np.concatenate(examples), ends)
        self.stats.requests += len(rows)
        return slots

    def _tell_ends(
        self,
        sampled: Sequence[Sequence[int]],
        lengths: IntArray,
        ids: IntArray,
        slot_of: LongArray,
        prompts: LongArray | None,
    ) -> None:
        """Tell of the answers whose first end token is among the new ones, wherever it stands.

        One that was drafted and accepted has another token behind it, which the engine drops later.
        """
        assert self._on_end is not None
        ends = set(self.end_tokens.tolist())
        for row, new in enumerate(sampled):
            if slot_of[row] < 0 or ends.isdisjoint(new):
                continue
            begin = int(self._since[slot_of[row]] if prompts is None else prompts[row])
            said = ids[row, begin : lengths[row]]
            end = int(np.isin(said, self.end_tokens).argmax()) + 1
            if len(said) - end < len(new):
                self._on_end(ids[row, :begin].copy(), said[:end].copy())

    def _draft(
        self, ids: IntArray, lengths: IntArray, slot_of: LongArray, plan: tuple[int, float, int]
    ) -> None:
        """Draft for all rows, those of a large batch on several threads: kernels hold no lock.

        The threads learn into the same calibration; a count lost between them does no harm.
        """
        tasks = (self._shards, self._begins, self._appended, self._stages)

        def part(rows: slice, work: Any) -> None:
            draft_rows(
                ids[rows],
                lengths[rows],
                slot_of[rows],
                self._slots,
                tasks,
                self.end_tokens,
                plan,
                *work,
            )

        works = self._lanes.run(part, len(slot_of))
        self._counts = sum(work[1] for work in works)
        self._sums = sum(work[2] for work in works)

    def _share(self, slot_of: LongArray, rows: int) -> list[list[int]]:
        bins = SURVIVAL_BINS
        if self.budget is not None:
            bins = self.budget.choose(rows, self._counts, self._sums)
        n = len(slot_of)
        if bins == 0:
            return [[] for _ in range(n)]
        total = cut_rows(slot_of, self._slots, bins, self._drafts, self._row_ends)
        self.stats.drafted += total
        drafts, ends = self._drafts[:total].tolist(), self._row_ends[:n].tolist()
        return [drafts[a:b] for a, b in pairwise([0, *ends])]


def examples_of(task: Task, prompt: IntArray) -> IntArray:
    """The outputs of the examples most like a prompt [T], each behind the start of a document."""
    if task.similar is None or not len(prompt):
        return _NO_TOKENS
    return concat_documents(task.similar.lookup(prompt, top=_EXAMPLES))


def _new_work(most: int) -> tuple[Any, ...]:
    """One thread's working memory: (for the kernels, nodes by survival, survival summed)."""
    return new_batch_work(most), np.zeros(SURVIVAL_BINS, np.int64), np.zeros(SURVIVAL_BINS)


def _stacked(calibrations: Sequence[Calibration]) -> tuple[Any, ...]:
    """Copies of the calibrations' arrays, each stage with a leading axis over tasks."""
    stages = zip(*(calibration.arrays() for calibration in calibrations), strict=True)
    return tuple(np.stack(stage) for stage in stages)


def _side_by_side(chains: Sequence[tuple[Any, ...]]) -> tuple[Any, ...]:
    """Hash chains' arrays, each with a leading axis over tasks; the shorter ones are filled up."""
    tokens, previous, tables, lengths, bits = zip(*chains, strict=True)
    rows = [_filled_up(parts) for parts in (tokens, previous, tables)]
    return (*rows, np.array(lengths, np.int64), bits[0])


def _filled_up(parts: Sequence[IntArray]) -> IntArray:
    if len(parts) == 1:  # a long one is not copied with every document
        return parts[0][None]
    rows = np.full((len(parts), max(map(len, parts))), -1, np.int32)
    for row, part in zip(rows, parts, strict=True):
        row[: len(part)] = part
    return rows

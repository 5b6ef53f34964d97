"""The decoding loop: propose, verify, commit."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

from tascade.core import EMPTY_TREE, Drafter, DraftTree, FloatArray, Generation, IntArray, StepStats
from tascade.decode.row_counts import DOUBT
from tascade.decode.sampling import Processor, Sampler, SamplingParams
from tascade.decode.stop import ExtraStop, StopRule, bounded
from tascade.decode.supported import check_ids, warn_of_length
from tascade.decode.target import PREFILL_DRAFT_LIMIT as PREFILL_DRAFT_LIMIT
from tascade.decode.target import Hold, Target
from tascade.decode.verify import Walk, walk
from tascade.errors import ConfigError, TascadeError


class NodeBudget(Protocol):
    """How many nodes to propose, and to verify. See :class:`tascade.draft.budget.Budget`."""

    def plan(self) -> tuple[int, float]:
        """(most nodes, floor) for the drafter's proposal; 0 nodes to skip it."""
        ...

    def choose(self, survival: FloatArray) -> int:
        """How many of the proposed nodes to verify."""
        ...

    def observe(self, nodes: int, seconds: float, draft_seconds: float) -> None:
        """Take what a step took."""
        ...

    def judge(self, accepted: int) -> None:
        """Compare the last choice with how many of its nodes were accepted."""
        ...


@dataclass(slots=True)
class AllNodes:
    """The budget that verifies whatever is proposed, up to ``limit`` nodes."""

    limit: int = 64

    def plan(self) -> tuple[int, float]:
        """Always ask."""
        return self.limit, 0.0

    def choose(self, survival: FloatArray) -> int:
        """Always take all."""
        return min(len(survival), self.limit)

    def observe(self, nodes: int, seconds: float, draft_seconds: float) -> None:
        """Nothing to learn."""

    def judge(self, accepted: int) -> None:
        """Nothing to judge."""


@dataclass(slots=True)
class Request:
    """A request being decoded: what was asked, and what there is so far.

    ``guess``: the same one with guesses behind it, where those are checked later.
    """

    prompt: IntArray
    chooser: Sampler
    stop: StopRule
    result: Generation
    device: torch.device
    done: bool = False
    ids: torch.Tensor | None = None
    known: int = 0
    started: float = field(default_factory=time.perf_counter)
    hold: Hold = field(default_factory=Hold)
    guess: Request | None = None

    @classmethod
    def new(
        cls,
        prompt: Sequence[int] | IntArray,
        chooser: Sampler,
        stop: StopRule,
        device: torch.device,
        where: str = "prompt",
    ) -> Request:
        """One of which nothing is decoded yet, of a prompt of token ids [T].

        Raises:
            ConfigError: the prompt is empty.
        """
        ids = np.ascontiguousarray(prompt, dtype=np.int32)
        if not len(ids):
            raise ConfigError(
                "the prompt is empty", got="0 tokens", wanted="at least one token", where=where
            )
        return cls(ids, chooser, stop, Generation([], prompt_tokens=len(ids)), device)

    def prefix(self, extra: Sequence[int]) -> torch.Tensor:
        """Prompt, output so far and ``extra``: [1, T]. Kept in one growing buffer, whose first
        ``known`` output tokens are written for good.
        """
        n, output = len(self.prompt), self.result.tokens
        end = n + len(output) + len(extra)
        if self.ids is None or self.ids.shape[1] < end:
            self.ids = torch.empty(1, 2 * end, dtype=torch.long, device=self.device)
            self.ids[0, :n] = torch.from_numpy(self.prompt.astype(np.int64))
            self.known = 0
        new = [*output[self.known :], *extra]
        if new:
            self.ids[0, n + self.known : end] = torch.tensor(new, dtype=torch.long)
        self.known = len(output)
        return self.ids[:, :end]


class Decoder:
    """Decodes one request at a time with a target, a drafter and a budget.

    Plain decoding is the same loop with the drafter that proposes nothing. Several threads may
    call it, and loops over one target, or one model, may be used beside each other: a request is
    decoded to its end before the next, a stream step by step.
    """

    def __init__(
        self,
        target: Target,
        drafter: Drafter,
        budget: NodeBudget | None = None,
        tokenizer: Any = None,
    ) -> None:
        self.target, self.drafter, self.tokenizer = target, drafter, tokenizer
        self.budget: NodeBudget = budget or AllNodes()

    def generate(
        self,
        prompt: Sequence[int] | IntArray,
        params: SamplingParams,
        processors: Sequence[Processor] = (),
        on_tokens: Callable[[list[int]], None] | None = None,
        extra_stop: ExtraStop | None = None,
    ) -> Generation:
        """Decode one prompt of token ids [T] to its end.

        ``on_tokens`` is called after each step with the newly committed ids; ``extra_stop`` after
        each token with the output so far, and ends the request by saying true.

        Raises:
            ConfigError: an empty prompt, or stop strings without a tokenizer.
        """
        last: Generation | None = None
        with self.target.lock:  # to the end: other requests would only take turns
            for tokens, result in self.stream(prompt, params, processors, extra_stop, returns=True):
                last = result
                if on_tokens is not None:
                    on_tokens(tokens)
        assert last is not None
        return last

    @torch.inference_mode()
    def _advance(self, request: Request) -> list[int]:
        return self.step(request) if request.result.tokens else self.prefill(request)

    def stream(
        self,
        prompt: Sequence[int] | IntArray,
        params: SamplingParams,
        processors: Sequence[Processor] = (),
        extra_stop: ExtraStop | None = None,
        *,
        returns: bool = False,
    ) -> Iterator[tuple[list[int], Generation]]:
        """Decode step by step: yields the new ids and the result so far.

        Nothing is held from step to step: any thread may take the next one, close the iterator or
        drop it, and other requests may come between.

        Args:
            prompt: token ids [T].
            params: how it is decoded.
            processors: logits processors.
            extra_stop: see :meth:`generate`.
            returns: go on after another request has come between, with a cache that is kept for
                it; else that is an error.

        Raises:
            TascadeError: another request was begun on this target before this one ended.
        """
        ids = np.ascontiguousarray(prompt, dtype=np.int32)
        check_ids(ids, self.target.rows)
        params = bounded(params, len(ids), self.target.positions)
        warn_of_length(len(ids), self.target.context)
        stop, sampler = (
            StopRule(params, self.tokenizer, extra_stop),
            Sampler(params, processors, ids),
        )
        request = Request.new(ids, sampler, stop, self.target.device)
        request.hold.returns = returns
        try:
            while not request.done:
                with self.target.step():
                    self._take(request)
                    tokens = self._advance(request)
                    if request.done:
                        self._finish(request)
                yield tokens, request.result
        finally:
            self.target.end(request.hold)

    @torch.inference_mode()
    def _take(self, request: Request) -> None:
        """See to it that target, drafter and head are this request's."""
        if not request.result.tokens:
            self.begin(request)
        elif self.target.hold is not request.hold:
            if not request.hold.returns:
                raise TascadeError(
                    "another request has begun on this decoder, and took its cache",
                    fix="finish one stream before the next, or give each its own Decoder",
                )
            self.go_on(request)

    def begin(self, request: Request) -> None:
        """Forget the request before."""
        self.target.begin(request.prompt, request.hold)
        self.drafter.start(request.prompt)

    def go_on(self, request: Request) -> None:
        """Take up a request that others have come between."""
        self.target.go_on(request.prompt, request.hold)
        self.retell(request)

    def retell(self, request: Request) -> None:
        """Tell the drafter a request from its beginning: it cannot be rewound."""
        self.drafter.start(request.prompt)
        for token in request.result.tokens:
            self.drafter.commit(np.asarray([token], np.int32), 0, ())

    def prefill(self, request: Request) -> list[int]:
        """First forward: the prompt and, where it is short enough, a first draft behind it."""
        start = time.perf_counter()
        unread = request.prompt[self.target.recall(request.prompt) :].tolist()
        recalled = time.perf_counter() - start
        tree, draft_seconds = self.propose(request, len(unread))
        tokens = self._verify(request, unread, tree, draft_seconds)
        result = request.result
        result.prefill_seconds = recalled + result.steps[-1].step_seconds + draft_seconds
        if not len(tree):
            result.steps.pop()
            result.forwards, result.stepped_tokens = 0, 0
        return tokens

    def step(self, request: Request) -> list[int]:
        """One round: propose, verify, commit. Returns the newly committed ids."""
        unread = self.target.unread(request)
        tree, draft_seconds = self.propose(request, len(unread))
        return self._verify(request, unread, tree, draft_seconds)

    def propose(self, request: Request, unread: int) -> tuple[DraftTree, float]:
        """Ask the drafter for as many nodes as are worth verifying now.

        ``unread``: how many tokens the same pass reads.
        """
        start = time.perf_counter()
        left = request.stop.remaining(request.result.tokens) - 1
        room = self.target.room(len(request.prompt) + len(request.result.tokens), unread)
        drafting = unread <= PREFILL_DRAFT_LIMIT and room != 0
        limit, floor = self.budget.plan() if drafting else (0, 0.0)
        limit = min(limit, left) if not self.target.supports_trees else limit
        limit = limit if room is None else min(limit, room)
        if limit <= 0 or left <= 0:
            self.drafter.propose(0)
            return EMPTY_TREE, time.perf_counter() - start
        tree = self.drafter.propose(limit, floor)
        if not self.target.supports_trees and not tree.is_chain:
            tree = best_chain(tree)
        tree = tree.first(self.budget.choose(tree.survival)).depth_first()
        return tree, time.perf_counter() - start

    def _verify(
        self, request: Request, tokens: list[int], tree: DraftTree, draft_seconds: float
    ) -> list[int]:
        start = time.perf_counter()
        base = self.target.length + len(tokens)
        logits = self.target.forward(tokens, tree)
        result = request.result
        outcome = walk(
            tree,
            logits,
            request.chooser,
            len(result.tokens),
            request.prefix,
            lambda new: request.stop.is_last(result.tokens + new),
            doubt=None if self.target.counts is None else DOUBT,
        )
        seconds = time.perf_counter() - start
        self.commit(request, base, tree, outcome)
        self.budget.judge(len(outcome.path))
        first = len(tokens) > 1 or base == len(request.prompt)
        if not first:
            self.budget.observe(len(tree), seconds, draft_seconds)
        result.steps.append(
            StepStats(len(tree), len(outcome.path), len(outcome.tokens), draft_seconds, seconds)
        )
        result.forwards += 1
        result.stepped_tokens += len(outcome.tokens)
        return outcome.tokens

    def commit(self, request: Request, base: int, tree: DraftTree, outcome: Walk) -> None:
        """Keep what was accepted in the cache, the drafter and the result."""
        self.target.keep(base, outcome.path)
        request.result.tokens += outcome.tokens
        request.result.sources += outcome.sources
        request.result.logprobs += outcome.logprobs
        request.done = outcome.stopped
        path = outcome.path if tree.places is None else tree.places[outcome.path].tolist()
        self.drafter.commit(np.asarray(outcome.tokens, np.int32), len(tree), path)

    def _finish(self, request: Request) -> None:
        result = request.result
        result.finish_reason = request.stop.reason
        result.text = request.stop.text(result.tokens)
        result.seconds = time.perf_counter() - request.started


def best_chain(tree: DraftTree) -> DraftTree:
    """The path that follows the likeliest child from the root, for hosts that verify chains."""
    nodes: list[int] = []
    at = -1
    for i, parent in enumerate(tree.parents.tolist()):
        if parent == at:  # nodes are best first, so the first child is the likeliest
            nodes.append(i)
            at = i
    return DraftTree(
        tree.tokens[nodes],
        np.arange(-1, len(nodes) - 1, dtype=np.int32),
        tree.survival[nodes],
        tree.source[nodes],
    )

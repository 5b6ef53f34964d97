"""TASC-spec's drafter: the task's corpus, similar examples and the request itself, mixed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from tascade.core import EMPTY_TREE, DraftTree, IntArray
from tascade.draft.ngram.mixer_calibration import Calibration
from tascade.draft.ngram.tree_search import (
    MAX_NODES,
    grow_tree,
    new_memo,
    new_tree,
    new_work,
    update_calibration,
)
from tascade.index.hash_chain import HashChain
from tascade.index.lookup import DEPTH
from tascade.index.view import CorpusView, shard_table

_START = np.array([-1, -1], np.int32)


class SimilarView(Protocol):
    """Finds the outputs of the examples whose prompts are most like this one."""

    def lookup(self, prompt: IntArray, top: int = ...) -> list[IntArray]:
        """At most ``top`` outputs, the most similar last."""
        ...


def concat_documents(outputs: Sequence[IntArray]) -> IntArray:
    """Outputs one after the other, [T] int32, each behind the start of a document."""
    pieces = [part for output in outputs for part in (_START, output)]
    return np.concatenate(pieces) if pieces else np.empty(0, np.int32)


class NgramDrafter:
    """Drafts trees from all sources at once; learns which to trust, and when.

    Args:
        corpus: the task's outputs; ``None`` to draft from the request alone.
        similar: outputs of similar examples; ``None`` to go without.
        calibration: learned trust, updated in place while decoding.
        end_tokens: ids below which nothing is drafted.
        use_context: whether the request's own prompt and output are a source.
        adapt: whether outcomes update the calibration.
    """

    name = "tasc-spec"

    def __init__(
        self,
        corpus: CorpusView | None,
        *,
        similar: SimilarView | None = None,
        calibration: Calibration | None = None,
        end_tokens: Sequence[int] = (),
        use_context: bool = True,
        adapt: bool = True,
    ) -> None:
        self.corpus, self.similar = corpus, similar
        self.calibration = calibration or Calibration()
        self.adapt, self._use_context = adapt, use_context
        self._end_tokens = np.asarray(end_tokens, np.int32)
        self._recent = HashChain(16, bits=16)
        self._examples, self._request = HashChain(4096), HashChain(4096)
        self._buffers = new_tree(), new_memo(), new_work()
        self._spare: Any = None
        self._passed = np.zeros(MAX_NODES, np.int8)
        self._matched: IntArray | None = None
        self._nodes = -1
        self.refresh()
        self._compile()

    def _compile(self) -> None:
        # Here, so that the first request does not wait for it, nor the budget take it for the
        # price of a draft.
        nothing = np.empty(0, np.int32)
        self.start(nothing)
        self.propose(1)
        self.commit(nothing, 0, ())
        self.start(nothing)

    def refresh(self) -> None:
        """Take up what was added to the corpus index since it was opened."""
        self._shards, self._keep_alive = shard_table(self.corpus)
        if self.corpus is not None:
            self._recent.follow(self.corpus.delta_tokens)

    def start(self, prompt: IntArray) -> None:
        """Begin a request."""
        self._pending: list[IntArray] = []
        self._prompt: IntArray | None = prompt
        self._output_tail = _START
        self._request_tail = np.ascontiguousarray(prompt[::-1][:DEPTH], np.int32)
        self._nodes = -1

    def _index_prompt(self, prompt: IntArray) -> None:
        # The prompt is indexed and similar examples are fetched when the first draft is asked
        # for: where drafts do not pay, a request should cost nothing.
        self._prompt = None
        self._request.reset()
        if self._use_context:
            self._request.extend(np.ascontiguousarray(prompt, np.int32))
        if prompt is self._matched:
            return  # the same request is told again, since some of its output was taken back
        self._matched = prompt
        self._examples.reset()
        if self.similar is not None and len(prompt):
            self._examples.extend(concat_documents(self.similar.lookup(prompt)))

    def propose(self, limit: int, floor: float = 0.0) -> DraftTree:
        """The best-first tree of at most ``limit`` nodes that may pay (see ``Drafter.propose``)."""
        if limit <= 0:
            self._nodes = -1
            return EMPTY_TREE
        if self._prompt is not None:
            self._index_prompt(self._prompt)
        if self._pending:
            self._catch_up()
        tree = self._grow(limit, floor, (self._output_tail, self._request_tail), self._buffers)
        self._nodes = len(tree)
        return tree

    def beyond(self, path: Sequence[int], limit: int, floor: float = 0.0) -> DraftTree:
        """What would be drafted after these tokens, if they came next; for after :meth:`propose`.

        Nothing is learned from it.

        Args:
            path: tokens [T], one at least, which are not committed.
            limit: most nodes.
            floor: see ``Drafter.propose``.
        """
        ahead = np.asarray(path[::-1][:DEPTH], np.int32)
        tails = self._output_tail, self._request_tail
        longer = tuple(np.concatenate((ahead, tail))[:DEPTH] for tail in tails)
        if self._spare is None:
            self._spare = new_tree(), new_memo(), new_work()
        return self._grow(limit, floor, longer, self._spare)

    def _grow(self, limit: int, floor: float, tails: Any, buffers: Any) -> DraftTree:
        tree, memo, work = buffers
        n = grow_tree(
            min(limit, MAX_NODES),
            floor,
            self._end_tokens,
            (
                self._shards,
                self._recent.arrays(),
                self._examples.arrays(),
                self._request.arrays(),
            ),
            tails,
            self.calibration.arrays(),
            tree,
            memo,
            work,
        )
        return DraftTree(*(array[:n].copy() for array in tree[:4]))

    def commit(self, tokens: IntArray, verified: int, path: Sequence[int]) -> None:
        """Learn from the outcome and move on by ``tokens``."""
        if self.adapt and self._nodes >= 0:
            state = self.calibration.arrays()
            tree, memo, _ = self._buffers
            update_calibration(tokens, self._nodes, tree, state, memo, self._passed)
        self._nodes = -1
        self._pending.append(tokens)

    def _catch_up(self) -> None:
        # Put off until a draft is asked for: where none is, a commit should cost nothing.
        tokens = np.concatenate(self._pending)
        self._pending.clear()
        if self._use_context:
            self._request.extend(tokens)
        recent = np.ascontiguousarray(tokens[::-1][:DEPTH], np.int32)
        self._output_tail = np.concatenate((recent, self._output_tail))[:DEPTH]
        self._request_tail = np.concatenate((recent, self._request_tail))[:DEPTH]

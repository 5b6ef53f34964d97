"""Drafts with a network that was trained on the task and reads the target's states."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch.nn import functional

from tascade.core import EMPTY_TREE, ROOT, DraftTree, IntArray
from tascade.decode.target import Target
from tascade.draft.costs import Trust
from tascade.draft.neural.draft_model import Confidence
from tascade.draft.neural.network import DraftNetwork
from tascade.draft.neural.network_tree import NetworkTree
from tascade.draft.neural.step import Step
from tascade.draft.neural.stored import load_drafter
from tascade.errors import TascadeError
from tascade.pack import Pack

BRANCHES = 4
"""Tokens that are drafted behind each of the nodes which go on, and how many of these there are at
every depth: the likeliest ones (EAGLE-2, arXiv 2406.16858, section 4.1).
"""
DEPTH = 5
"""Most tokens that it drafts in a row: one more than it was trained to (``training.PASSES``)."""
AHEAD = 2
"""What going along such a path takes, in passes of one token."""
ALONG = 8
"""Most tokens of another drafter's path that it goes along."""
_TRIES, _MANY = 4, 32
"""Passes that tell what one takes, the first of which are slow; rows that are read for a request
once, and not for a draft.
"""


class TrainedDrafter:
    """Drafts a tree from the states of the target's last pass, a depth in each of its own.

    What the target has read since the last draft is taken up when the next one is asked for, in one
    pass: where it is never asked, a request costs nothing but the states that the target keeps.

    Args:
        network: as trained.
        ids: [Vd] the tokens that it can say, ascending.
        target: the model that it was trained for; its states are kept from now on.
        end_tokens: ids below which nothing is drafted.
        clock: tells seconds.

    Attributes:
        seconds: of drafting one token deeper, or half of going along another drafter's path.
        passes: how many such a draft takes, about.
        catching_up: seconds that the last draft took for what the target had read since long, such
            as the prompt.
        hits: how many of the likeliest tokens were right, if all before them were.

    Raises:
        UnsupportedModelError: see :meth:`tascade.decode.target.Target.tap`.
    """

    name = "taps"

    def __init__(
        self,
        network: DraftNetwork,
        ids: torch.Tensor,
        target: Target,
        *,
        end_tokens: Sequence[int] = (),
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.network, self.target, self.clock = network, target, clock
        target.tap(network.shape.taps)
        self._ids = ids.to(target.device)
        self._words = target.model.get_input_embeddings()
        self._ends = frozenset(end_tokens)
        self._step, self.catching_up = Step(network), 0.0
        self.seconds = min(self._try() for _ in range(_TRIES))
        self.forget()
        self.start(np.empty(0, np.int32))

    @torch.inference_mode()
    def _try(self) -> float:
        """Seconds of drafting one token, out of nothing."""
        nothing = self.network.head.weight.new_zeros(1, self.network.shape.hidden)
        started = self.clock()
        self._likeliest(self._step(nothing, nothing, 0, 0))
        return self.clock() - started

    def forget(self) -> None:
        """Forget how often it was right."""
        self.hits, self.confidence = Trust(1.0, 0.75, weight=1 / 32), Confidence()
        self.passes = float(DEPTH)

    def start(self, prompt: IntArray) -> None:
        """Begin a request; nothing is run before a draft is asked for."""
        self._context: list[int] = prompt.tolist()
        self._first = self._read = 0
        self._output: torch.Tensor | None = None
        self._tree = NetworkTree()

    def fits(self) -> bool:
        """Whether there is something to draft from: states, and the token behind them."""
        states = self.target.cache.states
        return states is not None and states.start < states.end < len(self._context)

    def propose(self, limit: int, floor: float = 0.0) -> DraftTree:
        """The tree of at most ``limit`` nodes that may pay (see ``Drafter.propose``)."""
        if limit <= 0 or not self.fits():
            self._tree = NetworkTree()
            return EMPTY_TREE
        return self.draft(limit, floor)

    @torch.inference_mode()
    def draft(self, limit: int, floor: float, step: float = np.inf) -> DraftTree:
        """As :meth:`propose`, where the target takes ``step`` seconds for one token."""
        started = self.clock()
        share = self.seconds / step
        outputs, at = self._catch_up()
        known, level = at + 1 - self._first, [ROOT]
        tree = self._tree = NetworkTree()
        promised, depth = 1.0, 1
        while True:
            said = zip(level, self._likeliest(outputs), strict=True)
            below = [
                node for above, words in said for node in tree.say(above, words, self.confidence)
            ]
            below = tree.likeliest(below, BRANCHES, self._ends)
            expected = sum(tree.survival[node] for node in below)
            promised += expected
            bar = promised * (floor + share) / (1.0 + depth * share)
            if depth >= min(DEPTH, limit) or not below or expected * self.hits.ratio < bar:
                break
            states, seen = tree.rows(below, level, outputs, known)
            outputs = self._pass([tree.tokens[i] for i in below], states, at + depth, seen=seen)
            level, depth = below, depth + 1
        self.passes += (depth - self.passes) / 16
        self._spent((self.clock() - started - self.catching_up) / depth)
        return tree.best(limit, floor)

    @torch.inference_mode()
    def draft_along(
        self, path: Sequence[int], survival: Sequence[float], limit: int, floor: float
    ) -> DraftTree:
        """A path that another drafter proposes, with what may stand beside each of its tokens.

        One pass reads the whole path: it says what the network would say behind each of its tokens.

        Args:
            path: tokens, :data:`ALONG` at most.
            survival: the chance that all up to each of them are right.
            limit: most nodes.
            floor: see ``Drafter.propose``.
        """
        started = self.clock()
        tree = self._tree = NetworkTree()
        at = ROOT
        for depth, said in enumerate(self._likeliest(self._read_along(path))):
            here = tree.put(at, path[depth], survival[depth]) if depth < len(path) else at
            tree.say(at, said, self.confidence)
            at = here
        self._spent((self.clock() - started - self.catching_up) / AHEAD)
        return tree.best(limit, floor)

    def _spent(self, seconds: float) -> None:
        """Note what a pass took: cheaper ones are believed sooner than dearer ones."""
        gap = min(seconds, 4 * self.seconds) - self.seconds
        self.seconds += gap / (8 if gap > 0 else 2)

    def _behind(self) -> int:
        """How many tokens the target has read since this did.

        Raises:
            TascadeError: the target keeps no states.
        """
        states = self.target.cache.states
        if states is None:
            raise TascadeError("the target keeps no states", fix="make the drafter anew")
        if self._read < states.start or self._read > states.end:
            self._first = self._read = states.start
        return states.end - self._read

    def _unread(self) -> tuple[list[int], torch.Tensor]:
        """The rows of these, one or more: the tokens behind them, and their states [n, d]."""
        states = self.target.cache.states
        assert states is not None
        taps = states.behind(self._read).to(self.network.fc.weight.dtype)
        return self._context[self._read + 1 : states.end + 1], self.network.fuse(taps)

    def _catch_up(self) -> tuple[torch.Tensor, int]:
        """Read what the target read since; the output of the last row there, and its place."""
        self.catching_up = 0.0
        if self._behind():
            started = self.clock()
            words, states = self._unread()
            self._output = self._pass(words, states, self._read)
            self._read += len(words)
            self.catching_up = self.clock() - started if len(words) > _MANY else 0.0
        output, at = self._output, self._read - 1
        assert output is not None
        for token in self._context[self._read + 1 :]:  # known, and to be read by the target yet
            at += 1
            output = self._pass([token], output, at)
        return output, at

    def _read_along(self, path: Sequence[int]) -> torch.Tensor:
        """The outputs [1 + n, d] of the last row that is known, and behind each token of a path.

        One pass reads the path, and what the target read since: a fifth less time than two of them
        at SmolLM2's widths (7.2 ms in place of 9.0).
        """
        behind, words = self._behind(), list[int]()
        rows = self.network.constant.expand(len(path), -1)
        if 0 < behind <= _MANY and len(self._context) == self._read + behind + 1:
            self.catching_up = 0.0
            words, states = self._unread()
            known, at, rows = [], self._read, torch.cat((states, rows))
        else:
            output, before = self._catch_up()
            known, at = [output], before + 1
        both = self._pass([*words, *path], rows, at, every=True)
        if words:
            self._read += len(words)
            self._output = both[len(words) - 1, None]
        return torch.cat((*known, both[max(0, len(words) - 1) :]))

    def _pass(
        self,
        words: Sequence[int],
        states: torch.Tensor,
        at: int,
        *,
        every: bool = False,
        seen: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Rows from place ``at`` on behind those kept: the output [1, d] of the last, or of all."""
        ids = torch.tensor(words, device=self._ids.device)
        slot = at - self._first
        if seen is not None:
            slot, seen = seen.shape[1] - len(words), seen.to(self._ids.device)
        return self._step(self._words(ids).to(states), states, at, slot, every=every, seen=seen)

    def _likeliest(self, outputs: torch.Tensor) -> list[tuple[list[int], list[float]]]:
        """The likeliest tokens of each output [n, d], and how likely it says they are."""
        scores = functional.linear(outputs, self.network.head.weight).float()
        best, places = scores.topk(min(BRANCHES, len(self._ids)))
        chances = (best - scores.logsumexp(-1, keepdim=True)).exp()
        return list(zip(self._ids[places].tolist(), chances.tolist(), strict=True))

    def commit(self, tokens: IntArray, verified: int, path: Sequence[int]) -> None:
        """Learn from the outcome, and go on behind ``tokens``."""
        self._tree.learn(tokens, self.confidence, self.hits)
        self._tree = NetworkTree()
        self._context += tokens.tolist()


def open_trained(pack: Pack, target: Target, end_tokens: Sequence[int]) -> TrainedDrafter:
    """The drafter that was trained for a pack's model, over a target of it.

    Raises:
        PackError: it is damaged.
        FingerprintError: it was trained for another model or tokenizer.
    """
    network, ids, _ = load_drafter(pack.drafter, target.model, pack.info.fingerprint)
    return TrainedDrafter(network, ids, target, end_tokens=end_tokens)

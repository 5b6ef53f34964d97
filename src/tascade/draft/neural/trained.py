"""Drafts with a network that was trained on the task and reads the target's states."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch.nn import functional

from tascade.core import EMPTY_TREE, ROOT, DraftTree, IntArray, Source
from tascade.decode.target import Target
from tascade.draft.costs import Trust
from tascade.draft.neural.draft_model import Confidence
from tascade.draft.neural.network import DraftNetwork
from tascade.draft.neural.stored import load_drafter
from tascade.draft.neural.training import DraftVocabulary
from tascade.errors import TascadeError
from tascade.pack import Pack

BRANCHES = 4
"""Tokens that are drafted beside each other at every depth, the likeliest of which goes on."""
DEPTH = 5
"""Most tokens that it drafts in a row: one more than it was trained to (``training.PASSES``)."""
ALONG = 8
"""Most tokens of another drafter's path that it goes along."""
_FIRST_CAPACITY = 512
_TRIES, _MANY = 4, 32
"""Passes that tell what one takes, the first of which are slow; rows that are read for a request
once, and not for a draft.
"""


class TrainedDrafter:
    """Drafts from the states of the target's last pass, a path with alternatives beside it.

    What the target has read since the last draft is taken up when the next one is asked for, in one
    pass: where it is never asked, a request costs nothing but the states that the target keeps.

    Args:
        network: as trained.
        ids: [Vd] the tokens that it can say, ascending.
        target: the model that it was trained for; its states are kept from now on.
        end_tokens: ids below which nothing is drafted.
        clock: tells seconds.

    Attributes:
        seconds: of drafting one token deeper, or along a path of another drafter.
        catching_up: seconds that the last draft took for what the target had read since long, such
            as the prompt.
        hits: how many of the likeliest tokens were right, if all before them were.
        followed: the tokens that the last look went along.

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
        self._step, self.catching_up = _Step(network), 0.0
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

    def start(self, prompt: IntArray) -> None:
        """Begin a request; nothing is run before a draft is asked for."""
        self._context: list[int] = prompt.tolist()
        self._first = self._read = 0
        self._output: torch.Tensor | None = None
        self._levels: list[tuple[list[int], list[float]]] = []
        self.followed: list[int] = []

    def fits(self) -> bool:
        """Whether there is something to draft from: states, and the token behind them."""
        states = self.target.cache.states
        return states is not None and states.start < states.end < len(self._context)

    def propose(self, limit: int, floor: float = 0.0) -> DraftTree:
        """The tree of at most ``limit`` nodes that may pay (see ``Drafter.propose``)."""
        if limit <= 0 or not self.fits():
            self._levels, self.followed = [], []
            return EMPTY_TREE
        self.look(limit, floor)
        tokens: list[int] = []
        parents: list[int] = []
        survival: list[float] = []
        above, before = int(ROOT), 1.0
        for words, chances in self.foreseen():
            here = len(tokens)
            tokens += words
            parents += [above] * len(words)
            survival += [before * chance for chance in chances]
            above, before = here, survival[here]
        source = [int(Source.OTHER)] * len(tokens)
        return DraftTree.best_first(tokens, parents, survival, source, limit, floor)

    @torch.inference_mode()
    def look(self, limit: int, floor: float, step: float = np.inf) -> None:
        """Go along its own likeliest tokens, as far as it may pay, and see what else may follow.

        Args:
            limit: most nodes.
            floor: see ``Drafter.propose``.
            step: seconds that the target takes for one token.
        """
        started = self.clock()
        share = self.seconds / step
        output, at = self._catch_up()
        self._levels, self.followed, survival, promised = [], [], 1.0, 1.0
        for depth in range(DEPTH):
            words, chances = self._likeliest(output)[0]
            self._levels.append((words, chances))
            self.followed.append(words[0])
            survival *= self.confidence.of(chances[0])
            promised += survival
            bar = promised * (floor + share) / (1.0 + (depth + 1) * share)
            if depth + 1 == DEPTH or words[0] in self._ends:
                break
            if survival * self.hits.ratio < bar or depth + 1 >= limit:
                break
            output = self._pass([words[0]], output, at + depth + 1)
        self._spent((self.clock() - started - self.catching_up) / len(self._levels))

    @torch.inference_mode()
    def look_along(self, path: Sequence[int]) -> None:
        """Read a path that another drafter proposes, and what this one would say beside it.

        One pass reads the whole path: it says what may follow behind each of its tokens
        (:meth:`foreseen`).

        Args:
            path: tokens, :data:`ALONG` at most.
        """
        started = self.clock()
        self._levels, self.followed = self._likeliest(self._read_along(path)), list(path)
        self._spent((self.clock() - started - self.catching_up) / 2)

    def foreseen(self) -> list[tuple[list[int], list[float]]]:
        """The tokens, and how likely they are, at each place of the last look."""
        sure = self.confidence.of
        return [(words, [sure(chance) for chance in chances]) for words, chances in self._levels]

    def _spent(self, seconds: float) -> None:
        """Note what a pass took: the mean counts, since dear ones are paid for too."""
        self.seconds += (min(seconds, 4 * self.seconds) - self.seconds) / 16

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
        self, words: Sequence[int], states: torch.Tensor, at: int, *, every: bool = False
    ) -> torch.Tensor:
        """Rows from place ``at`` on behind those read: the output [1, d] of the last, or of all."""
        ids = torch.tensor(words, device=self._ids.device)
        return self._step(self._words(ids).to(states), states, at, at - self._first, every=every)

    def _likeliest(self, outputs: torch.Tensor) -> list[tuple[list[int], list[float]]]:
        """The likeliest tokens of each output [n, d], and how likely it says they are."""
        scores = functional.linear(outputs, self.network.head.weight).float()
        best, places = scores.topk(min(BRANCHES, len(self._ids)))
        chances = (best - scores.logsumexp(-1, keepdim=True)).exp()
        return list(zip(self._ids[places].tolist(), chances.tolist(), strict=True))

    def commit(self, tokens: IntArray, verified: int, path: Sequence[int]) -> None:
        """Learn from the outcome, and go on behind ``tokens``."""
        said: list[int] = tokens.tolist()
        for depth, (token, (words, chances)) in enumerate(zip(said, self._levels, strict=False)):
            for word, chance in zip(words, chances, strict=True):
                self.confidence.learn(chance, word == token)
            self.hits.record(1.0, words[0] == token)
            if self.followed[depth : depth + 1] != [token]:
                break
        self._levels, self.followed = [], []
        self._context += said


class _Step:
    """:meth:`DraftNetwork.unroll` for rows that come one after the other, with their keys kept.

    Matrices that read the same are one, and turns are looked up: at such sizes a step's time is the
    number of its operations. Where the network's weights change, make it anew.
    """

    def __init__(self, network: DraftNetwork) -> None:
        net, self._shape = network, network.shape
        self._net = net
        self._qkv = torch.cat((net.q.weight, net.k.weight, net.v.weight))
        self._gate_up = torch.cat((net.gate.weight, net.up.weight))
        nothing = self._qkv.new_zeros(self._shape.kv_heads, 0, self._shape.head_dim)
        self._keys, self._values, self._cos = nothing, nothing, self._qkv.new_zeros(0)
        self._sin = self._cos

    def _make_room(self, capacity: int) -> None:
        old = self._keys, self._values
        size = (self._shape.kv_heads, max(capacity, _FIRST_CAPACITY), self._shape.head_dim)
        self._keys, self._values = (self._qkv.new_zeros(size) for _ in "kv")
        for new, was in zip((self._keys, self._values), old, strict=True):
            new[:, : was.shape[1]] = was

    def _turns(self, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        if len(self._cos) < end:
            places = torch.arange(2 * max(end, _FIRST_CAPACITY), dtype=torch.float32)
            angle = places[:, None] * self._net.turns
            angle = torch.cat((angle, angle), dim=-1)[:, None]
            self._cos, self._sin = angle.cos().to(self._qkv), angle.sin().to(self._qkv)
        return self._cos, self._sin

    def __call__(
        self, words: torch.Tensor, states: torch.Tensor, at: int, slot: int, *, every: bool = False
    ) -> torch.Tensor:
        """The output [1, d] of the last of some rows.

        Args:
            words: [n, d] embeddings of the token behind each row.
            states: [n, d] as :meth:`DraftNetwork.mix` takes them.
            at: place of the first row in the text.
            slot: rows that are kept already, which all of these see.
            every: give the outputs [n, d] of all.
        """
        net, shape, n = self._net, self._shape, len(words)
        end, heads = slot + n, shape.heads + shape.kv_heads
        if end > self._keys.shape[1]:
            self._make_room(2 * end)
        made = functional.linear(net.mix(words, states), self._qkv).view(n, -1, shape.head_dim)
        cos, sin = (part[at : at + n] for part in self._turns(at + n))
        first, second = made[:, :heads].chunk(2, dim=-1)
        turned = made[:, :heads] * cos + torch.cat((-second, first), dim=-1) * sin
        self._keys[:, slot:end] = turned[:, shape.heads :].transpose(0, 1)
        self._values[:, slot:end] = made[:, heads:].transpose(0, 1)
        asked = n if every else 1
        mask = None
        if asked > 1:
            mask = torch.arange(end) <= torch.arange(slot, end)[:, None]
        attended = functional.scaled_dot_product_attention(
            turned[-asked:, : shape.heads].transpose(0, 1)[None],
            self._keys[None, :, :end],
            self._values[None, :, :end],
            attn_mask=None if mask is None else mask.to(self._keys.device),
            enable_gqa=shape.heads != shape.kv_heads,
        )
        x = states[-asked:] + net.o(attended[0].transpose(0, 1).reshape(asked, -1))
        gate, up = functional.linear(net.mlp_norm(x), self._gate_up).chunk(2, dim=-1)
        output: torch.Tensor = net.norm(x + net.down(functional.silu(gate) * up))
        return output


def open_trained(pack: Pack, target: Target, end_tokens: Sequence[int]) -> TrainedDrafter:
    """The drafter that was trained for a pack's model, over a target of it.

    It warns where it is worse on the answers that were kept with it (:class:`Canary`).

    Raises:
        PackError: it is damaged.
        FingerprintError: it was trained for another model or tokenizer.
    """
    network, ids, info = load_drafter(pack.drafter, target.model, pack.info.fingerprint)
    if info.canary is not None:
        info.canary.warn_if_worse(target.model, network, DraftVocabulary(ids))
    return TrainedDrafter(network, ids, target, end_tokens=end_tokens)

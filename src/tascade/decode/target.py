"""The target model behind one call: a forward over one token, a chain or a tree."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tascade.core import ROOT, DraftTree, IntArray
from tascade.decode.cache import RewindableCache
from tascade.decode.exclusive import exclusive
from tascade.decode.lm_head import HeadLike, SmallHead, SmallLogits, head_override, ids_device
from tascade.decode.mask import MaskBuilder, ancestors, attention_windows, depths
from tascade.decode.prefixes import Kept, Prefixes
from tascade.decode.products import few_rows
from tascade.decode.rope import Rope
from tascade.decode.row_counts import KEY_BLOCK, RowCounts, row_counts
from tascade.decode.supported import check_rewindable, table_of_positions, table_rows
from tascade.decode.taps import CachedStates, Taps
from tascade.errors import TascadeError
from tascade.util.cpu import multiplies

if TYPE_CHECKING:
    from tascade.decode.loop import Request

_TREE_ATTENTION = ("sdpa", "eager")
_GRAIN = 16
PREFILL_DRAFT_LIMIT = 2048
"""Longest prompt, in tokens, whose prefill also verifies a draft (its mask is dense)."""


@dataclass(slots=True, eq=False)
class Hold:
    """A request's hold on a target, which others may take between two of its steps.

    ``returns``: whether it comes back then. ``cache``: what is kept for it meanwhile.
    """

    returns: bool = False
    cache: RewindableCache | None = None


class Target:
    """Runs an unmodified Transformers causal model over a :class:`RewindableCache`.

    ``grain``: prefills are filled up to a multiple of so many tokens, 0 for not at all.
    Holds one request's cache at a time; :meth:`begin` forgets the request before and keeps buffers.
    Not for two threads at once: whoever takes a step holds ``lock``, and nobody from step to step.

    Args:
        model: a causal model.
        head: a head of fewer tokens to use instead of the model's own, which stays in place.
        whole: computes what the model's own head would, where ``head`` is taken off; that itself by
            default.
        prefixes: beginnings of prompts whose keys are kept; none by default.

    Attributes:
        states: [1 + N, d] the final hidden states behind the last logits; only with a ``head``.
        scores: [1 + N, n] the last logits as a small head gave them.
        counts: of rows in a pass, in half precision on a CPU; ``None`` for any, and where no such
            counts were found: then words may differ from plain decoding's by rounding.
        taps: take hidden states for a drafter that reads them; ``None`` where none does.
        hold: of the request whose cache this is; ``None`` where it is nobody's.
    """

    def __init__(
        self,
        model: Any,
        head: SmallHead | None = None,
        whole: HeadLike | None = None,
        prefixes: Prefixes | None = None,
    ) -> None:
        check_rewindable(model)
        self.model, self.head, self.whole = model, head, whole
        self.prefixes = prefixes or Prefixes(())
        self._slot = None if head is None else head_override(model)
        self.states = self.scores = torch.empty(0)
        self.config, self.rows = model.config.get_text_config(), table_rows(model)
        self.cache = RewindableCache()
        self.taps: Taps | None = None
        self.hold: Hold | None = None
        self.lock = threading.RLock()
        self._stepping = False
        self.device: torch.device = model.device
        self._ids_device = ids_device(model)
        self.supports_trees = self.config._attn_implementation in _TREE_ATTENTION
        compiled = self.device.type == "cpu" and model.dtype.itemsize < 4
        self.grain = _GRAIN if compiled else 0
        # Elsewhere nothing could be promised, and to find that out takes minutes.
        self._rounds = compiled and self.supports_trees and multiplies(model.dtype)
        self.counts: RowCounts | None = None
        self._masks = {
            kind: MaskBuilder(model.dtype, self.device, window)
            for kind, window in attention_windows(model).items()
        }
        self.rope = Rope(model)

    def tap(self, layers: Sequence[int]) -> None:
        """Keep the states that enter these layers in ``cache.states`` from now on.

        Raises:
            UnsupportedModelError: see :class:`tascade.decode.taps.Taps`.
        """
        if self.taps is not None and self.taps.layers == tuple(layers):
            return
        self.taps, self.cache.states = Taps(self.model, layers), CachedStates()
        self.cache.truncate(0)  # what is there is read again, by whoever it is of

    @property
    def parts(self) -> tuple[Any, HeadLike | None, Prefixes]:
        """The model, its whole head and the prefixes: what another target over it is made of."""
        return self.model, self.whole, self.prefixes

    @property
    def vocab_size(self) -> int:
        """Number of logits a forward returns."""
        return int(self.config.vocab_size)

    @property
    def context(self) -> int | None:
        """Most tokens the model was made for, prompt and answer together, where it says so."""
        most = getattr(self.config, "max_position_embeddings", None)
        return int(most) if most else None

    @property
    def positions(self) -> int | None:
        """Most tokens that it can place: the length of its table of positions; ``None`` for any."""
        return table_of_positions(self.config)

    @property
    def length(self) -> int:
        """Tokens whose keys and values are cached."""
        return self.cache.length

    def room(self, base: int, unread: int = 1) -> int | None:
        """How many nodes a draft may have behind ``base`` tokens; ``None`` for any number.

        ``unread``: how many of these tokens are read in the same pass.
        """
        room = self.rope.room(base)
        if self.counts is None:
            return room
        fitting = max(0, self.counts.most - unread)
        return fitting if room is None else min(room, fitting)

    @property
    def key_block(self) -> int:
        """Attention is shown a multiple of so many keys."""
        return KEY_BLOCK if self._rounds else 1

    def filling_of(self, requests: int, n: int, past: int) -> int:
        """How many idle tokens go behind the ``n`` of each request of a batch.

        One alone is filled up as :meth:`forward` does it; of several, each is two rows at least
        where all together are of a count that agrees.
        """
        self._find_counts()
        if requests == 1:
            return self._filling(past, n, 0)
        agreed = self.counts is not None and 2 * requests in self.counts.counts
        return 1 if agreed and n == 1 else 0

    def _find_counts(self) -> None:
        """Have the row counts that agree under the present conditions, where rounding counts.

        They are looked for once for a model, with the cache of this target, which is empty then.
        """
        if not self._rounds:
            return
        head, self.head = self.head, None
        try:
            with torch.inference_mode():
                self.counts = row_counts(self.model, self._logits_behind)
        finally:
            self.head = head

    def _logits_behind(
        self, ids: list[int], past: int, counts: Sequence[int]
    ) -> dict[int, torch.Tensor]:
        self.cache.truncate(0)
        self.forward(ids[:past])
        found = {}
        for n in counts:
            logits = self.forward(ids[past : past + 1], DraftTree.chain(ids[past + 1 : past + n]))
            assert isinstance(logits, torch.Tensor)
            found[n] = logits
            self.cache.truncate(past)
        self.cache.truncate(0)
        return found

    def unread(self, request: Request) -> list[int]:
        """The request's tokens that the next forward must read: those whose keys are not cached.

        The last one, and those that :meth:`keep` left out; or all, where the model's own
        ``generate`` reads them anew at this length.
        """
        prompt, output = request.prompt, request.result.tokens
        if self.rope.is_stale(self.cache.long, len(prompt) + len(output)):
            self.cache.truncate(0)
        cached = self.cache.length
        if cached >= len(prompt):
            return output[min(cached - len(prompt), len(output) - 1) :]
        return [*prompt[cached:].tolist(), *output]

    @contextmanager
    def step(self) -> Iterator[None]:
        """A step of a request, which nothing else may come into.

        Raises:
            TascadeError: it was begun by something that a step of another request called.
        """
        with self.lock:
            if self._stepping:
                raise TascadeError(
                    "a request was begun from within a step of another one",
                    got="a logits processor or a stopping rule that generates",
                    fix="generate before or after it, or with another TaskModel",
                )
            self._stepping = True
            try:
                yield
            finally:
                self._stepping = False

    def begin(self, prompt: IntArray | None = None, hold: Hold | None = None) -> None:
        """Start a new request with an empty cache; a small head takes the tokens of ``prompt``."""
        self._leave()
        self.hold = hold
        self.cache.truncate(0)
        self._find_counts()
        if self.head is not None and prompt is not None:
            self.head.begin(prompt)

    def go_on(self, prompt: IntArray, hold: Hold) -> None:
        """Take up a request again, with its cache, that another one has come between."""
        assert hold.cache is not None
        self._leave()
        self.cache, hold.cache, self.hold = hold.cache, None, hold
        if self.head is not None:
            self.head.begin(prompt)

    def _leave(self) -> None:
        before = self.hold
        if before is not None and before.returns:
            before.cache, self.cache = self.cache, RewindableCache()
            self.cache.states = None if self.taps is None else CachedStates()

    def end(self, hold: Hold) -> None:
        """A request has ended or was given up: give back memory that only a long one needs.

        May be called at any time and from any thread, as when a generator is collected.
        """
        hold.returns, hold.cache = False, None
        if self.lock.acquire(blocking=False):  # whoever has it now begins with what is there
            try:
                if self.hold is hold and not self._stepping:
                    self.hold = None
                    self.cache.give_back()
            finally:
                self.lock.release()

    def recall(self, prompt: IntArray) -> int:
        """Put the keys of the prompt's known beginning into the empty cache; how many tokens."""
        if self.rope.changes:
            return 0
        if ids := self.prefixes.of(prompt):
            self.cache.write(self.prefixes.recall(ids, self.model, lambda: self._read(ids)))
        return len(ids)

    def _read(self, ids: list[int]) -> Kept:
        self.forward(ids)
        self.cache.truncate(len(ids))
        kept = self.cache.read(len(ids))
        self.cache.truncate(0)
        return kept

    def forward(
        self, tokens: Sequence[int], tree: DraftTree | None = None
    ) -> torch.Tensor | SmallLogits:
        """Run ``tokens`` and then the tree's nodes, all behind the cached prefix.

        Args:
            tokens: [T] consecutive committed tokens, at least one.
            tree: drafted nodes below the last of ``tokens``; ``None`` or empty for none.

        Returns:
            [1 + N, V] logits: after the last of ``tokens``, and after each node; with a small
            head, rows of it are made when they are looked at.
        """
        past, t = self.cache.length, len(tokens)
        n = 0 if tree is None else len(tree)
        fill = self._filling(past, t, n)
        ids = list(tokens) if tree is None or n == 0 else [*tokens, *tree.tokens.tolist()]
        positions = torch.arange(past, past + t + n + fill, device=self.device)[None]
        self.rope.reset()
        self.cache.long = self.rope.is_long(past + t)
        positions[0, t + n :] = past + t - 1  # never past the edge of the position table
        long = past == 0 and n == 0 and t > PREFILL_DRAFT_LIMIT
        self.cache.block.size = 1 if long else self.key_block
        keys = self.cache.block.filled(past + t + n + fill)
        if long:
            mask = None  # the kernel's own causal path: a dense mask would take memory ~ T * T
        elif tree is None or n == 0 or tree.is_chain:
            rows = t + n + fill
            mask = self._select({k: m.causal(past, rows, keys) for k, m in self._masks.items()})
        else:
            parents = np.concatenate((tree.parents, np.full(fill, ROOT, np.int32)))
            depth, seen = depths(parents), ancestors(parents)
            positions[0, t:] = past + t - 1 + torch.from_numpy(depth).to(self.device)
            mask = self._select(
                {
                    k: self._tree_mask(m, (past, t, keys), seen, depth)
                    for k, m in self._masks.items()
                }
            )
        guest = self.whole if self.head is None else self.head
        with (
            exclusive(self.model),
            few_rows(self.model, t + n + fill),
            nullcontext() if self._slot is None else self._slot.using(guest),
            nullcontext() if self.taps is None else self.taps.taking(),
        ):
            output = self.model(
                input_ids=torch.tensor([ids + [ids[-1]] * fill], device=self._ids_device),
                attention_mask=mask,
                position_ids=positions,
                past_key_values=self.cache,
                use_cache=True,
                # Two at least, so that the head's kernel is that of several rows.
                logits_to_keep=max(2, 1 + n + fill),
            )
        if self.taps is not None and self.cache.states is not None:
            self.cache.states.passed(past, tuple(part[0] for part in self.taps.states))
        asked = slice(-(1 + n + fill), -fill or None)
        if self._slot is not None:
            self.states = self._slot.states[0, asked]
        logits: torch.Tensor = output.logits[0, asked]
        if self.head is None:
            return logits
        self.scores = logits
        return SmallLogits(self.head, logits)

    def _filling(self, past: int, t: int, n: int) -> int:
        """How many idle tokens to put behind ``t`` tokens and ``n`` nodes; nothing looks at them.

        Up to a count of rows whose rounding is the others'. A prefill is filled up as well: every
        new length makes the matrix library compile kernels anew (5-10 ms on an 8-layer model, a
        third of a prefill of 250 tokens), so few lengths, few times.
        """
        rows = t + n
        if self.counts is not None and rows <= self.counts.most:
            return self.counts.fit(rows) - rows
        if self.grain == 0 or rows < self.grain or (past > 0 and n > 0):
            return 0
        grain = max(self.grain, 1 << (rows.bit_length() - 4))
        return -rows % grain

    def _tree_mask(
        self, masks: MaskBuilder, place: tuple[int, int, int], seen: Any, depth: Any
    ) -> torch.Tensor:
        past, t, keys = place
        tail = masks.tree(past + t - 1, seen, depth, keys)
        if t == 1:
            return tail
        return torch.cat([masks.causal(past, t - 1, keys), tail], dim=2)

    def _select(self, masks: dict[str, torch.Tensor]) -> Any:
        if not self.supports_trees:
            return None  # other kernels build their own causal mask, and take chains alone
        return masks if len(masks) > 1 else next(iter(masks.values()))

    def keep(self, base: int, slots: Sequence[int]) -> None:
        """Keep ``base`` cached tokens and the slots behind it that were accepted.

        Where rounding counts, only those that are in place: a branch beside the likeliest path was
        summed in another order than plain decoding's, and its tokens are read again, in the next
        pass.
        """
        if self.counts is not None:
            slots = slots[: next((i for i, slot in enumerate(slots) if slot != i), len(slots))]
        self.cache.keep(min(base, self.cache.length), slots)

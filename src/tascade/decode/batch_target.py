"""The target model over a batch of requests, each of its own length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tascade.core import IntArray
from tascade.decode.batch_cache import RaggedCache
from tascade.decode.exclusive import exclusive
from tascade.decode.lm_head import HeadLike, HeadOverride, head_override, ids_device
from tascade.decode.mask import attention_windows
from tascade.decode.prefixes import Kept, Prefixes
from tascade.decode.products import few_rows
from tascade.decode.rope import Rope
from tascade.decode.supported import check_rewindable, table_of_positions, table_rows
from tascade.decode.target import PREFILL_DRAFT_LIMIT, Target
from tascade.errors import UnsupportedModelError

_MASKED_ATTENTION = ("sdpa", "eager")


class BatchTarget:
    """Runs an unmodified Transformers causal model over a :class:`RaggedCache`.

    Rows of the batch are requests; the tokens of a forward go behind what their row holds. What a
    row sees are its own tokens, so that nothing depends on who else is in the batch.

    Args:
        model: a causal model.
        whole: computes what the model's own LM head would; that itself by default.
        prefixes: beginnings of prompts whose keys are kept; none by default.

    Attributes:
        slot: where the model's LM head is changed.
        alone: a batch must be of one request, since the model turns its rotary frequencies by the
            longest one there.

    Raises:
        UnsupportedModelError: as :func:`check_rewindable`; attention kernels that take no mask.
    """

    def __init__(
        self, model: Any, whole: HeadLike | None = None, prefixes: Prefixes | None = None
    ) -> None:
        check_rewindable(model)
        self.config = model.config.get_text_config()
        attention = self.config._attn_implementation
        if attention not in _MASKED_ATTENTION:
            raise UnsupportedModelError(
                "this attention kernel takes no mask of its own for each request of a batch",
                got=attention,
                wanted=" or ".join(_MASKED_ATTENTION),
                fix="load the model with attn_implementation='sdpa', or decode one by one",
            )
        self.model, self.prefixes = model, prefixes or Prefixes(())
        self.slot: HeadOverride = head_override(model)
        self.whole: HeadLike = whole or self.slot.full
        self.device: torch.device = model.device
        self._ids_device = ids_device(model)
        self.cache = RaggedCache()
        self.positions, self.rows = table_of_positions(self.config), table_rows(model)
        self.rope = Rope(model)
        self.alone, self._long = self.rope.by_longest, False
        # How one request alone is read: the same rows, for the same bits.
        self._single = Target(model)
        self.context = self._single.context
        self._windows = attention_windows(model)

    def forward(
        self, tokens: Sequence[Sequence[int]], head: HeadLike, first: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run each row's tokens behind what it holds.

        Args:
            tokens: [B, n] of rows ``first`` and on.
            head: the LM head to use.
            first: the first row; rows that are not there yet are new requests.

        Returns:
            The model's logits [B, n] and final states [B, d], after the last token of each row.
        """
        self.rope.reset()
        cache, n = self.cache, len(tokens[0])
        rows = slice(first, first + len(tokens))
        cache.lengths += [0] * (rows.stop - len(cache.lengths))
        fill = self._single.filling_of(len(tokens), n, max(cache.lengths[rows]))
        ids = torch.tensor([[*row, *[row[-1]] * fill] for row in tokens], device=self._ids_device)
        past = torch.tensor(cache.lengths[rows], device=self.device)[:, None]
        slots = past + torch.arange(n + fill, device=self.device)[None]
        reach = max(cache.lengths[rows]) + n
        dense = reach > n or n <= PREFILL_DRAFT_LIMIT
        longest = cache.aim(rows, slots, self._single.key_block if dense else 1)
        self._long = self.rope.is_long(reach)
        states: list[torch.Tensor] = []

        def at_last(hidden: torch.Tensor) -> torch.Tensor:
            states.append(hidden[:, n - 1])
            if head is not self.whole or len(tokens) > 1:
                return head(states[0])[:, None]
            return head(hidden[0, [n - 1, n - 1]])[:1, None]  # one row alone has another kernel

        with exclusive(self.model), few_rows(self.model, ids.numel()), self.slot.using(at_last):
            output = self.model(
                input_ids=ids,
                # Without a mask: the kernel's own causal path, whose memory does not grow as T * T.
                attention_mask=self._masks(slots, longest) if dense else None,
                position_ids=slots.minimum(past + n - 1),
                past_key_values=cache,
                use_cache=True,
            )
        for row in range(rows.start, rows.stop):
            cache.lengths[row] += n
        return output.logits[:, 0], states[0]

    def recall(self, row: int, prompt: IntArray) -> int:
        """Begin a row with the keys of its prompt's known beginning; how many tokens."""
        ids = [] if self.rope.changes else self.prefixes.of(prompt)
        if ids:
            kept = self.prefixes.recall(ids, self.model, lambda: self._read(row, ids))
            self.cache.write(row, kept)
        return len(ids)

    def _read(self, row: int, ids: list[int]) -> Kept:
        self.forward([ids], self.whole, row)
        self.cache.lengths[row] = 0
        return self.cache.read(row, len(ids))

    def unread(self, row: int, prompt: IntArray, output: Sequence[int]) -> list[int]:
        """A row's tokens that the next forward must read, as :meth:`Target.unread`."""
        if self.alone and self.rope.is_stale(self._long, len(prompt) + len(output)):
            self.cache.lengths[row] = 0
            return [*prompt.tolist(), *output]
        return [*output[-1:]]

    def _masks(self, slots: torch.Tensor, longest: int) -> Any:
        """Additive masks [B, 1, n, longest] by the kind of layer. A slot's number is its place."""
        columns = torch.arange(longest, device=self.device)
        dtype = self.model.dtype
        masks = {}
        for kind, window in self._windows.items():
            hidden = columns > slots[..., None]
            if window is not None:
                hidden |= slots[..., None] - columns >= window
            mask = torch.zeros(hidden.shape, dtype=dtype, device=self.device)
            masks[kind] = mask.masked_fill_(hidden, torch.finfo(dtype).min)[:, None]
        return masks if len(masks) > 1 else next(iter(masks.values()))

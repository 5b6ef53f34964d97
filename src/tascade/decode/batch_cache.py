"""A key-value cache for requests of different lengths: each row of the batch has its own."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from tascade.decode.prefixes import Kept

_FIRST_CAPACITY = 256
_KEPT = 4
"""Room stays while it is at most so many times what the requests present need."""
_KEPT_IDLE = 2048
"""And between batches while it is at most so many slots: what it takes to make more of them anew is
nothing beside reading prompts of that length.
"""


@dataclass(slots=True)
class WriteIndex:
    """Where a forward's states go.

    rows: of the batch. slots: [n_rows, n] for each row's tokens. longest: how many slots of these
    rows a query is shown. needed: how many any row uses, those of other rows included.
    """

    rows: slice = field(default_factory=lambda: slice(0, 0))
    slots: torch.Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.long))
    longest: int = 0
    needed: int = 0


class RaggedLayer(CacheLayerMixin):  # type: ignore[misc]
    """Keys and values of one layer: [B, H, capacity, D]. ``aim`` is shared by all layers."""

    is_sliding = False
    is_croppable = True

    def __init__(self, aim: WriteIndex) -> None:
        super().__init__()
        self.aim = aim

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Begin without room, in the kind of the first states seen. [n_rows, H, n, D] each."""
        self.keys, self.values = key_states.new_zeros(0), value_states.new_zeros(0)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write new states at their slots. Returns views of the rows, up to the longest."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        aim = self.aim
        self.keys = _with_room(self.keys, key_states, aim)
        self.values = _with_room(self.values, value_states, aim)
        rows = torch.arange(aim.rows.start, aim.rows.stop, device=aim.slots.device)[:, None]
        self.keys[rows, :, aim.slots] = key_states.transpose(1, 2)
        self.values[rows, :, aim.slots] = value_states.transpose(1, 2)
        return self.keys[aim.rows, :, : aim.longest], self.values[aim.rows, :, : aim.longest]

    @property
    def room(self) -> int:
        """Slots that each row has."""
        return 0 if self.keys.dim() < 4 else self.keys.shape[2]

    def move(self, source: int, target: int) -> None:
        """Copy a row over another."""
        self.keys[target], self.values[target] = self.keys[source], self.values[source]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys that a query sees."""
        return self.aim.longest, 0

    def get_seq_length(self) -> int:
        """Slots of the longest row before this forward."""
        return self.aim.longest - self.aim.slots.shape[1]

    def get_max_length(self) -> int:
        """No maximum."""
        return -1


def _with_room(old: torch.Tensor, states: torch.Tensor, aim: WriteIndex) -> torch.Tensor:
    batch, capacity = (0, 0) if old.dim() < 4 else (old.shape[0], old.shape[2])
    rows, wanted = max(batch, aim.rows.stop), capacity
    if not aim.needed <= capacity <= _KEPT * max(_FIRST_CAPACITY, aim.needed):
        # A quarter more than is needed, for the tokens to come.
        wanted = _FIRST_CAPACITY * -(-(aim.needed + aim.needed // 4) // _FIRST_CAPACITY)
    if (rows, wanted) == (batch, capacity):
        return old
    # Zeros: a slot that was never written is read too, and weighed with nothing.
    new = old.new_zeros(rows, states.shape[1], wanted, states.shape[3])
    if batch:
        kept = min(wanted, capacity)
        new[:batch, :, :kept] = old[:, :, :kept]
    return new


class RaggedCache(Cache):  # type: ignore[misc]
    """A Transformers cache whose rows have lengths of their own.

    Attributes:
        lengths: tokens in use, a number for each row.
    """

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=self._new_layer)
        self.lengths: list[int] = []
        self._aim = WriteIndex()

    def _new_layer(self) -> RaggedLayer:
        return RaggedLayer(self._aim)

    def aim(self, rows: slice, slots: torch.Tensor, block: int = 1) -> int:
        """Say where the next forward's states go.

        Args:
            rows: of the batch; a row that is not there yet is added, empty.
            slots: [n_rows, n] for each of its tokens.
            block: queries are shown a multiple of so many slots.

        Returns:
            How many slots the forward's queries are shown.
        """
        self.lengths += [0] * (rows.stop - len(self.lengths))
        longest = int(slots.max()) + 1
        longest += -longest % block
        self._aim.rows, self._aim.slots, self._aim.longest = rows, slots, longest
        self._aim.needed = max(longest, *self.lengths)
        return longest

    def read(self, row: int, length: int) -> Kept:
        """Copies of the first ``length`` slots of a row."""
        at = slice(row, row + 1)
        return [
            (layer.keys[at, :, :length].clone(), layer.values[at, :, :length].clone())
            for layer in self.layers
        ]

    def write(self, row: int, kept: Kept) -> None:
        """Make these a row's first slots; a row that is not there yet is added."""
        length = kept[0][0].shape[2]
        self.aim(slice(row, row + 1), torch.arange(length, device=kept[0][0].device)[None])
        for number, (keys, values) in enumerate(kept):
            self.update(keys, values, number)
        self.lengths[row] = length

    @torch.inference_mode()
    def remove(self, row: int) -> None:
        """Drop a row; the last one takes its place."""
        last = len(self.lengths) - 1
        if row != last:
            for layer in self.layers:
                layer.move(last, row)
            self.lengths[row] = self.lengths[last]
        self.lengths.pop()

    def clear(self) -> None:
        """Drop all rows, and the room that long ones have made."""
        self.lengths.clear()
        if self.layers and self.layers[0].is_initialized and self.layers[0].room > _KEPT_IDLE:
            self.layers.clear()

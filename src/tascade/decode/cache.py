"""A key-value cache that can be rewound, and that keeps a tree's accepted path in place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from tascade.decode.prefixes import Kept
from tascade.decode.taps import CachedStates

_FIRST_CAPACITY = 512
_KEPT = 4
"""Buffers stay from request to request while they are at most so many times as long as needed."""


@dataclass(slots=True)
class KeyBlock:
    """How many keys attention is shown: a multiple of ``size``, which all layers share."""

    size: int = 1

    def filled(self, keys: int) -> int:
        """``keys``, up to the next multiple."""
        return keys + -keys % self.size


class RewindableLayer(CacheLayerMixin):  # type: ignore[misc]
    """Keys and values of one layer in buffers that are allocated once and grow by doubling.

    keys, values: [B, H, capacity, D]; the first ``length`` slots are in use. Sliding-window layers
    are kept whole as well: their window is the mask's business, and a window that has dropped its
    oldest entries could not be rewound.
    """

    is_sliding = False
    is_croppable = True

    def __init__(self, block: KeyBlock) -> None:
        super().__init__()
        self.length, self.block = 0, block

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate buffers shaped like the first states seen. [B, H, n, D] each."""
        capacity = max(_FIRST_CAPACITY, 2 * key_states.shape[2])
        self.keys = _buffer(key_states, capacity)
        self.values = _buffer(value_states, capacity)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write new states behind the used slots. Returns views of all used slots, filled up to a
        multiple of the block: the mask hides what is behind them.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.length + key_states.shape[2]
        shown = self.block.filled(end)
        if shown > self.keys.shape[2]:
            self._grow(shown)
        self.keys[:, :, self.length : end] = key_states
        self.values[:, :, self.length : end] = value_states
        self.length = end
        return self.keys[:, :, :shown], self.values[:, :, :shown]

    def _grow(self, needed: int) -> None:
        self._resize(max(needed, 2 * self.keys.shape[2]))

    def give_back(self) -> None:
        """Take smaller buffers, if what is in use would fit into a fraction of these."""
        needed = max(_FIRST_CAPACITY, self.length)
        if self.is_initialized and self.keys.shape[2] > _KEPT * needed:
            self._resize(needed)

    def _resize(self, capacity: int) -> None:
        for name in ("keys", "values"):
            old: torch.Tensor = getattr(self, name)
            new = _buffer(old, capacity)
            new[:, :, : self.length] = old[:, :, : self.length]
            setattr(self, name, new)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys a query of this length will see."""
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        """Slots in use."""
        return self.length

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    def reset(self) -> None:
        """Forget everything, keep the buffers."""
        self.length = 0

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last ``-tokens_to_remove`` slots (Transformers counts them below zero)."""
        self.length -= abs(tokens_to_remove)


def _buffer(like: torch.Tensor, capacity: int) -> torch.Tensor:
    shape = (like.shape[0], like.shape[1], capacity, like.shape[3])
    # Zeros: a slot that was never written may be looked at, and is weighed with nothing.
    return torch.zeros(shape, dtype=like.dtype, device=like.device)


class RewindableCache(Cache):  # type: ignore[misc]
    """A Transformers cache of :class:`RewindableLayer`; buffers survive from request to request.

    ``long``: its keys are those of a text past the edge of :class:`~tascade.decode.rope.Rope`.
    ``states``: of what is cached, where something reads them; ``None`` elsewhere.
    """

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=self._new_layer)
        self.long, self.block = False, KeyBlock()
        self.states: CachedStates | None = None
        self._stacks: list[torch.Tensor] = []
        self._stacked: list[torch.Tensor] = []

    def _new_layer(self) -> RewindableLayer:
        return RewindableLayer(self.block)

    @property
    def length(self) -> int:
        """Slots in use."""
        return self.layers[0].length if self.layers else 0

    def read(self, length: int) -> Kept:
        """Copies of the first ``length`` slots of every layer."""
        return [
            (layer.keys[:, :, :length].clone(), layer.values[:, :, :length].clone())
            for layer in self.layers
        ]

    def write(self, kept: Kept) -> None:
        """Put these behind the used slots of every layer."""
        for number, (keys, values) in enumerate(kept):
            self.update(keys, values, number)

    def truncate(self, length: int) -> None:
        """Keep the first ``length`` slots of every layer."""
        if self.states is not None:
            self.states.cut(length)
        for layer in self.layers:
            layer.length = length

    def give_back(self) -> None:
        """Free what a much longer request than the one that is here has made."""
        for layer in self.layers:
            layer.give_back()
        if not self._is_stacked():
            self._stacks, self._stacked = [], []

    def keep(self, base: int, slots: Sequence[int]) -> None:
        """Keep ``base`` slots and then, in this order, the slots at ``base + slots[i]``.

        Only rows that are out of place move: a chain's accepted part is already where it belongs.
        ``slots`` must be strictly increasing.
        """
        if self.states is not None:
            self.states.keep(base, slots)
        n = len(slots)
        moved = next((i for i in range(n) if slots[i] != i), n)
        if moved < n:
            self._stack()
            index = torch.tensor(slots[moved:], device=self._stacks[0].device) + base
            for stack in self._stacks:
                stack[:, :, :, base + moved : base + n] = stack.index_select(3, index)
        self.truncate(base + n)

    def _stack(self) -> None:
        """Lay all buffers of one shape into one tensor, so that rows move in one operation."""
        if self._is_stacked():
            return
        groups: dict[tuple[Any, ...], list[tuple[RewindableLayer, str]]] = {}
        for layer in self.layers:
            for name in ("keys", "values"):
                buffer = getattr(layer, name)
                key = (buffer.shape, buffer.dtype, buffer.device)
                groups.setdefault(key, []).append((layer, name))
        self._stacks = []
        for members in groups.values():
            stack = torch.stack([getattr(layer, name) for layer, name in members])
            for i, (layer, name) in enumerate(members):
                setattr(layer, name, stack[i])
            self._stacks.append(stack)
        self._stacked = [b for layer in self.layers for b in (layer.keys, layer.values)]

    def _is_stacked(self) -> bool:
        buffers = [buffer for layer in self.layers for buffer in (layer.keys, layer.values)]
        return len(buffers) == len(self._stacked) and all(
            a is b for a, b in zip(buffers, self._stacked, strict=True)
        )

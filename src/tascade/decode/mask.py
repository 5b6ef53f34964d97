"""Attention masks for a draft tree behind a cached prefix."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tascade.core import IntArray

_TRIANGLE = 2048


def depths(parents: IntArray) -> npt.NDArray[np.int64]:
    """Depth of each node, 1 below the last committed token. ``parents``: [N]; returns [N]."""
    found: list[int] = []
    for parent in parents.tolist():
        found.append(1 + found[parent] if parent >= 0 else 1)
    return np.asarray(found, np.int64)


def ancestors(parents: IntArray) -> npt.NDArray[np.bool_]:
    """Who sees whom inside the tree: [N, N], true where column is row or its ancestor."""
    n = len(parents)
    width = (n + 7) // 8
    rows: list[int] = []  # one bit for each node seen: a few whole numbers, not N numpy calls
    for i, parent in enumerate(parents.tolist()):
        rows.append(1 << i | (rows[parent] if parent >= 0 else 0))
    packed = np.frombuffer(b"".join(row.to_bytes(width, "little") for row in rows), np.uint8)
    bits = np.unpackbits(packed.reshape(n, width), axis=1, count=n, bitorder="little")
    return bits.view(np.bool_)


class MaskBuilder:
    """Builds additive masks [1, 1, n, K] for ``n`` new tokens behind ``P`` cached ones.

    K is P + n, or ``keys`` where more are shown, of which those behind are hidden.

    Short causal masks are views of one triangle that grows by doubling up to ``_TRIANGLE`` rows;
    longer ones are made row by row, as are a tree's. ``window`` limits how far back a position may
    look, for sliding-window layers: position ``q`` sees ``k`` where ``q - k < window``.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device, window: int | None = None) -> None:
        self.dtype, self.device, self.window = dtype, device, window
        self._blocked = torch.finfo(dtype).min
        self._triangle = torch.empty(0, 0, dtype=dtype, device=device)

    def causal(self, past: int, n: int, keys: int = 0) -> torch.Tensor:
        """The mask of ``n`` consecutive tokens."""
        keys = max(keys, past + n)
        if keys > _TRIANGLE:
            return self.tree(past, np.tri(n - 1, dtype=bool), np.arange(1, n), keys)
        if keys > len(self._triangle):
            self._grow(keys)
        return self._triangle[past : past + n, :keys][None, None]

    def tree(
        self,
        past: int,
        seen: npt.NDArray[np.bool_],
        depth: npt.NDArray[np.int64],
        keys: int = 0,
    ) -> torch.Tensor:
        """The mask of ``1 + N`` tokens: the last committed token, then a draft tree's nodes.

        ``seen``: [N, N] from :func:`ancestors`; ``depth``: [N] from :func:`depths`.
        """
        n = 1 + len(depth)
        block = np.zeros((n, n), bool)
        block[:, 0] = True
        block[1:, 1:] = seen
        position = np.concatenate(([0], depth))
        if self.window is not None:
            block &= position[:, None] - position[None, :] < self.window
        keys = max(keys, past + n)
        rows = torch.zeros(n, keys, dtype=self.dtype, device=self.device)
        rows[:, past + n :] = self._blocked
        values = np.where(block, np.float32(0), np.float32(self._blocked))
        rows[:, past : past + n] = torch.from_numpy(values).to(self.device)
        if self.window is not None and past + int(position.max()) >= self.window:
            back = torch.from_numpy(past + position).to(self.device)[:, None]
            columns = torch.arange(past, device=self.device)[None]
            rows[:, :past].masked_fill_(back - columns >= self.window, self._blocked)
        return rows[None, None]

    def _grow(self, needed: int) -> None:
        size = max(512, 1 << (needed - 1).bit_length())
        full = torch.full((size, size), self._blocked, dtype=self.dtype, device=self.device)
        triangle = full.triu(1)
        if self.window is not None:
            triangle += full.tril(-self.window)
        self._triangle = triangle


def attention_windows(model: Any) -> dict[str, int | None]:
    """By the kind of a model's layers: over how many tokens they look back, ``None`` for all."""
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        kinds = ["sliding_attention" if window else "full_attention"]
    return {kind: window if kind == "sliding_attention" else None for kind in sorted(set(kinds))}

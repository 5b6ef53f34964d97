"""The whole LM head, with its table off the device."""

from __future__ import annotations

from typing import Any

import torch

from tascade.tailor.offload.table import RowTable
from tascade.util.cpu import multiplies

BLOCK_BYTES = 32 << 20
"""Size of the pieces in which a table goes through an accelerator."""
_CACHED_BYTES = 2 << 20
"""Size of a block in float32, which is to stay in a core's cache; never varied."""
_MANY = 6
"""States from which float32 blocks are quicker than one product a state; never varied."""


class FullHead(torch.nn.Module):
    """Logits over the whole vocabulary, from a table the device never holds whole.

    On a CPU, in the precision the table is stored in, it is one product with the table where it
    lies: the very computation of the layer it replaces. Otherwise blocks of rows are converted, or
    go to the device, one after the other: exact up to the order in which a product of another
    shape adds. At most two blocks are on the device at a time. It must not be called from two
    threads at once.

    Args:
        table: rows [V, d].
        bias: [V], or none; in the model's precision.
        block_bytes: size of a block.
    """

    bias: torch.Tensor | None

    def __init__(
        self, table: RowTable, bias: torch.Tensor | None = None, *, block_bytes: int = BLOCK_BYTES
    ) -> None:
        super().__init__()
        self.table = table
        self.out_features, self.in_features = table.shape
        self.register_buffer("bias", bias, persistent=False)
        self._block_rows = max(1, block_bytes * table.shape[0] // table.nbytes)
        self._belt: _Belt | None = None

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [..., V] of hidden states [..., d], in their precision and on their device."""
        on_host = hidden.device.type == "cpu"
        if on_host and hidden.dtype == self.table.dtype:
            return torch.nn.functional.linear(hidden, self.table.rows, self.bias)
        logits = hidden.new_empty(*hidden.shape[:-1], self.table.shape[0])
        for start, block in self.table.blocks(self._block_rows):
            rows = slice(start, start + len(block))
            weight = block if on_host else self._brought(block, hidden.device)
            logits[..., rows] = torch.nn.functional.linear(
                hidden, weight.to(hidden.dtype), None if self.bias is None else self.bias[rows]
            )
        return logits

    def check(self, states: torch.Tensor) -> torch.Tensor:
        """Logits [..., V] of states [..., d], made for many of them.

        They are the layer's up to the order in which a product adds, and rounded as it rounds. A
        CPU without instructions for a half precision multiplies many states no faster than one
        after the other: there the product goes by float32 blocks.
        """
        at_home = states.device.type == "cpu" and states.dtype == self.table.dtype
        count = states.shape[:-1].numel()
        if not at_home or count < _MANY or multiplies(states.dtype):
            logits: torch.Tensor = self(states)
            return logits
        product = _by_blocks(states.reshape(count, -1), self.table.rows, self.bias)
        return product.view(*states.shape[:-1], -1)

    def extra_repr(self) -> str:
        """Size and place of the table, for printing the model."""
        return f"{self.in_features}, {self.out_features}, {self.table.where!r}"

    def _brought(self, block: torch.Tensor, device: torch.device) -> torch.Tensor:
        if device.type != "cuda":
            return block.to(device)
        if self._belt is None or self._belt.device != device:
            shape = (2, self._block_rows, self.in_features)
            self._belt = _Belt(torch.empty(shape, dtype=block.dtype, pin_memory=True), device)
        return self._belt.bring(block)


def _by_blocks(
    states: torch.Tensor, table: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """[K, d], [V, d] in half precision -> [K, V], multiplied in float32 and rounded at the end.

    A block in float32 fits the cache, so that converting costs about what reading does.
    """
    wide = states.T.to(torch.float32, memory_format=torch.contiguous_format)
    size = max(1, _CACHED_BYTES // (4 * table.shape[1]))
    block = torch.empty(size, table.shape[1])
    logits = states.new_empty(len(states), len(table))
    for start in range(0, len(table), size):
        rows = slice(start, min(start + size, len(table)))
        part = block[: rows.stop - start].copy_(table[rows]) @ wide
        if bias is not None:
            part += bias[rows, None]
        logits[:, rows] = part.T
    return logits


class _Belt:
    """Brings blocks to a GPU through one pinned buffer, whose halves take turns.

    While one half is on its way, the next block is copied into the other.
    """

    def __init__(self, pinned: torch.Tensor, device: torch.device) -> None:
        self.pinned, self.device = pinned, device
        event: Any = torch.cuda.Event
        self.sent = [event(), event()]
        self.turn = 0

    def bring(self, block: torch.Tensor) -> torch.Tensor:
        self.sent[self.turn].synchronize()  # returns at once for a half that was never sent
        half = self.pinned[self.turn][: len(block)]
        half.copy_(block)
        arrived = half.to(self.device, non_blocking=True)
        self.sent[self.turn].record(torch.cuda.current_stream(self.device))
        self.turn = 1 - self.turn
        return arrived

    def __deepcopy__(self, memo: object) -> None:
        """A copied head makes its own: two must not share the buffer."""

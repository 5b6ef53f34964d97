"""The tailored LM head: the rows of the task's tokens, and behind them those of the request's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from tascade.core import IntArray
from tascade.errors import ConfigError
from tascade.vocab.table import RowTable

_SPARE = 256
_GRAIN = 128


class TailoredHead(torch.nn.Module):
    """An LM head of some tokens (VocabTailor, 2508.15229, section 3): static rows, then others.

    The static rows are there for good. A request's own (its prompt's tokens, and those that a check
    asks for) are copied behind them, into room that is there already; the next request begins by
    setting the length back. Nothing else knows of rows: :meth:`spread` gives logits by token id.

    One request at a time.

    Args:
        table: the whole head's rows, [V, d].
        static: [n] token ids.
        bias: [V] the whole head's, where it has one.
        device, dtype: of the rows; the table's own precision by default.
        spare: rows of room for a request's own tokens; more are made where they do not suffice.

    Raises:
        ConfigError: a static id is not of the table.
    """

    def __init__(
        self,
        table: RowTable,
        static: Sequence[int] | IntArray,
        *,
        bias: torch.Tensor | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        spare: int = _SPARE,
    ) -> None:
        super().__init__()
        self.table, self._bias_table = table, bias
        self.vocab_size, self.width = table.shape
        self._slot = np.full(self.vocab_size, -1, np.int32)
        self._rows = torch.zeros(0, self.width, device=device, dtype=dtype or table.dtype)
        self._bias = self._rows.new_zeros(0)
        self._ids = self._rows.new_zeros(0, dtype=torch.long)
        self._own = np.zeros(0, np.int64)
        self.length = self.static = 0
        first = np.unique(np.asarray(static, np.int32))
        self._reserve(len(first) + spare)
        self.extend(first)
        self.static = self.length

    @property
    def ids(self) -> torch.Tensor:
        """[n] token id of each row in use."""
        return self._ids[: self.length]

    @property
    def nbytes(self) -> int:
        """Bytes that the rows take on the device, room included."""
        return sum(t.numel() * t.element_size() for t in (self._rows, self._bias, self._ids))

    def __contains__(self, token: object) -> bool:
        return isinstance(token, int) and 0 <= token < self.vocab_size and self._slot[token] >= 0

    def begin(self, prompt: IntArray) -> None:
        """Forget the request before; take the tokens of ``prompt`` [T]."""
        self._slot[self._own[self.static : self.length]] = -1
        self.length = self.static
        self.extend(prompt)

    def extend(self, tokens: Sequence[int] | IntArray) -> int:
        """Take these tokens too, in no time that depends on those there are.

        Returns:
            How many were new.

        Raises:
            ConfigError: an id is not of the table; none is taken then.
        """
        asked = np.unique(np.asarray(tokens, np.int64))
        if len(asked) and not 0 <= asked[0] <= asked[-1] < self.vocab_size:
            bad = asked[0] if asked[0] < 0 else asked[-1]
            raise ConfigError(
                "a token id is not of this vocabulary",
                got=int(bad),
                wanted=f"0 to {self.vocab_size - 1}",
                fix="encode with the model's own tokenizer",
            )
        new = asked[self._slot[asked] < 0]
        end = self.length + len(new)
        if end > len(self._own):
            self._reserve(2 * end - self.static)
        if len(new):
            self._write(new, slice(self.length, end))
        self.length = end
        return len(new)

    def _write(self, new: np.ndarray[Any, Any], at: slice) -> None:
        rows = self._rows[at]
        direct = rows.dtype == self.table.dtype and rows.device.type == "cpu"
        if direct:
            self.table.gather(new, out=rows)
        else:
            rows.copy_(self.table.gather(new))
        ids = torch.from_numpy(new)
        self._ids[at] = ids.to(self._ids.device)
        if self._bias_table is not None:
            self._bias[at] = self._bias_table[ids.to(self._bias_table.device)].to(self._bias)
        self._own[at] = new
        self._slot[new] = np.arange(at.start, at.stop)

    def _reserve(self, capacity: int) -> None:
        """Make room. Padded: in half precision a CPU compiles a kernel for every new width."""
        capacity += -capacity % _GRAIN
        rows = self._rows.new_zeros(capacity, self.width)
        bias = self._bias.new_zeros(capacity if self._bias_table is not None else 0)
        ids = self._ids.new_zeros(capacity)
        own = np.zeros(capacity, np.int64)
        used = slice(0, self.length)
        rows[used], ids[used], own[used] = self._rows[used], self._ids[used], self._own[used]
        if self._bias_table is not None:
            bias[used] = self._bias[used]
        self._rows, self._bias, self._ids, self._own = rows, bias, ids, own

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., d] final states -> [..., n] logits of its tokens, in the order of ``ids``."""
        width = self.length + -self.length % _GRAIN
        bias = None if self._bias_table is None else self._bias[:width]
        return torch.nn.functional.linear(hidden, self._rows[:width], bias)[..., : self.length]

    def spread(self, logits: torch.Tensor) -> torch.Tensor:
        """[N, n] -> [N, V] float32 by token id, minus infinity for tokens it does not have."""
        wide = logits.new_full((len(logits), self.vocab_size), -torch.inf, dtype=torch.float32)
        wide[:, self.ids] = logits.float()
        return wide

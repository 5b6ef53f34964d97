"""The tailored LM head: the rows of the task's tokens, and behind them those of the request's."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tascade.core import IntArray
from tascade.vocab.rows import HeadRows, Numbers
from tascade.vocab.table import RowTable

_SPARE = 128


class TailoredHead(torch.nn.Module):
    """An LM head of some tokens (VocabTailor, 2508.15229, section 3): static rows, then others.

    The static rows are there for good. A request's own (its prompt's tokens, and those that a check
    asks for) are copied behind them, into room that is there already; the next request begins by
    setting the length back. Nothing else knows of rows: :meth:`spread` gives logits by token id.

    One request at a time; :class:`tascade.vocab.union.UnionHead` is for several.

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
        self.table = table
        self.vocab_size, self.width = table.shape
        self._rows = HeadRows(table, bias=bias, device=device, dtype=dtype)
        first = self._rows.asked(static)
        self.length = self.static = 0
        self._rows.reserve(len(first) + spare)
        self.extend(first)
        self.static = self.length

    @property
    def ids(self) -> torch.Tensor:
        """[n] token id of each row in use."""
        return self._rows.ids[: self.length]

    @property
    def nbytes(self) -> int:
        """Bytes that the rows take on the device, room included."""
        return self._rows.nbytes

    def __contains__(self, token: object) -> bool:
        if not isinstance(token, int) or not 0 <= token < self.vocab_size:
            return False
        return bool(self._rows.places[token] >= 0)

    def begin(self, prompt: IntArray) -> None:
        """Forget the request before; take the tokens of ``prompt`` [T]."""
        self._rows.forget(slice(self.static, self.length))
        self.length = self.static
        self.extend(prompt)

    def extend(self, tokens: Sequence[int] | Numbers) -> int:
        """Take these tokens too, in no time that depends on those there are.

        Returns:
            How many were new.

        Raises:
            ConfigError: an id is not of the table; none is taken then.
        """
        asked = self._rows.asked(tokens)
        new = asked[self._rows.places[asked] < 0]
        end = self.length + len(new)
        if end > self._rows.capacity:
            self._rows.reserve(2 * end - self.static)
        if len(new):
            self._rows.put(new, slice(self.length, end))
        self.length = end
        return len(new)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., d] final states -> [..., n] logits of its tokens, in the order of ``ids``."""
        return self._rows.logits(hidden, self.length)

    def spread(self, logits: torch.Tensor) -> torch.Tensor:
        """[N, n] -> [N, V] float32 by token id, minus infinity for tokens it does not have."""
        wide = logits.new_full((len(logits), self.vocab_size), -torch.inf, dtype=torch.float32)
        return wide.index_copy_(1, self.ids, logits.float())

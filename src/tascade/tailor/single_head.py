"""The tailored LM head as one request at a time sees it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tascade.core import IntArray
from tascade.tailor.head import UnionHead
from tascade.tailor.head_rows import Numbers
from tascade.tailor.offload.table import RowTable


class RequestHead:
    """A :class:`UnionHead` with one request in it, whose rows the next one takes over.

    Args:
        table, static, bias, device, dtype: as there.

    Attributes:
        union: that head.
    """

    def __init__(
        self,
        table: RowTable,
        static: Sequence[int] | Numbers,
        *,
        bias: torch.Tensor | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> None:
        self.union = UnionHead(table, static, bias=bias, device=device, dtype=dtype)
        self._ticket = self.union.join(())

    def __contains__(self, token: object) -> bool:
        return isinstance(token, int) and self.union.has(self._ticket, token)

    def begin(self, prompt: Sequence[int] | IntArray) -> None:
        """Forget the request before; take the tokens of ``prompt`` [T]."""
        self.union.leave(self._ticket)
        self._ticket = self.union.join(())
        self.extend(prompt)

    def extend(self, tokens: Sequence[int] | Numbers) -> int:
        """Take these tokens too.

        Returns:
            How many were new.

        Raises:
            ConfigError: an id is not of the table; none is taken then.
        """
        return self.union.extend(self._ticket, tokens)

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., d] final states -> [..., n] logits of its rows."""
        found: torch.Tensor = self.union(hidden)
        return found

    def spread(self, logits: torch.Tensor) -> torch.Tensor:
        """[N, n] -> [N, V] float32 by token id, minus infinity for tokens it does not have."""
        return self.union.spread(logits, [self._ticket] * len(logits))

    def argmax(self, logits: torch.Tensor) -> list[int]:
        """[N, n] -> the token of each row's largest logit, of equals the lowest."""
        return self.union.argmax(logits, [self._ticket] * len(logits))

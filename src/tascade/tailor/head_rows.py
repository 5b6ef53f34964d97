"""Places for rows of an LM head: which token's row is where, in room that is there already."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tascade.errors import ConfigError
from tascade.tailor.offload.table import RowTable

GRAIN = 128
"""In half precision a CPU compiles a kernel for every new width: room comes in these steps."""

Numbers = npt.NDArray[np.integer[Any]]
Places = slice | Numbers


class RowCache:
    """Some rows of a head's table, each in a place of its own on the device.

    It keeps no account of who needs a row: its user says what goes where.

    Args:
        table: the whole head's rows, [V, d].
        bias: [V] the whole head's, where it has one.
        device, dtype: of the rows; the table's own precision by default.

    Attributes:
        matrix: [C, d] on the device; ``bias`` [C], or [0] where the head has none.
        ids: [C] int64, on the device: the token of each place.
        tokens: [C] int64, on the host: the same, -1 where there is none.
        slot_of: [V] int32, on the host: the place of each token, -1 where there is none.
    """

    def __init__(
        self,
        table: RowTable,
        *,
        bias: torch.Tensor | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> None:
        self.table, self._bias_table = table, bias
        self.vocab_size, self.width = table.shape
        self.slot_of = np.full(self.vocab_size, -1, np.int32)
        self.tokens = np.zeros(0, np.int64)
        with torch.inference_mode(False):
            self.matrix = torch.zeros(0, self.width, device=device, dtype=dtype or table.dtype)
            self.bias = self.matrix.new_zeros(0)
            self.ids = self.matrix.new_zeros(0, dtype=torch.long)

    @property
    def capacity(self) -> int:
        """How many places there are, C."""
        return len(self.tokens)

    @property
    def nbytes(self) -> int:
        """Bytes that all places take on the device."""
        return sum(t.numel() * t.element_size() for t in (self.matrix, self.bias, self.ids))

    def unique_ids(self, tokens: Sequence[int] | Numbers) -> npt.NDArray[np.int64]:
        """``tokens`` in order, each once.

        Raises:
            ConfigError: an id is not of the table.
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
        return asked

    def reserve(self, capacity: int) -> None:
        """Make room for so many rows, or some more; those there are keep their places."""
        had = self.capacity
        capacity += -capacity % GRAIN
        # Tensors made while in inference mode could not be written to outside it.
        with torch.inference_mode(False):
            matrix = self.matrix.new_zeros(capacity, self.width)
            bias = self.bias.new_zeros(0 if self._bias_table is None else capacity)
            ids = self.ids.new_zeros(capacity)
            matrix[:had], ids[:had] = self.matrix, self.ids
            bias[:had] = self.bias
        self.matrix, self.bias, self.ids = matrix, bias, ids
        self.tokens = np.concatenate((self.tokens, np.full(capacity - had, -1)))

    def load(self, tokens: npt.NDArray[np.int64], at: Places) -> None:
        """Read the rows of ``tokens`` [n] from the table into as many places, whatever was there.

        If reading fails, these places hold nothing.
        """
        self.drop(at)
        ids = torch.from_numpy(tokens)
        with torch.no_grad():  # the bias may be a parameter
            if isinstance(at, slice) and self._is_direct:
                self.table.gather(tokens, out=self.matrix[at])
            else:
                self.matrix[at] = self.table.gather(tokens).to(self.matrix)
            self.ids[at] = ids.to(self.ids.device)
            if self._bias_table is not None:
                self.bias[at] = self._bias_table[ids.to(self._bias_table.device)].to(self.bias)
        self._enter(tokens, at)

    def move(self, source: Numbers, target: Numbers) -> None:
        """Copy rows [n] to other places, none of which is a ``source``; the table is not asked."""
        tokens = self.tokens[source]
        self.drop(source)
        self.drop(target)
        with torch.no_grad():
            for part in (self.matrix, self.ids, *((self.bias,) if len(self.bias) else ())):
                part[target] = part[source]
        self._enter(tokens, target)

    def drop(self, at: Places) -> None:
        """Nothing is in these places any more."""
        held = self.tokens[at]
        self.slot_of[held[held >= 0]] = -1
        self.tokens[at] = -1

    def logits(self, hidden: torch.Tensor, length: int) -> torch.Tensor:
        """[..., d] final states -> [..., length] logits of the first places."""
        width = length + -length % GRAIN
        bias = None if self._bias_table is None else self.bias[:width]
        return torch.nn.functional.linear(hidden, self.matrix[:width], bias)[..., :length]

    @property
    def _is_direct(self) -> bool:
        """Whether rows can be read to where they belong, without a copy between."""
        return self.matrix.dtype == self.table.dtype and self.matrix.device.type == "cpu"

    def _enter(self, tokens: npt.NDArray[np.int64], at: Places) -> None:
        self.tokens[at] = tokens
        self.slot_of[tokens] = np.arange(self.capacity)[at]

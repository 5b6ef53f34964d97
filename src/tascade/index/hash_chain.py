"""A hash chain over a growing token sequence: what followed these two tokens before?"""

from __future__ import annotations

from typing import Any

import numpy as np

from tascade.core import IntArray
from tascade.index.lookup import HASH_BITS, chain_extend


class HashChain:
    """Append-only tokens with, for every position, a link to the last place its two-token
    context occurred. Eight bytes a token; grows by doubling; reset keeps the buffers.
    """

    def __init__(self, capacity: int = 1024, bits: int = HASH_BITS) -> None:
        self._bits = bits
        self._tokens = np.empty(capacity, np.int32)
        self._previous = np.full(capacity + 1, -1, np.int32)
        self._table = np.full(1 << bits, -1, np.int32)
        self.length = 0
        self._delta = self._tokens[:0]

    def __len__(self) -> int:
        return self.length

    @property
    def tokens(self) -> IntArray:
        """All tokens so far (a view)."""
        return self._tokens[: self.length]

    def reset(self) -> None:
        """Forget everything."""
        if self.length:
            self._table.fill(-1)
        self.length = 0
        self._delta = self._tokens[:0]

    def extend(self, tokens: IntArray) -> None:
        """Append ``tokens``: [T] int32."""
        needed = self.length + len(tokens)
        if needed > len(self._tokens):
            self._grow(max(needed, 2 * len(self._tokens)))
        self.length = chain_extend(
            self._tokens, self._previous, self._table, self.length, tokens, self._bits
        )

    def follow(self, delta: IntArray) -> None:
        """Hold a corpus's ``delta_tokens``: append what is new, start over if that is not all.

        Between documents the separator is doubled, so that their start is a context of two tokens.
        """
        if not np.array_equal(delta[: len(self._delta)], self._delta):
            self.reset()
        if len(delta) > 1:  # else there is but the separator before the first document
            fresh = delta[len(self._delta) :]
            self.extend(np.repeat(fresh, np.where(fresh == -1, 2, 1)))
            self._delta = delta

    def _grow(self, capacity: int) -> None:
        tokens = np.empty(capacity, np.int32)
        tokens[: self.length] = self.tokens
        previous = np.full(capacity + 1, -1, np.int32)
        previous[: self.length + 1] = self._previous[: self.length + 1]
        self._tokens, self._previous = tokens, previous

    def arrays(self) -> tuple[Any, ...]:
        """What the kernels read: (tokens, previous, table, length, bits)."""
        return (self._tokens, self._previous, self._table, self.length, self._bits)

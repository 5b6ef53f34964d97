"""A corpus's shards as the kernels read them: addresses and lengths of their arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from tascade.core import IntArray
from tascade.errors import ConfigError
from tascade.index.lookup import MAX_SHARDS


class CorpusView(Protocol):
    """What the drafter reads of a corpus index: shards of arrays, and documents not yet in one."""

    @property
    def shards(self) -> Sequence[Any]:
        """Shards, each with ``tokens``, ``order`` and ``head`` arrays."""
        ...

    @property
    def delta_tokens(self) -> IntArray:
        """Documents appended since the last compaction, separators between them."""
        ...


def shard_table(corpus: CorpusView | None) -> tuple[Any, list[Any]]:
    """Addresses and lengths of a corpus's arrays, [S, 6] int64, as the kernels read them.

    The second value must be kept for as long as the first is in use: it holds the arrays.

    Raises:
        ConfigError: more shards than one draft searches.
    """
    shards = list(corpus.shards) if corpus is not None else []
    if len(shards) > MAX_SHARDS:
        raise ConfigError(
            "too many shards to search in one draft",
            got=len(shards),
            wanted=f"at most {MAX_SHARDS}",
            fix="compact the corpus index",
        )
    rows = [_addresses(shard) for shard in shards]
    return np.asarray(rows, np.int64).reshape(len(rows), 6), shards


def _addresses(shard: Any) -> list[int]:
    row: list[int] = []
    for array, dtype in (
        (shard.tokens, np.int32),
        (shard.order, np.uint32),
        (shard.head, np.uint32),
    ):
        if array.dtype != dtype or not array.flags.c_contiguous:
            raise ConfigError(
                "a shard's array has the wrong layout", got=array.dtype, wanted=dtype.__name__
            )
        row += [array.ctypes.data, len(array)]
    return row

"""Opening the shards of a corpus index: whatever is in the files, no reader leaves the arrays."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tascade.core import SEPARATOR
from tascade.index.array_files import IN_MEMORY_BYTES, read_array
from tascade.index.arrays import FAULTS, find_fault
from tascade.index.store import (
    ARRAYS,
    SHARDS,
    Manifest,
    RowArray,
    Shard,
    ShardEntry,
    damaged,
    sha256_of,
)

_DTYPES = tuple(map(np.dtype, ("<i4", "<u4", "<u4", "<i8")))


def index_bytes(manifest: Manifest) -> int:
    """Bytes of all arrays of an index."""
    tokens = sum(2 * entry.tokens + 5 * entry.documents for entry in manifest.shards)
    return 4 * (tokens + len(manifest.shards) * (manifest.vocab_size + 3))


def open_shard(
    root: Path, entry: ShardEntry, manifest: Manifest, limit: int, verify: bool
) -> tuple[Shard, RowArray]:
    """Read or map a shard's arrays, and check what keeps their readers inside them.

    Args:
        root: the index folder.
        entry: which shard.
        manifest: of the index.
        limit: no token id may reach it; V at most.
        verify: also compare every file with its digest, and check that ``order`` is sorted.

    Raises:
        PackError: a file is missing, of another length, type or shape, holds values out of range,
            or was altered (``verify``).
    """
    folder, mapped = root / SHARDS / entry.name, index_bytes(manifest) > IN_MEMORY_BYTES
    n_tokens = entry.tokens + entry.documents + 1
    shapes = (n_tokens,), (entry.tokens,), (manifest.vocab_size + 2,), (entry.documents, 2)
    tokens, order, head, documents = (
        read_array(folder / name, dtype, shape, mapped=mapped)
        for name, dtype, shape in zip(ARRAYS, _DTYPES, shapes, strict=True)
    )
    shard = Shard(tokens, order, head)
    _check_values(folder, shard, documents, limit)
    if verify:
        for name, digest in entry.sha256.items():
            if (found := sha256_of(folder / name)) != digest:
                raise damaged(folder / name, f"sha256 {found}", f"sha256 {digest}")
    if verify and (fault := find_fault(*shard, documents, manifest.vocab_size)):
        raise damaged(folder, FAULTS[fault], "arrays as CorpusIndex.build writes them")
    return shard, documents


def _check_values(folder: Path, shard: Shard, documents: RowArray, limit: int) -> None:
    """Bounds of every value, in passes that cost milliseconds: what ``verify`` checks costs more.

    An ``order`` that is not sorted, or that names separators, makes worse drafts and nothing else.
    """
    tokens, order, head = shard
    low, high = int(tokens.min()), int(tokens.max())
    if low < SEPARATOR or high >= limit:
        got, wanted = f"token ids from {low} to {high}", f"{SEPARATOR} to {limit - 1}"
        raise damaged(folder / "tokens.npy", got, wanted)
    if tokens[0] != SEPARATOR or tokens[-1] != SEPARATOR:
        raise damaged(folder / "tokens.npy", "no separator at an end", "one at each end")
    if head[0] != 0 or head[-1] != len(order) or bool((head[1:] < head[:-1]).any()):
        raise damaged(
            folder / "head.npy", "bounds that fall or miss the end", f"0 rising to {len(order)}"
        )
    if int(order.min()) < 1 or int(order.max()) >= len(tokens) - 1:
        got, wanted = f"positions from {order.min()} to {order.max()}", f"1 to {len(tokens) - 2}"
        raise damaged(folder / "order.npy", got, wanted)
    ids, starts = documents[:, 0], documents[:, 1]
    sound = ids[0] >= 0 and starts[0] == 1 and starts[-1] < len(tokens) - 1
    for column in (ids, starts):  # first of all: differences of what does not rise may overflow
        sound = sound and bool((column[1:] > column[:-1]).all())
    if not (sound and (np.diff(starts) > 1).all() and (tokens[starts - 1] == SEPARATOR).all()):
        got, wanted = "ids or positions out of order", "a row for each separator"
        raise damaged(folder / "documents.npy", got, wanted)

"""What a corpus index holds at one moment: the manifest, its shards and the log as far as read."""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tascade.core import SEPARATOR, IntArray
from tascade.errors import FingerprintError, PackError
from tascade.index.arrays import DEPTH, FAULTS, count_by_scan, count_in_shard, find_fault
from tascade.index.log import DeltaText, LogTail, read_log
from tascade.index.store import (
    ARRAYS,
    IN_MEMORY_BYTES,
    MANIFEST,
    SHARDS,
    Manifest,
    RowArray,
    Shard,
    ShardEntry,
    damaged,
    parse_manifest,
    read_array,
    read_manifest_bytes,
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


_ATTEMPTS = 100
_SpanArray = npt.NDArray[np.int64]


class CorpusState:
    """The documents of an index under one manifest. Only the log part ever grows.

    Attributes:
        path: the index folder.
        raw: the bytes of the manifest.
        manifest: the manifest.
        limit: no token id may reach it, in what is read later neither.
        shards: the arrays of each shard.
        rows: ``documents.npy`` of each shard.
        delta_ids: ids of the documents in the log, ascending.
        log_end: byte of the log up to which it was read.
    """

    def __init__(
        self,
        path: Path,
        raw: bytes,
        manifest: Manifest,
        limit: int,
        parts: Sequence[tuple[Shard, RowArray]],
        tail: LogTail,
    ) -> None:
        """Put together what :func:`load_state` read."""
        self.path, self.raw, self.manifest, self.limit = path, raw, manifest, limit
        self.shards = tuple(shard for shard, _ in parts)
        self.rows = tuple(rows for _, rows in parts)
        self.delta_ids = list(tail.ids)
        self.log_end = tail.end
        self._delta = list(tail.documents)
        self.set_tombstones(raw, manifest)

    def set_tombstones(self, raw: bytes, manifest: Manifest) -> None:
        """Take a manifest that differs only in what is deleted."""
        self.raw, self.manifest = raw, manifest
        dead = np.array(sorted(set(manifest.tombstones)), np.int64)
        self.dead_rows = tuple(find_rows(dead, rows) for rows in self.rows)
        self.dead_delta = set(dead.tolist()).intersection(self.delta_ids)
        self.text = DeltaText()
        self.text.extend([tokens for _, tokens in self.live_delta()])

    def extend_delta(self, tail: LogTail) -> None:
        """Take documents that were added to the log."""
        self.delta_ids += tail.ids
        self._delta += tail.documents
        self.text.extend(tail.documents)
        self.log_end = tail.end

    @property
    def next_id(self) -> int:
        """The id of the next document."""
        last = self.delta_ids[-1] + 1 if self.delta_ids else 0
        return max(last, self.manifest.next_document_id)

    @property
    def n_documents(self) -> int:
        """How many documents are live."""
        shards = sum(len(rows) for rows in self.rows) - sum(len(dead) for dead in self.dead_rows)
        return shards + len(self.delta_ids) - len(self.dead_delta)

    @property
    def n_tokens(self) -> int:
        """How many tokens the live documents have."""
        total = sum(len(shard.order) for shard in self.shards)
        total -= sum(int((spans[:, 1] - spans[:, 0]).sum()) for spans in self.deleted_spans())
        return total + int((self.text.tokens != SEPARATOR).sum())

    @property
    def n_bytes(self) -> int:
        """Bytes of the files."""
        folders = (self.path / SHARDS / entry.name for entry in self.manifest.shards)
        files = [path for folder in folders for path in folder.glob("*.npy")]
        files += [self.path / MANIFEST, self.path / self.manifest.delta]
        return sum(path.stat().st_size for path in files)

    def count(self, context: Sequence[int] | IntArray) -> int:
        """As ``CorpusIndex.count``."""
        wide = np.asarray(context, np.int64)[-DEPTH:]
        if len(wide) == 0:
            delta = int((self.text.tokens != SEPARATOR).sum())
            return delta + sum(len(shard.order) for shard in self.shards)
        if wide.min() < SEPARATOR or wide.max() >= self.manifest.vocab_size:
            return 0
        starts = np.flatnonzero(wide == SEPARATOR)
        ids = wide[starts[-1] if len(starts) else 0 :].astype(np.int32)
        found = sum(int(count_in_shard(*shard, ids)) for shard in self.shards)
        return found + int(count_by_scan(self.text.tokens, ids))

    def documents(self) -> Iterator[tuple[int, IntArray]]:
        """The live documents as (id, [n] int32), ids ascending."""
        every = range(len(self.shards))
        return merge_documents([*map(self.live_shard, every), self.live_delta()])

    def live_shard(self, i: int) -> Iterator[tuple[int, IntArray]]:
        """The live documents of one shard, ids ascending."""
        live = np.ones(len(self.rows[i]), np.bool_)
        live[self.dead_rows[i]] = False
        ids, spans = self.rows[i][live, 0].tolist(), self._spans(i)[live].tolist()
        tokens = self.shards[i].tokens
        return ((number, tokens[a:b]) for number, (a, b) in zip(ids, spans, strict=True))

    def live_delta(self) -> Iterator[tuple[int, IntArray]]:
        """The live documents of the log, ids ascending."""
        pairs = list(zip(self.delta_ids, self._delta, strict=True))
        return (pair for pair in pairs if pair[0] not in self.dead_delta)

    def deleted_spans(self) -> tuple[_SpanArray, ...]:
        """As ``CorpusIndex.deleted_spans``."""
        return tuple(
            self._spans(i)[dead] if len(dead) else np.empty((0, 2), np.int64)
            for i, dead in enumerate(self.dead_rows)
        )

    def live_ids(self, among: Sequence[int]) -> set[int]:
        """Those of the ids ``among`` that name a live document."""
        wanted = np.array(sorted(set(among)), np.int64)
        found = set(among).intersection(self.delta_ids) - self.dead_delta
        for rows, dead in zip(self.rows, self.dead_rows, strict=True):
            found.update(rows[np.setdiff1d(find_rows(wanted, rows), dead), 0].tolist())
        return found

    def _spans(self, i: int) -> _SpanArray:
        """[D, 2] int64: start and end in ``tokens`` of every document of a shard."""
        starts = self.rows[i][:, 1]
        ends = np.append(starts[1:] - 1, len(self.shards[i].tokens) - 1)
        return np.stack([starts, ends], axis=1)


def merge_documents(
    streams: Sequence[Iterator[tuple[int, IntArray]]],
) -> Iterator[tuple[int, IntArray]]:
    """Merge streams of (id, tokens), each with its ids ascending."""
    return heapq.merge(*streams, key=lambda pair: pair[0])


def find_rows(ids: _SpanArray, rows: RowArray) -> _SpanArray:
    """Which rows of a shard's ``documents.npy`` have one of the ``ids`` (sorted)."""
    if len(ids) == 0:
        return np.empty(0, np.int64)
    at = np.searchsorted(rows[:, 0], ids)
    at = at[at < len(rows)]
    return np.unique(at[np.isin(rows[at, 0], ids)])


def load_state(
    path: Path,
    fingerprint: str | None,
    limit: int,
    verify: bool = False,
    known: CorpusState | None = None,
) -> CorpusState:
    """Read an index, again whenever a writer replaces the manifest in between.

    Args:
        path: the index folder.
        fingerprint: what the manifest must say, or None for anything.
        limit: no token id may reach it, nor the index's own vocabulary.
        verify: also read every array and check each of its values.
        known: an earlier state; the shards it has are not opened again.

    Raises:
        FingerprintError: made for another tokenizer.
        PackError: missing, damaged, of another format.
    """
    for _ in range(_ATTEMPTS):
        raw = read_manifest_bytes(path)
        try:
            return _load_once(path, raw, fingerprint, limit, verify, known)
        except PackError:
            if read_manifest_bytes(path) == raw:
                raise
        except OSError as error:  # a file that a writer replaced between two looks at it
            if read_manifest_bytes(path) == raw:
                raise damaged(path, error, "files that can be read") from error
    raise PackError(
        "the corpus index changed faster than it could be read",
        got=f"{_ATTEMPTS} new manifests in a row",
        wanted="one that stays for a moment",
        where=str(path),
        fix="try again, or compact less often",
    )


def _load_once(
    path: Path,
    raw: bytes,
    fingerprint: str | None,
    limit: int,
    verify: bool,
    known: CorpusState | None,
) -> CorpusState:
    manifest = parse_manifest(raw, path)
    if fingerprint is not None and fingerprint != manifest.fingerprint:
        raise FingerprintError(
            "the corpus index was made for another tokenizer",
            got=manifest.fingerprint,
            wanted=fingerprint,
            where=str(path / MANIFEST),
            fix="use the tokenizer it was made for, or rebuild the index with this one",
        )
    if (path / SHARDS).is_symlink():  # a writer removes from it what the manifest does not name
        raise damaged(path / SHARDS, "a link", "a folder of the index's own")
    limit = min(limit, manifest.vocab_size)
    opened: dict[str, tuple[Shard, RowArray]] = {}
    if known is not None and known.manifest.identity == manifest.identity:
        names = (entry.name for entry in known.manifest.shards)
        opened = dict(zip(names, zip(known.shards, known.rows, strict=True), strict=True))
    parts = [
        opened.get(entry.name) or open_shard(path, entry, manifest, limit, verify)
        for entry in manifest.shards
    ]
    # Read last: it bears the identity of the index, so the shards above are of that index too.
    tail = read_log(path / manifest.delta, manifest.identity, limit)
    state = CorpusState(path, raw, manifest, limit, parts, tail)
    if verify:
        _check_ids(state)
    return state


def _check_ids(state: CorpusState) -> None:
    """Every id is used once, and every deletion names a document."""
    ids = np.concatenate(
        [*(rows[:, 0] for rows in state.rows), np.array(state.delta_ids, np.int64)]
    )
    unique = np.unique(ids)
    in_shards = max((int(rows[-1, 0]) for rows in state.rows), default=-1)
    sound = len(unique) == len(ids) and (len(unique) == 0 or unique[0] >= 0)
    sound = sound and in_shards < state.manifest.next_document_id
    if not sound or not np.isin(state.manifest.tombstones, unique).all():
        raise damaged(state.path / MANIFEST, "document ids used twice or unknown", "each id once")


def row_of(rows: RowArray, doc_id: int) -> int:
    """The first row with this id or a larger one: where no document was dropped, at its place."""
    guess = doc_id - int(rows[0, 0]) if len(rows) else 0
    if 0 <= guess < len(rows) and rows[guess, 0] == doc_id:
        return guess
    return bisect_left(rows[:, 0], doc_id)

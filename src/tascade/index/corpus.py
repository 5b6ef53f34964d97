"""The corpus index: a task's outputs on disk, ready to answer what follows a context.

Immutable sorted shards (corpus_arrays.py) hold the bulk, a log (corpus_log.py) what was appended
since, and a manifest (corpus_store.py) says which files are meant. One process may write at a
time; any number read. They share the pages of an index large enough to be mapped.
"""

from __future__ import annotations

import os
import re
import shutil
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tascade.core import IntArray
from tascade.errors import ConfigError, PackError
from tascade.index.build import (
    TOKENS_PER_SHARD,
    as_document,
    new_manifest,
    write_index,
    write_shards,
)
from tascade.index.log import LogTail, LogWriter, create_log, read_log
from tascade.index.state import CorpusState, load_state, merge_documents, row_of
from tascade.index.store import (
    LOG_NAME,
    MAX_VOCAB,
    SHARDS,
    STRAY_MANIFEST,
    Manifest,
    Shard,
    WriterLock,
    encode_manifest,
    parse_manifest,
    read_manifest_bytes,
    write_manifest,
)


class CorpusIndex:
    """A task's tokenized outputs, indexed by what stands before each token.

    Made by :meth:`build` or :meth:`open`, in the folder ``path``. Documents have ids that are never
    used twice. An object is for one thread at a time. As a context manager it closes itself.
    """

    def __init__(self, path: Path, state: CorpusState) -> None:
        """Internal: use :meth:`build` or :meth:`open`."""
        self.path = path
        self._state = state
        self._lock: WriterLock | None = None
        self._log: LogWriter | None = None

    # --- making and opening -----------------------------------------------------------------

    @classmethod
    def build(
        cls,
        path: str | os.PathLike[str],
        documents: Iterable[Sequence[int] | IntArray],
        *,
        vocab_size: int,
        fingerprint: str,
        shards: int = 1,
        sources: Iterable[tuple[str, str]] = (),
        command: str = "",
        overwrite: bool = False,
    ) -> CorpusIndex:
        """Index documents at ``path`` in one step, or not at all; returns the index, for reading.

        Args:
            path: the folder to make.
            documents: token ids of each output, its end token included; they get the ids 0, 1, ...
            vocab_size: V; every token id must be below.
            fingerprint: of the tokenizer, so that no other is used with the index.
            shards: into how many parts of equal size to cut, at most. A part needs up to 40 bytes
                a token while it is sorted; none is let grow beyond 2**28 tokens.
            sources: (name, sha256) of the files the documents came from.
            command: how to make the index again.
            overwrite: replace an index already there (and nothing else).

        Raises:
            DataError: a document is empty or has an id outside the vocabulary.
            ConfigError: ``vocab_size`` or ``shards`` out of range.
            PackError: something else is at ``path``, or it cannot be written.
        """
        manifest = new_manifest(fingerprint, vocab_size, sources, command)
        write_index(Path(path), documents, manifest, shards, overwrite)
        return cls.open(path, fingerprint=fingerprint)

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        fingerprint: str | None = None,
        limit: int = MAX_VOCAB,
        verify: bool = False,
        writable: bool = False,
    ) -> CorpusIndex:
        """Open an index; its arrays are read, or mapped where they take more than 64 MB.

        Args:
            path: the index folder. Its contents are not trusted.
            fingerprint: of the tokenizer about to be used; checked when given.
            limit: rows of the model about to be used: no token id may reach it, now or later.
            verify: also check the digest of every array, and its order.
            writable: take the writer's lock; drops the torn tail of a writer that died.

        Raises:
            FingerprintError: the index was made for another tokenizer.
            PackError: missing, damaged, of a newer format, or another writer holds it.
        """
        root = Path(path)
        lock = None
        if writable:
            parse_manifest(read_manifest_bytes(root), root)  # a lock only in what is an index
            lock = WriterLock(root)
        try:
            index = cls(root, load_state(root, fingerprint, limit, verify))
            if lock is not None:
                index._lock = lock
                index._open_log()
        except BaseException:
            if lock is not None:
                lock.close()
            raise
        return index

    # --- reading ----------------------------------------------------------------------------

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the tokenizer the documents were made with."""
        return self._state.manifest.fingerprint

    @property
    def vocab_size(self) -> int:
        """V: every token id is below."""
        return self._state.manifest.vocab_size

    @property
    def manifest(self) -> Manifest:
        """The manifest as last read, with the provenance of the index."""
        return self._state.manifest

    @property
    def shards(self) -> tuple[Shard, ...]:
        """The sorted arrays, read-only. They include documents deleted since they were sorted."""
        return self._state.shards

    @property
    def delta_tokens(self) -> IntArray:
        """[n] int32, read-only: live documents not yet in a shard, as in a shard's ``tokens``."""
        return self._state.text.tokens

    @property
    def n_documents(self) -> int:
        """How many documents are in the index, the deleted ones left out."""
        return self._state.n_documents

    @property
    def n_tokens(self) -> int:
        """How many tokens those documents have, separators left out."""
        return self._state.n_tokens

    @property
    def n_bytes(self) -> int:
        """Bytes of the files of the index."""
        return self._state.n_bytes

    def deleted_spans(self) -> tuple[npt.NDArray[np.int64], ...]:
        """For each shard [k, 2] int64: start and end in ``tokens`` of each deleted document."""
        return self._state.deleted_spans()

    def documents(self) -> Iterator[tuple[int, IntArray]]:
        """The live documents as (id, [n] int32 read-only), ids ascending."""
        return self._state.documents()

    def document(self, doc_id: int) -> IntArray | None:
        """One live document, [n] int32 read-only, found by its id; None if there is none."""
        for i, rows in enumerate((state := self._state).rows):
            at, tokens = row_of(rows, doc_id), state.shards[i].tokens
            if at < len(rows) and rows[at, 0] == doc_id and at not in state.dead_rows[i]:
                end = rows[at + 1, 1] if at + 1 < len(rows) else len(tokens)
                return tokens[rows[at, 1] : end - 1]
        at, live = bisect_left(state.delta_ids, doc_id), doc_id not in state.dead_delta
        return state._delta[at] if live and state.delta_ids[at : at + 1] == [doc_id] else None

    def count(self, context: Sequence[int] | IntArray) -> int:
        """How often a document goes on after ``context``: exact, by binary search in each shard.

        Args:
            context: token ids, the latest last. The last 32 count; a ``SEPARATOR`` stands for
                the start of a document, and what is before it is not looked at.

        Returns:
            The number of tokens that follow the context. Documents deleted from a shard count
            until :meth:`compact`.
        """
        return self._state.count(context)

    def refresh(self) -> bool:
        """Pick up what a writer did since. A writer itself is always up to date.

        Returns:
            Whether anything changed. Arrays taken before stay valid, and as they were.

        Raises:
            FingerprintError: the index was replaced by one for another tokenizer.
            PackError: the index is gone or damaged.
        """
        if self._lock is not None:
            return False
        state = self._state
        if read_manifest_bytes(self.path) == state.raw:
            manifest, last = state.manifest, state.delta_ids[-1] if state.delta_ids else -1
            log = self.path / manifest.delta
            try:
                more = read_log(log, manifest.identity, state.limit, state.log_end, last)
            except PackError:
                if read_manifest_bytes(self.path) == state.raw:
                    raise
            else:
                state.extend_delta(more)
                return bool(more.ids)
        self._state = load_state(self.path, self.fingerprint, state.limit, known=state)
        return True

    # --- writing ----------------------------------------------------------------------------

    def append(
        self, documents: Iterable[Sequence[int] | IntArray], *, flush: bool = True
    ) -> list[int]:
        """Add documents to the log: all of them, or none if one is refused.

        Args:
            documents: token ids of each, its end token included.
            flush: return only when they are on disk; else they are once :meth:`flush` returns.

        Returns:
            The new ids, one a document, ascending.

        Raises:
            DataError: a document is empty or has an id outside the vocabulary.
            PackError: not open for writing, or the disk refuses.
        """
        log = self._writer()
        checked = [
            as_document(tokens, self.vocab_size, f"appended document {i}").copy()
            for i, tokens in enumerate(documents)
        ]
        first = self._state.next_id
        ids = list(range(first, first + len(checked)))
        log.append(ids, checked)
        self._state.extend_delta(LogTail(ids, checked, log.end))
        if flush:
            log.flush()
        return ids

    def flush(self) -> None:
        """Return when every appended document is on disk."""
        self._writer().flush()

    def delete(self, ids: Iterable[int]) -> None:
        """Mark documents as deleted, on disk when this returns.

        Those of the delta leave ``delta_tokens`` at once, those of a shard at :meth:`compact`.

        Raises:
            PackError: an id is unknown or already deleted (then none is deleted), or the index is
                not open for writing.
        """
        log = self._writer()
        wanted = sorted(set(ids))
        if unknown := sorted(set(wanted) - self._state.live_ids(wanted)):
            raise PackError(
                "no such document in the corpus index",
                got=f"ids {unknown[:10]}",
                wanted="ids that append() returned or documents() lists",
                where=str(self.path),
            )
        log.flush()
        old = self._state.manifest
        manifest = replace(old, tombstones=tuple(sorted({*old.tombstones, *wanted})))
        write_manifest(self.path, manifest)
        self._state.set_tombstones(encode_manifest(manifest), manifest)

    def compact(self, max_shards: int = 1) -> None:
        """Fold the log and the deletions into sorted shards, and merge the smallest.

        The new state appears in one step. Readers keep the arrays they have until they
        :meth:`refresh`. Costs one sort of what is rewritten: shards with deletions, the log, and
        the smallest shards beyond ``max_shards``.

        Raises:
            PackError: not open for writing, or the disk refuses (the old state stays).
        """
        if max_shards < 1:
            raise ConfigError(
                "value out of range", got=max_shards, wanted=">= 1", where="max_shards"
            )
        log, state = self._writer(), self._state
        log.flush()
        stale, fresh = self._split_shards(max_shards)
        if not stale and not state.delta_ids:
            return
        old = state.manifest
        merged = merge_documents([*map(state.live_shard, stale), state.live_delta()])
        entries = write_shards(self.path, merged, self.vocab_size, TOKENS_PER_SHARD, old.next_shard)
        manifest = old.with_next_log(
            shards=(*(old.shards[i] for i in fresh), *entries),
            tombstones=(),
            next_document_id=state.next_id,
            next_shard=old.next_shard + len(entries),
        )
        create_log(self.path / manifest.delta, manifest.identity)
        self._log = None  # from here the old log may be out of the index, even if this fails
        log.close()
        write_manifest(self.path, manifest)
        self._state = load_state(self.path, self.fingerprint, state.limit, known=state)
        self._open_log()

    def close(self) -> None:
        """Flush and let the next writer in. Arrays already taken stay valid."""
        if self._lock is None:
            return
        try:
            if self._log is not None:
                self._writer().flush()
        finally:
            if self._log is not None:
                self._log.close()
            self._lock.close()
            self._log = None

    def __enter__(self) -> CorpusIndex:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"CorpusIndex({str(self.path)!r}, {self.n_documents} documents)"

    # --- parts ------------------------------------------------------------------------------

    def _writer(self) -> LogWriter:
        if self._lock is None or self._log is None:
            raise PackError(
                "this corpus index is not open for writing",
                got="a closed index" if self._lock else "an index open for reading",
                wanted="an index open for writing",
                where=str(self.path),
                fix="CorpusIndex.open(path, writable=True)",
            )
        self._lock.check()
        return self._log

    def _open_log(self) -> None:
        """Start writing to the log that the manifest names, and remove what it no longer names."""
        manifest = self._state.manifest
        self._log = LogWriter(self.path / manifest.delta, self._state.log_end)
        named = {entry.name for entry in manifest.shards}
        for folder in (self.path / SHARDS).glob("[0-9]*"):
            if folder.name not in named:
                shutil.rmtree(folder, ignore_errors=True)
        for file in self.path.iterdir():
            old_log = re.fullmatch(LOG_NAME, file.name) and file.name != manifest.delta
            if old_log or re.fullmatch(STRAY_MANIFEST, file.name):
                file.unlink(missing_ok=True)

    def _split_shards(self, max_shards: int) -> tuple[list[int], list[int]]:
        """Numbers of the shards to rewrite and of those to keep."""
        sizes = [len(shard.order) for shard in self._state.shards]
        stale = [i for i, dead in enumerate(self._state.dead_rows) if len(dead)]
        fresh = [i for i in range(len(sizes)) if i not in stale]
        fresh.sort(key=lambda i: -sizes[i])
        while len(fresh) + bool(stale or self._state.delta_ids) > max_shards:
            stale.append(fresh.pop())
        return sorted(stale), sorted(fresh)

"""Learning from traffic: finished answers become documents that the next drafts are made from.

Opt-in. A server offers every finished answer; a thread of the learner's own writes it to a *learned
corpus* (learned.py), a folder beside the pack. The pack's own index is only read, so servers
may share a pack, each with a learned folder of its own. Drafts change how soon a token comes and
never which one, so nothing that is learned can change an answer.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tascade.core import IntArray
from tascade.errors import ConfigError, DataError, FingerprintError, PackError, TascadeError
from tascade.index.build import as_document
from tascade.index.corpus import CorpusIndex
from tascade.index.learned import (
    COPIES,
    LEARNED_SHARDS,
    MAX_TOKENS,
    LearnedCorpus,
    key_of,
    read_learned_manifest,
)
from tascade.index.lookup import MAX_SHARDS
from tascade.index.store import Shard
from tascade.index.view import CorpusView

QUEUE_TOKENS = 1 << 18
"""Answers that may wait for the thread; what finds no room is dropped, and counted."""
GATHER_SECONDS = 0.1
"""The thread lets answers gather for this long: at most ten writes a second go to disk."""

_log = logging.getLogger(__name__)


class _Snapshot(NamedTuple):
    """What drafters may see: arrays that no longer change."""

    shards: tuple[Shard, ...]
    delta_tokens: IntArray


class JoinedView:
    """A pack's documents and the learned ones, for a drafter."""

    def __init__(self, base: CorpusView, learner: TrafficLearner) -> None:
        self._base, self._learner = base, learner

    @property
    def shards(self) -> tuple[Shard, ...]:
        """The pack's shards, then the learned ones."""
        return (*self._base.shards, *self._learner.snapshot.shards)

    @property
    def delta_tokens(self) -> IntArray:
        """[n] int32: documents not yet in a shard, the learned ones last."""
        base, learned = self._base.delta_tokens, self._learner.snapshot.delta_tokens
        return learned if len(base) <= 1 else np.concatenate((base, learned[1:]))


class TrafficLearner:
    """Takes finished answers from any thread, and shows them to drafters. Made by :meth:`open`.

    As a context manager it closes itself.

    Attributes:
        snapshot: what is shown to drafters now.
    """

    def __init__(self, store: LearnedCorpus) -> None:
        """Internal: use :meth:`open`."""
        self._store = store
        self._disk = threading.Lock()  # held by whoever uses the store, however long it takes
        self._lock = threading.Lock()  # held for a moment, never while anything is written
        self._ready = threading.Condition(self._lock)
        self._pending: list[tuple[bytes, IntArray]] = []
        self._pending_tokens = 0
        self._copies = Counter(store.keys())
        self._counts: Counter[str] = Counter()
        self._fault: Exception | None = None
        self._closed = threading.Event()
        self._version = 0
        self._publish()
        self._shown = self._version
        self._thread = threading.Thread(target=self._work, name="tascade-learner", daemon=True)
        self._thread.start()

    @classmethod
    def open(
        cls, folder: Path, *, fingerprint: str, vocab_size: int, max_tokens: int = 1_000_000
    ) -> TrafficLearner:
        """Own a learned corpus; a new or empty folder becomes one.

        Args:
            folder: where the documents go; mode 0700. The lock of a dead process is taken over.
            fingerprint: of the tokenizer.
            vocab_size: V; every token id must be below.
            max_tokens: the cap on tokens, those not yet in a shard included; the oldest documents
                leave first.

        Raises:
            FingerprintError: it was made for another tokenizer.
            ConfigError: ``max_tokens`` out of range.
            PackError: another process owns it, something else is there, or it is damaged.
        """
        return cls(LearnedCorpus(Path(folder), fingerprint, vocab_size, max_tokens))

    def offer(self, prompt: Sequence[int], output: Sequence[int]) -> bool:
        """Offer a finished answer. Never waits for the disk.

        Args:
            prompt: what was asked. It is neither stored nor looked at.
            output: [n] token ids of the answer, its end token included.

        Returns:
            Whether it was taken: not when it is empty, longer than the cap or outside the
            vocabulary, when enough copies are there, or when too much waits to be written.
        """
        try:
            tokens = as_document(output, self._store.vocab_size, "answer").copy()
        except DataError:
            tokens = np.empty(0, np.int32)
        key = key_of(tokens)
        with self._lock:
            self._counts["offered"] += 1
            reason = self._reason_against(key, len(tokens))
            self._counts[reason or "taken"] += 1
            if reason:
                return False
            self._copies[key] += 1
            self._pending.append((key, tokens))
            self._pending_tokens += len(tokens)
            self._ready.notify()
        return True

    def _reason_against(self, key: bytes, length: int) -> str:
        if not 0 < length <= self._store.max_tokens:
            return "refused"
        if self._copies[key] >= COPIES:
            return "duplicates"
        if self._closed.is_set() or self._pending_tokens + length > QUEUE_TOKENS:
            return "dropped"
        return ""

    def view(self, base: CorpusIndex) -> CorpusView:
        """The documents of ``base`` and the learned ones together, always the latest.

        Raises:
            FingerprintError: ``base`` is for another tokenizer or vocabulary.
            ConfigError: ``base`` has so many shards that none can be added.
        """
        found = (base.fingerprint, base.vocab_size)
        if found != (wanted := (self._store.fingerprint, self._store.vocab_size)):
            raise FingerprintError(
                "what was learned is for another tokenizer than the pack's index",
                got=f"{found[0]}, {found[1]} ids",
                wanted=f"{wanted[0]}, {wanted[1]} ids",
                where=str(base.path),
                fix="use a learned folder of its own for each pack",
            )
        room = MAX_SHARDS - len(base.shards)
        if room < 1:
            raise ConfigError(
                "the pack's index leaves no room for what is learned",
                got=f"{len(base.shards)} shards",
                wanted=f"at most {MAX_SHARDS - LEARNED_SHARDS}",
                where=str(base.path),
                fix="compact the index, or build it with fewer shards",
            )
        with self._disk:
            if room < self._store.shard_limit:
                self._store.limit_shards(room)
                self._publish()
        return JoinedView(base, self)

    def refresh_due(self) -> bool:
        """Whether anything is new since the last call; the caller then refreshes its drafter."""
        shown, self._shown = self._shown, self._version
        return shown != self._shown

    def forget(self, ids: Iterable[int] | None = None) -> int:
        """Remove documents, or everything offered until now, from every file of the folder.

        Drafters show them no more once they have been refreshed. An answer that comes again is
        learned again. Ids that are not (or no longer) there are passed over.

        Returns:
            How many documents were removed.

        Raises:
            PackError: the disk refuses.
        """
        with self._disk:
            dropped = self._take_pending() if ids is None else []
            self._drain()
            try:
                keys = [*self._store.forget(ids), *(key for key, _ in dropped)]
            except BaseException:
                self._reopen()  # goes on with what was deleted but is still in a file
                raise
            finally:
                self._publish()
            self._forget_copies(keys)
        with self._lock:
            self._counts["forgotten"] += len(keys)
        return len(keys)

    def stats(self) -> dict[str, int]:
        """Counters since the learner was opened, and what is stored (offers in the queue left out).

        ``offered`` = ``taken`` + ``refused`` + ``duplicates`` + ``dropped``, but for answers that
        were taken and then could not be written: these are counted as ``dropped`` too.
        """
        names = ("offered", "taken", "refused", "duplicates", "dropped", "forgotten")
        with self._lock:
            counts = {name: self._counts[name] for name in names}
        store = self._store
        return {
            "documents": store.n_documents,
            "tokens": store.n_tokens,
            **counts,
            "evicted": store.evicted,
            "compactions": store.compactions,
        }

    def flush(self) -> None:
        """Return when what was offered until now is on disk.

        Raises:
            PackError: something offered since the last call could not be written.
        """
        with self._disk:
            self._drain()
            fault, self._fault = self._fault, None
        if fault is not None:
            raise fault

    def close(self) -> None:
        """Write what was offered and let the next owner in. Arrays in use stay valid."""
        with self._lock:
            if self._closed.is_set():
                return
            self._closed.set()
            self._ready.notify()
        self._thread.join()
        try:
            self.flush()
        finally:
            self._store.close()

    def __enter__(self) -> TrafficLearner:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- the thread -------------------------------------------------------------------------

    def _work(self) -> None:
        while not self._closed.is_set():
            with self._ready:
                self._ready.wait_for(lambda: self._pending or self._closed.is_set())
            # Without the lock on the store, so that flush() and forget() find it free in between.
            self._closed.wait(GATHER_SECONDS)
            with self._disk:
                self._drain()

    def _take_pending(self) -> list[tuple[bytes, IntArray]]:
        with self._lock:
            batch, self._pending, self._pending_tokens = self._pending, [], 0
        return batch

    def _drain(self) -> None:
        """Write what is in the queue; the caller holds the store."""
        batch = self._take_pending()
        if not batch:
            return
        if self._store.broken:
            self._reopen()
        try:
            self._forget_copies(self._store.append([tokens for _, tokens in batch]))
        except (TascadeError, OSError, MemoryError) as error:
            self._recover(error, len(batch))
        self._publish()

    def _recover(self, error: Exception, lost: int) -> None:
        """A server must go on when its disk is full: drop the batch, try again with the next."""
        _log.warning("%d answers could not be learned: %s", lost, error)
        self._fault = error
        with self._lock:
            self._counts["dropped"] += lost
        self._reopen()

    def _reopen(self) -> None:
        try:
            self._store.reopen()
        except (TascadeError, OSError, MemoryError) as error:
            _log.warning("the learned corpus cannot be opened again: %s", error)
        with self._lock:
            self._copies = Counter(self._store.keys())
            self._copies.update(key for key, _ in self._pending)

    def _forget_copies(self, keys: Iterable[bytes]) -> None:
        with self._lock:
            for key in keys:
                self._copies[key] -= 1
                if self._copies[key] <= 0:
                    del self._copies[key]

    def _publish(self) -> None:
        self.snapshot = _Snapshot(self._store.shards, self._store.delta_tokens)
        self._version += 1


def folder_facts(folder: Path) -> dict[str, int | str]:
    """What is in a learned folder, also while a server owns it.

    Raises:
        PackError: nothing can be read there, or it was not learned.
    """
    read_learned_manifest(folder)
    index = CorpusIndex.open(folder)
    return {
        "folder": str(folder),
        "documents": index.n_documents,
        "tokens": index.n_tokens,
        "bytes": index.n_bytes,
        "fingerprint": index.fingerprint,
    }


def forget_in(folder: Path, ids: Iterable[int] | None) -> int:
    """Remove documents (``None``: all) from a learned folder that nobody owns; returns how many.

    Raises:
        PackError: a server owns it, or it was not learned.
    """
    manifest = read_learned_manifest(folder)
    store = LearnedCorpus(folder, manifest.fingerprint, manifest.vocab_size, MAX_TOKENS)
    try:
        return len(store.forget(ids))
    finally:
        store.close()


class AppendedWatch:
    """Looks into open indexes now and then, and takes up what their writers did.

    Args:
        indexes: open for reading.
        every: seconds between two looks.
    """

    def __init__(self, indexes: Sequence[CorpusIndex], every: float = 2.0) -> None:
        self._indexes, self._every = indexes, every
        self._next = time.monotonic() + every
        self._failed: set[int] = set()

    def refresh_due(self) -> bool:
        """Whether anything is new since the last look; the caller then refreshes its drafter.

        An index that cannot be read any more stays in use as it was; the log says so once.
        """
        if time.monotonic() < self._next:
            return False
        changed = False
        for i, index in enumerate(self._indexes):
            try:
                changed |= index.refresh()
                self._failed.discard(i)
            except PackError as error:
                if i not in self._failed:
                    _log.warning("what is appended to an index is not seen now: %s", error)
                self._failed.add(i)
        self._next = time.monotonic() + self._every
        return changed

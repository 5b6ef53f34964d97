"""A corpus that grows with traffic: few copies of an answer, a cap on tokens, forgetting for good.

A corpus index (corpus.py) in a folder of its own, which one process at a time may own. Everything
here is for one thread; tascade.index.traffic puts a queue and a thread in front of it.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from tascade.core import IntArray
from tascade.errors import ConfigError, FingerprintError, PackError
from tascade.index.build import TOKENS_PER_SHARD
from tascade.index.corpus import CorpusIndex
from tascade.index.store import (
    MANIFEST,
    SHARDS,
    Manifest,
    Shard,
    parse_manifest,
    read_manifest_bytes,
    writing,
)
from tascade.util.files import sync_folder

COPIES = 4
"""How often one answer is kept. Drafts go by the share of the votes: the answer that comes again
and again should outvote the one that came once (4 to 1 is 80 %), while one that comes all day, from
a health check say, must not fill the folder and push everything else out."""
LEARNED_SHARDS = 2
"""Each shard is one more search a draft; with one alone, every compaction would sort all of it."""
COMPACT_AT = 30_000
"""Tokens of the delta from which it is folded into shards: drafts search it less well, and it is
read whole when a drafter starts."""
MAX_TOKENS = TOKENS_PER_SHARD // 2
_MARK = "learned from traffic"


def key_of(tokens: IntArray) -> bytes:
    """Stands for the content of a document when copies are counted."""
    return hashlib.blake2b(tokens.tobytes(), digest_size=16).digest()


class LearnedCorpus:
    """The learned documents of one folder. They leave oldest first.

    Attributes:
        folder: where they are; mode 0700.
        n_tokens: how many tokens they have, those not yet in a shard included.
        compactions, evicted: counters since the folder was opened.
        broken: whether :meth:`reopen` failed, and must succeed before anything is written.
        shard_limit: most shards that a compaction leaves.
    """

    def __init__(self, folder: Path, fingerprint: str, vocab_size: int, max_tokens: int) -> None:
        """Open a learned corpus, or start one in a new or empty folder.

        Raises:
            FingerprintError: it was made for another tokenizer.
            ConfigError: ``max_tokens`` out of range.
            PackError: another process owns it, something else is there, or it is damaged.
        """
        if not 1 <= max_tokens <= MAX_TOKENS:
            wanted = f"a whole number from 1 to {MAX_TOKENS}"
            raise ConfigError(
                "value out of range", got=max_tokens, wanted=wanted, where="max_tokens"
            )
        self.folder, self.fingerprint, self.vocab_size = folder, fingerprint, vocab_size
        self.max_tokens = max_tokens
        self.shard_limit = LEARNED_SHARDS
        self.compactions = self.evicted = 0
        self.broken = False
        # Room is made for more than the next document, or each one would cost a compaction.
        self._slack = min(COMPACT_AT, max_tokens // 8)
        self._prepare()
        self._load()

    def _prepare(self) -> None:
        with writing(self.folder):
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not (self.folder / MANIFEST).exists():
            try:
                CorpusIndex.build(
                    self.folder,
                    [],
                    vocab_size=self.vocab_size,
                    fingerprint=self.fingerprint,
                    command=_MARK,
                )
            except PackError:
                if not (self.folder / MANIFEST).exists():  # else another process was faster
                    raise
        read_learned_manifest(self.folder)
        with writing(self.folder):
            self.folder.chmod(0o700)

    def _load(self) -> None:
        self._index = _open_owned(self.folder, self.fingerprint)
        try:
            if self._index.vocab_size != self.vocab_size:
                raise FingerprintError(
                    "the learned corpus was made for another vocabulary",
                    got=f"{self._index.vocab_size} ids",
                    wanted=f"{self.vocab_size} ids",
                    where=str(self.folder),
                    fix="use a learned folder of its own for each model",
                )
            self.n_tokens = 0
            self._rows: dict[int, tuple[bytes, int]] = {}
            for number, tokens in self._index.documents():
                self._note(number, tokens)
            # Tombstones mean that a process died while it was forgetting: finish its work.
            if self._make_room(0) or self._index.manifest.tombstones:
                self._compact()
        except BaseException:
            self._index.close()
            raise

    def reopen(self) -> None:
        """After a failed write: go on from what is on disk."""
        self.broken = True
        with contextlib.suppress(PackError):
            self._index.close()
        self._load()
        self.broken = False

    @property
    def shards(self) -> tuple[Shard, ...]:
        """Sorted arrays; they stay valid when a compaction replaces them."""
        return self._index.shards

    @property
    def delta_tokens(self) -> IntArray:
        """[n] int32: documents not yet in a shard; stays as it is when more are added."""
        return self._index.delta_tokens

    @property
    def n_documents(self) -> int:
        """How many documents there are."""
        return len(self._rows)

    def keys(self) -> Iterator[bytes]:
        """:func:`key_of` every document, the oldest first."""
        return (key for key, _ in self._rows.values())

    def append(self, documents: Sequence[IntArray]) -> list[bytes]:
        """Add documents (each at most ``max_tokens`` long); on disk when this returns.

        Returns:
            Keys of the documents that had to leave.
        """
        gone: list[bytes] = []
        for some in _portions(documents, self._slack):
            left = self._make_room(sum(map(len, some)))
            for number, tokens in zip(self._index.append(some, flush=False), some, strict=True):
                self._note(number, tokens)
            if left or len(self.delta_tokens) >= COMPACT_AT:
                self._compact()
            gone += left
        self._index.flush()
        return gone

    def forget(self, ids: Iterable[int] | None) -> list[bytes]:
        """Remove documents, or all of them, from every file; returns their keys."""
        known = self._rows if ids is None else self._rows.keys() & set(ids)
        keys = self._delete(sorted(known))
        if keys:
            self._compact()
        else:
            self._check_gone()
        return keys

    def limit_shards(self, limit: int) -> None:
        """Have no more than ``limit`` shards from now on."""
        self.shard_limit = limit
        if len(self.shards) > limit:
            self._compact()

    def close(self) -> None:
        """Flush and let the next owner in. Arrays already taken stay valid."""
        self._index.close()

    def _note(self, number: int, tokens: IntArray) -> None:
        self._rows[number] = key_of(tokens), len(tokens)
        self.n_tokens += len(tokens)

    def _make_room(self, wanted: int) -> list[bytes]:
        """Delete the oldest documents if ``wanted`` tokens do not fit; the caller compacts."""
        if self.n_tokens + wanted <= self.max_tokens:
            return []
        surplus = self.n_tokens + max(wanted, self._slack) - self.max_tokens
        oldest: list[int] = []
        for number, (_, length) in self._rows.items():
            if surplus <= 0:
                break
            oldest.append(number)
            surplus -= length
        self.evicted += len(oldest)
        return self._delete(oldest)

    def _delete(self, ids: list[int]) -> list[bytes]:
        if not ids:
            return []
        self._index.delete(ids)
        rows = [self._rows.pop(number) for number in ids]
        self.n_tokens -= sum(length for _, length in rows)
        return [key for key, _ in rows]

    def _compact(self) -> None:
        """Fold delta and deletions into shards; what was deleted is in no file afterwards."""
        self._index.compact(self.shard_limit)
        self.compactions += 1
        self._check_gone()

    def _check_gone(self) -> None:
        """Refuse to go on where a file that is no longer part of the index could not be removed."""
        manifest = self._index.manifest
        named = {manifest.delta, *(entry.name for entry in manifest.shards)}
        with writing(self.folder):
            found = [*self.folder.glob("delta-*.log"), *(self.folder / SHARDS).iterdir()]
            sync_folder(self.folder / SHARDS)
            sync_folder(self.folder)
        if remains := [path.name for path in found if path.name not in named]:
            raise PackError(
                "documents were forgotten, but files that hold them could not be removed",
                got=f"left there: {sorted(remains)[:5]}",
                where=str(self.folder),
                fix="remove these by hand; the index no longer needs them",
            )


def read_learned_manifest(folder: Path) -> Manifest:
    """The manifest of a learned corpus, without opening it.

    Raises:
        PackError: nothing can be read there, or it is an index that was not learned.
    """
    manifest = parse_manifest(read_manifest_bytes(folder), folder)
    if manifest.command != _MARK:  # a pack's index must be neither appended to nor emptied
        raise PackError(
            "this corpus index was not learned from traffic",
            got=f"an index made by: {manifest.command or 'unknown'}",
            wanted="a folder that TrafficLearner made, or a new one",
            where=str(folder),
            fix="choose a folder of its own for what is learned, beside the pack",
        )
    return manifest


def _open_owned(folder: Path, fingerprint: str) -> CorpusIndex:
    try:
        return CorpusIndex.open(folder, fingerprint=fingerprint, verify=True, writable=True)
    except PackError as error:
        if not isinstance(error.__cause__, BlockingIOError):
            raise
        raise PackError(
            "another process owns this learned corpus",
            got="a folder that is open elsewhere",
            wanted="one owner at a time",
            where=str(folder),
            fix="give every server a learned folder of its own, or stop the other one first",
        ) from error


def _portions(documents: Sequence[IntArray], tokens: int) -> Iterator[list[IntArray]]:
    """Cut into runs of at most ``tokens`` tokens, or of one document that is longer."""
    some: list[IntArray] = []
    size = 0
    for document in documents:
        if some and size + len(document) > tokens:
            yield some
            some, size = [], 0
        some.append(document)
        size += len(document)
    if some:
        yield some


_log = logging.getLogger(__name__)


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

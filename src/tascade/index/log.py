"""The delta log: documents appended to a corpus index since its last compaction.

After a header that ties the file to its index, one record a document, all little-endian::

    magic 4s | length u32 | document id i64 | durable u64 | crc32 of these u32
    tokens i32 [length] | crc32 of the tokens u32

``durable`` is how many bytes of the file were known to be on disk when the record was written.
A record that does not check out is therefore one of two things. If a later record says that those
bytes had been on disk, the file was damaged since, and it is refused. Otherwise the record is the
torn tail of a writer that died before it had promised anything, and the log ends there.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tascade.core import SEPARATOR, IntArray
from tascade.errors import PackError
from tascade.index.store import MAX_ID, damaged, sync_file, writing
from tascade.util.files import sync_folder

_FILE = struct.Struct("<8s16sII")  # magic, identity, format version, crc32 of these
_FILE_MAGIC = b"TASCDLTA"
_RECORD = struct.Struct("<4sIqQI")
_MAGIC = b"TDOC"
_CRC = struct.Struct("<I")


class LogTail(NamedTuple):
    """Documents read from a log, their ids ascending, and where the last whole record ends."""

    ids: list[int]
    documents: list[IntArray]
    end: int


def create_log(path: Path, identity: str) -> None:
    """Write an empty log to disk, over any file of that name that no manifest named."""
    head = _FILE.pack(_FILE_MAGIC, bytes.fromhex(identity), 1, 0)[: -_CRC.size]
    with writing(path):
        with path.open("wb") as file:
            file.write(head + _CRC.pack(zlib.crc32(head)))
            sync_file(file)
        sync_folder(path.parent)


def read_log(path: Path, identity: str, limit: int, offset: int = 0, after: int = -1) -> LogTail:
    """Read the whole records of a log from ``offset`` on.

    Args:
        path: the log file.
        identity: of the index, as its manifest says, in hexadecimal.
        limit: every token must be below; V, or less.
        offset: where an earlier reading ended; 0 reads from the start and checks the header.
        after: the last document id of the earlier reading; ids must rise from there.

    Raises:
        PackError: the file is missing, belongs to another index, or is damaged before its tail.
    """
    try:
        with path.open("rb") as file:
            header = file.read(_FILE.size)
            file.seek(max(offset, _FILE.size))
            data = file.read()
    except OSError as error:
        raise damaged(path, error.strerror or error, "the log that the manifest names") from error
    head = _FILE.pack(_FILE_MAGIC, bytes.fromhex(identity), 1, 0)[: -_CRC.size]
    if header != head + _CRC.pack(zlib.crc32(head)):
        raise damaged(path, "a header cut short, altered or of another index", f"index {identity}")
    start = max(offset, _FILE.size)
    ids, documents, used = _parse(data)
    if used < len(data):
        _refuse_if_promised(path, data, start, used)
    for number, tokens in zip(ids, documents, strict=True):
        ids_sound = after < number <= MAX_ID
        if not ids_sound or int(tokens.min()) < 0 or int(tokens.max()) >= limit:
            raise damaged(
                path, f"document {number}", f"rising ids, tokens in the vocabulary: below {limit}"
            )
        after = number
    return LogTail(ids, documents, start + used)


def _parse(data: bytes) -> tuple[list[int], list[IntArray], int]:
    """Whole records from the start of ``data``: ids, tokens, bytes used."""
    ids: list[int] = []
    documents: list[IntArray] = []
    at = 0
    while (head := _record_at(data, at)) is not None:
        length, number, _ = head
        begin = at + _RECORD.size
        end = begin + 4 * length
        if end + _CRC.size > len(data):
            break
        if _CRC.unpack_from(data, end)[0] != zlib.crc32(memoryview(data)[begin:end]):
            break
        ids.append(number)
        documents.append(np.frombuffer(data, np.dtype("<i4"), length, begin))
        at = end + _CRC.size
    return ids, documents, at


def _record_at(data: bytes, at: int) -> tuple[int, int, int] | None:
    """Length, id and ``durable`` of the record header at ``at``; None if there is none."""
    if at + _RECORD.size > len(data):
        return None
    magic, length, number, durable, crc = _RECORD.unpack_from(data, at)
    covered = memoryview(data)[at : at + _RECORD.size - _CRC.size]
    if magic != _MAGIC or crc != zlib.crc32(covered) or length == 0:
        return None
    return length, number, durable


def _refuse_if_promised(path: Path, data: bytes, start: int, bad: int) -> None:
    """Raise if any record after the bad one proves that the bad one had reached the disk."""
    at = data.find(_MAGIC, bad + 1)
    while at >= 0:
        head = _record_at(data, at)
        if head is not None and head[2] > start + bad:
            raise damaged(path, f"an altered record at byte {start + bad}", "whole records")
        at = data.find(_MAGIC, at + 1)


class DeltaText:
    """The live documents of a log in one growing array, separators as in a shard's ``tokens``."""

    def __init__(self) -> None:
        self._buffer = np.full(1024, SEPARATOR, np.int32)
        self._length = 1

    def extend(self, documents: Sequence[IntArray]) -> None:
        """Add documents; arrays taken from :attr:`tokens` before stay as they were."""
        need = self._length + sum(len(tokens) + 1 for tokens in documents)
        if need > len(self._buffer):
            grown = np.full(max(need, 2 * len(self._buffer)), SEPARATOR, np.int32)
            grown[: self._length] = self._buffer[: self._length]
            self._buffer = grown
        for tokens in documents:
            end = self._length + len(tokens)
            self._buffer[self._length : end] = tokens
            self._buffer[end] = SEPARATOR
            self._length = end + 1

    @property
    def tokens(self) -> IntArray:
        """[n] int32, read-only; ``[-1]`` without documents."""
        view = self._buffer[: self._length]
        view.flags.writeable = False
        return view


class LogWriter:
    """Appends records to an existing log. The caller holds the index's lock."""

    def __init__(self, path: Path, end: int) -> None:
        """Open for appending; drops the torn tail after byte ``end``, of a writer that died."""
        self.path = path
        self._failed = False
        with writing(path):
            self._file = path.open("r+b", buffering=0)
            try:
                self._file.truncate(end)
                self._file.seek(end)
                os.fsync(self._file.fileno())
            except BaseException:
                self._file.close()
                raise
        self.end = self._durable = end

    def append(self, ids: Sequence[int], documents: Sequence[IntArray]) -> None:
        """Write one record per document; other processes see them, :meth:`flush` keeps them."""
        self._check()
        batch = bytearray()
        for number, tokens in zip(ids, documents, strict=True):
            body = np.ascontiguousarray(tokens, "<i4").tobytes()
            head = _RECORD.pack(_MAGIC, len(tokens), number, self._durable, 0)[: -_CRC.size]
            batch += head + _CRC.pack(zlib.crc32(head)) + body + _CRC.pack(zlib.crc32(body))
        with writing(self.path):
            try:
                self._write(batch)
            except OSError:
                self._failed = True
                self._file.truncate(self.end)
                self._file.seek(self.end)
                self._failed = False
                raise
        self.end += len(batch)

    def _write(self, batch: bytearray) -> None:
        rest = memoryview(batch)
        while rest:
            rest = rest[self._file.write(rest) :]

    def flush(self) -> None:
        """Return when every record is on disk."""
        if self._durable == self.end:
            return
        self._check()
        self._failed = True  # after a failed fsync nothing is known of the earlier writes
        with writing(self.path):
            os.fsync(self._file.fileno())
        self._failed = False
        self._durable = self.end

    def _check(self) -> None:
        if self._failed:
            raise PackError(
                "an earlier write to the delta log failed",
                where=str(self.path),
                fix="open the index again; it holds every document flushed before the failure",
            )

    def close(self) -> None:
        """Close the file; unflushed records stay with the operating system."""
        self._file.close()

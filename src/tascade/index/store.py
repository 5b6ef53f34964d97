"""The folder of a corpus index: manifest, array files, atomic writes and the writer's lock.

::

    manifest.json        names everything below; replaced whole by rename, checksummed
    shards/<n>/*.npy     tokens, order, head, documents: immutable once the manifest names them
    delta-<n>.log        documents appended since the last compaction (corpus_log.py)
    writer.lock          held by the one writer

A file that the manifest does not name is not part of the index. Shard and log numbers are never
used twice, so whoever still maps an old file goes on reading what was in it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tascade.core import IntArray
from tascade.errors import PackError
from tascade.index.arrays import UIntArray
from tascade.util.files import checksum, sync_folder, write_atomic

IN_MEMORY_BYTES = 64 << 20
"""An index up to this size is read when it is opened; a larger one is mapped. Where a file is cut
short under a map, the system ends the process at the next read (SIGBUS), and nothing can be caught;
64 MB a process is little beside a model, and holds the outputs of most tasks."""


def read_array(
    path: Path, dtype: np.dtype[Any], shape: tuple[int, ...], *, mapped: bool
) -> npt.NDArray[Any]:
    """One ``.npy`` file, after comparing its header and length with what is wanted; read-only.

    Args:
        path: the file.
        dtype: what its values must be.
        shape: of the array; the file must be as long as that, so that no header can ask for memory
            that the file does not take on disk.
        mapped: leave the values in the file instead of reading them.

    Raises:
        PackError: missing, of another type, shape or length.
    """
    wanted = f"a .npy file of {dtype} {list(shape)}"
    try:
        with path.open("rb") as file:
            major, minor = np.lib.format.read_magic(file)
            if (major, minor) != (1, 0):
                raise ValueError(f".npy format {major}.{minor}")
            found_shape, fortran, found_dtype = np.lib.format.read_array_header_1_0(file)
            begin, size = file.tell(), os.fstat(file.fileno()).st_size
            if found_dtype != dtype or found_shape != shape or fortran:
                raise ValueError(f"{found_dtype} {list(found_shape)}")
            length = dtype.itemsize * int(np.prod(shape, dtype=object))
            if size != begin + length or begin % 64:
                raise ValueError(f"{size} bytes, not {begin + length} aligned to 64")
            if mapped:  # as a plain array: numba reads its type faster than a memmap's
                return np.asarray(np.memmap(file, dtype, "r", begin, shape))
            values = np.fromfile(file, dtype, length // dtype.itemsize).reshape(shape)
    except Exception as error:  # numpy's header parser raises nearly anything on odd bytes
        raise PackError(
            "a file of the index is damaged",
            got=f"{type(error).__name__}: {error}"[:300],
            wanted=wanted,
            where=str(path),
            fix="rebuild the index from the task data, or restore the folder from a copy",
        ) from error
    values.flags.writeable = False
    return values


FORMAT = "tascade-corpus-index"
VERSION = 1
MANIFEST = "manifest.json"
STRAY_MANIFEST = r"\.manifest\.json\..+\.part"
LOG_NAME = r"delta-[0-9]{1,9}\.log"
SHARDS = "shards"
LOCK = "writer.lock"
ARRAYS = ("tokens.npy", "order.npy", "head.npy", "documents.npy")
MAX_SHARD_TOKENS = 2**32 - 2
MAX_VOCAB = 2**31 - 1
MAX_ID = 2**62
"""Of documents and shards: room enough, and the next one still fits where it is written."""
_MAX_MANIFEST_BYTES = 64 << 20
MAX_SHARDS = 4096
_REBUILD = "rebuild the index from the task data, or restore the folder from a copy"


RowArray = npt.NDArray[np.int64]
"""[D, 2] int64: the id of each document of a shard, and where in ``tokens`` its first token is."""


class Shard(NamedTuple):
    """One sorted run of documents, read-only. Shapes: corpus_arrays.py.

    Unless the index was opened with ``verify=True``, ``order`` may be in any order and may name
    separators: whoever reads a token there must look whether it is one. All else is checked, and
    holds for as long as nobody writes into a mapped file.
    """

    tokens: IntArray
    order: UIntArray
    head: UIntArray


@dataclass(frozen=True, slots=True)
class ShardEntry:
    """What the manifest says of one shard; ``tokens`` leaves the separators out."""

    name: str
    tokens: int
    documents: int
    sha256: dict[str, str]


@dataclass(frozen=True, slots=True)
class Manifest:
    """The contents of ``manifest.json``; ``identity`` is random and ties the log to the index."""

    identity: str
    fingerprint: str
    vocab_size: int
    shards: tuple[ShardEntry, ...]
    tombstones: tuple[int, ...]
    next_document_id: int
    next_shard: int
    delta: str
    sources: tuple[tuple[str, str], ...]
    command: str
    tascade_version: str

    def with_next_log(self, **changes: Any) -> Manifest:
        """A copy that names the next log file, with ``changes``."""
        number = int(self.delta.removeprefix("delta-").removesuffix(".log"))
        return replace(self, delta=f"delta-{number + 1}.log", **changes)


def encode_manifest(manifest: Manifest) -> bytes:
    """The bytes of ``manifest.json``."""
    body = {"format": FORMAT, "version": VERSION, **asdict(manifest)}
    body["checksum"] = checksum(json.loads(json.dumps(body)))
    return (json.dumps(body, indent=1, sort_keys=True) + "\n").encode()


def read_manifest_bytes(root: Path) -> bytes:
    """Read ``manifest.json`` whole.

    Raises:
        PackError: there is none, or it is far too large to be one.
    """
    path = root / MANIFEST
    try:
        with path.open("rb") as file:
            raw = file.read(_MAX_MANIFEST_BYTES + 1)
    except OSError as error:
        raise PackError(
            "no corpus index can be read here",
            got=error.strerror or error,
            wanted=f"a folder with {MANIFEST}",
            where=str(path),
            fix="check the path, or build the index with CorpusIndex.build",
        ) from error
    if len(raw) > _MAX_MANIFEST_BYTES:
        raise damaged(path, f"more than {_MAX_MANIFEST_BYTES} bytes", "a manifest")
    return raw


def parse_manifest(raw: bytes, root: Path) -> Manifest:
    """Parse and check a manifest that nobody vouches for.

    Raises:
        PackError: not a manifest, of another format version, altered, or with a value (a name
            that would lead out of the folder, say) that tascade never writes.
    """
    path = root / MANIFEST
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise damaged(path, error, "JSON") from error
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        raise damaged(path, "another kind of file", f'"format": "{FORMAT}"')
    version = body.get("version")
    if version != VERSION or isinstance(version, bool):
        raise PackError(
            "this version of tascade does not read this format of corpus index",
            got=f"format version {version!r}",
            wanted=f"format version {VERSION}",
            where=str(path),
            fix="upgrade tascade, or rebuild the index with this version",
        )
    try:
        if body.pop("checksum", None) != checksum(body):
            raise ValueError("contents that do not match their checksum")
        return _manifest_from(body)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise damaged(path, f"{type(error).__name__}: {error}", "the fields of format 1") from error


def _manifest_from(body: dict[str, Any]) -> Manifest:
    shards = tuple(_shard_entry_from(item) for item in _list(body["shards"], MAX_SHARDS))
    if len({entry.name for entry in shards}) != len(shards):
        raise ValueError("a shard is named twice")
    return Manifest(
        identity=_text(body["identity"], r"[0-9a-f]{32}"),
        fingerprint=_text(body["fingerprint"]),
        vocab_size=_int(body["vocab_size"], 1, MAX_VOCAB),
        shards=shards,
        tombstones=tuple(_int(i, 0) for i in _list(body["tombstones"])),
        next_document_id=_int(body["next_document_id"], 0),
        next_shard=_int(body["next_shard"], 0),
        delta=_text(body["delta"], LOG_NAME),
        sources=tuple((_text(name), _text(digest)) for name, digest in _list(body["sources"])),
        command=_text(body["command"]),
        tascade_version=_text(body["tascade_version"]),
    )


def _shard_entry_from(item: dict[str, Any]) -> ShardEntry:
    return ShardEntry(
        name=_text(item["name"], r"[0-9]{1,9}"),
        tokens=_int(item["tokens"], 1, MAX_SHARD_TOKENS),
        documents=_int(item["documents"], 1, MAX_SHARD_TOKENS),
        sha256={name: _text(item["sha256"][name], r"[0-9a-f]{64}") for name in ARRAYS},
    )


def _text(value: object, pattern: str = "") -> str:
    if not isinstance(value, str) or (pattern and not re.fullmatch(pattern, value)):
        raise ValueError(f"{str(value)[:80]!r} where a string {pattern} belongs")
    return value


def _int(value: object, low: int, high: int = MAX_ID) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(f"{str(value)[:80]} where a whole number from {low} to {high} belongs")
    return value


def _list(value: object, limit: int = 2**62) -> list[Any]:
    if not isinstance(value, list) or len(value) > limit:
        raise ValueError(f"a list of at most {limit} belongs here")
    return value


def damaged(path: Path, got: object, wanted: str) -> PackError:
    """The error for a file that is not what the manifest promised."""
    return PackError(
        "the corpus index is damaged", got=got, wanted=wanted, where=str(path), fix=_REBUILD
    )


def write_manifest(root: Path, manifest: Manifest) -> None:
    """Replace the manifest in one step; on return it is on disk."""
    raw = encode_manifest(manifest)
    if len(raw) > _MAX_MANIFEST_BYTES:
        raise PackError(
            "the manifest of the corpus index grew too large",
            got=f"{len(manifest.tombstones)} deleted documents, {len(raw)} bytes",
            wanted=f"at most {_MAX_MANIFEST_BYTES} bytes",
            where=str(root / MANIFEST),
            fix="delete fewer documents at once and call compact() in between",
        )
    with writing(root):
        write_atomic(root / MANIFEST, raw)


def sync_file(file: IO[bytes]) -> None:
    """Flush a file to disk."""
    file.flush()
    os.fsync(file.fileno())


def write_shard(root: Path, name: str, shard: Shard, documents: RowArray) -> ShardEntry:
    """Write the four arrays to ``shards/<name>``, which no manifest names yet, and to disk."""
    folder = root / SHARDS / name
    digests = {}
    with writing(folder):
        if folder.exists():  # left by a compaction that failed
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
        arrays: tuple[npt.NDArray[Any], ...] = (*shard, documents)
        for file_name, array in zip(ARRAYS, arrays, strict=True):
            with (folder / file_name).open("wb") as file:
                np.save(file, array, allow_pickle=False)
                sync_file(file)
            digests[file_name] = sha256_of(folder / file_name)
        sync_folder(folder)
    return ShardEntry(name, len(shard.order), len(documents), digests)


def sha256_of(path: Path) -> str:
    """Digest of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class WriterLock:
    """At most one writer per index folder. Released by ``close`` and by the end of the process."""

    def __init__(self, root: Path) -> None:
        path = root / LOCK
        self._stale: Path | None = None
        self._owner = os.getpid()
        try:
            self._file = _lock_file(path)
            if os.name == "nt":  # pragma: no cover
                self._stale = path
        except OSError as error:
            raise PackError(
                "another writer holds this corpus index, or the folder cannot be written",
                got=error.strerror or error,
                wanted="one writer at a time",
                where=str(path),
                fix="close the other writer, or open without writable=True",
            ) from error

    def check(self) -> None:
        """Refuse a fork of the writer: parent and child would share the lock."""
        if self._file.closed or os.getpid() != self._owner:
            raise PackError(
                "this process does not hold the writer's lock",
                got="a writer that was closed, or inherited through fork",
                wanted="the process that opened the index",
                fix="open the index with writable=True in the process that writes",
            )

    def close(self) -> None:
        """Let the next writer in."""
        self._file.close()
        if self._stale is not None:  # pragma: no cover
            self._stale.unlink(missing_ok=True)


def _lock_file(path: Path) -> IO[bytes]:
    try:
        import fcntl
    except ImportError:  # pragma: no cover
        return path.open("xb")
    file = path.open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
            raise OSError("the index was replaced just now")
    except BaseException:
        file.close()
        raise
    return file


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the system's refusal to write into a :class:`PackError` that names the folder."""
    try:
        yield
    except OSError as error:
        raise PackError(
            "the corpus index could not be written",
            got=error.strerror or error,
            wanted="a folder with room and permission to write",
            where=str(error.filename or path),
            fix="free some space or change the permissions, then try again",
        ) from error

"""From documents to an index: checking what comes in, sorting shards as it comes, moving in."""

from __future__ import annotations

import os
import re
import secrets
from array import array
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import numpy as np

from tascade.core import SEPARATOR, IntArray
from tascade.errors import ConfigError, DataError, PackError
from tascade.index.arrays import sort_shard
from tascade.index.log import create_log
from tascade.index.store import (
    LOCK,
    LOG_NAME,
    MANIFEST,
    MAX_SHARD_TOKENS,
    MAX_SHARDS,
    MAX_VOCAB,
    SHARDS,
    STRAY_MANIFEST,
    Manifest,
    Shard,
    ShardEntry,
    WriterLock,
    write_manifest,
    write_shard,
    writing,
)
from tascade.util.files import folder_beside, install_folder, sync_folder

TOKENS_PER_SHARD = 1 << 28
"""A shard is cut here in any case; it bounds the memory of a build."""

_SEPARATOR_BYTES = np.int32(SEPARATOR).tobytes()


def as_document(tokens: Sequence[int] | IntArray, vocab_size: int, name: str) -> IntArray:
    """Check one document and return it as [n] int32.

    Args:
        tokens: token ids, the end token included.
        vocab_size: V; every id must be in 0..V-1.
        name: what to call the document in an error.

    Raises:
        DataError: not a flat list of whole numbers, empty, or an id out of range.
    """
    try:
        ids = np.asarray(tokens)
    except (ValueError, TypeError, OverflowError) as error:
        raise _refused(name, error, "a flat list of token ids") from error
    if ids.ndim != 1 or len(ids) == 0:
        got = "no tokens" if ids.ndim == 1 else f"an array of shape {list(ids.shape)}"
        raise _refused(name, got, "a flat list of at least one token id")
    if ids.dtype.kind not in "iu":
        kind = f"values of type {ids.dtype}, such as {str(ids[0])[:80]}"
        raise _refused(name, kind, f"whole numbers from 0 to {vocab_size - 1}")
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        worst = low if low < 0 else high
        at = int(np.argmax(ids == worst))
        got = f"token id {worst} at index {at}"
        raise _refused(name, got, f"token ids from 0 to {vocab_size - 1}")
    return ids.astype(np.int32, copy=False)


def _refused(name: str, got: object, wanted: str) -> DataError:
    return DataError(
        "this document cannot be put into a corpus index",
        got=got,
        wanted=wanted,
        where=name,
        fix="tokenize with the index's own tokenizer and leave out empty outputs",
    )


class _ShardText:
    """The tokens and rows of the shard being filled; 4 bytes a token while it grows."""

    def __init__(self) -> None:
        self.tokens = array("i", [SEPARATOR])
        self.rows = array("q")

    @property
    def n_tokens(self) -> int:
        return len(self.tokens) - len(self.rows) // 2 - 1

    def add(self, number: int, tokens: IntArray) -> None:
        self.rows.extend((number, len(self.tokens)))
        self.tokens.frombytes(np.ascontiguousarray(tokens, np.int32).tobytes())
        self.tokens.frombytes(_SEPARATOR_BYTES)

    def write(self, root: Path, name: str, vocab_size: int) -> ShardEntry:
        tokens = np.frombuffer(self.tokens, np.int32)
        order, head = sort_shard(tokens, vocab_size)
        rows = np.frombuffer(self.rows, np.int64).reshape(-1, 2)
        return write_shard(root, name, Shard(tokens, order, head), rows)


def write_shards(
    root: Path,
    documents: Iterable[tuple[int, IntArray]],
    vocab_size: int,
    tokens_per_shard: int,
    first_number: int,
) -> list[ShardEntry]:
    """Write documents to numbered shards, cutting after the document that fills one.

    Args:
        root: the index folder; no manifest names the new shards yet.
        documents: (id, [n] int32) pairs, ids ascending, checked by :func:`as_document`.
        vocab_size: V.
        tokens_per_shard: a shard is full when it holds this many tokens.
        first_number: number of the first new shard.

    Raises:
        DataError: a document too long for any shard.
        PackError: the folder cannot be written.
    """
    entries: list[ShardEntry] = []
    text = _ShardText()
    for number, tokens in documents:
        if len(text.tokens) + len(tokens) + 1 > MAX_SHARD_TOKENS:
            got = f"{len(tokens)} tokens"
            raise _refused(f"document {number}", got, f"at most {MAX_SHARD_TOKENS} in a shard")
        text.add(number, tokens)
        if text.n_tokens >= tokens_per_shard:
            entries.append(text.write(root, str(first_number + len(entries)), vocab_size))
            text = _ShardText()
    if text.rows:
        entries.append(text.write(root, str(first_number + len(entries)), vocab_size))
    with writing(root):
        sync_folder(root / SHARDS)
        sync_folder(root)
    return entries


def new_manifest(
    fingerprint: str, vocab_size: int, sources: Iterable[tuple[str, str]], command: str
) -> Manifest:
    """The manifest of an index without documents.

    Raises:
        ConfigError: ``vocab_size`` out of range.
    """
    _check_range("vocab_size", vocab_size, MAX_VOCAB)
    return Manifest(
        identity=secrets.token_hex(16),
        fingerprint=fingerprint,
        vocab_size=int(vocab_size),
        shards=(),
        tombstones=(),
        next_document_id=0,
        next_shard=0,
        delta="delta-0.log",
        sources=tuple((name, digest) for name, digest in sources),
        command=command,
        tascade_version=_tascade_version(),
    )


def write_index(
    path: Path,
    documents: Iterable[Sequence[int] | IntArray],
    manifest: Manifest,
    shards: int,
    overwrite: bool,
) -> None:
    """Write a whole index beside ``path``, then move it there.

    Args:
        path: the folder to make.
        documents: token ids of each; they get the ids 0, 1, ...
        manifest: of the index while it is empty.
        shards: into how many to cut, at most.
        overwrite: replace an index already there.

    Raises:
        DataError: a document cannot be used.
        ConfigError: ``shards`` out of range.
        PackError: something is at ``path`` already, or it cannot be written.
    """
    _check_range("shards", shards, MAX_SHARDS)
    target = Path(os.path.realpath(path))
    _refuse_occupied(target, overwrite)
    vocab_size = manifest.vocab_size
    numbered: Iterable[tuple[int, IntArray]] = (
        (i, as_document(tokens, vocab_size, f"document {i}")) for i, tokens in enumerate(documents)
    )
    tokens_per_shard = TOKENS_PER_SHARD
    if shards > 1:
        numbered = list(numbered)
        fair = -(-sum(len(tokens) for _, tokens in numbered) // shards)
        tokens_per_shard = min(tokens_per_shard, fair)
    with ExitStack() as stack:
        with writing(target):
            part = stack.enter_context(folder_beside(target))
            (part / SHARDS).mkdir()
        entries = write_shards(part, numbered, vocab_size, tokens_per_shard, 0)
        manifest = replace(
            manifest,
            shards=tuple(entries),
            next_document_id=sum(entry.documents for entry in entries),
            next_shard=len(entries),
        )
        create_log(part / manifest.delta, manifest.identity)
        write_manifest(part, manifest)
        _refuse_occupied(target, overwrite)
        if (target / MANIFEST).exists():
            stack.callback(WriterLock(target).close)
        with writing(target):
            install_folder(part, target)


def _check_range(name: str, value: int, high: int) -> None:
    if not 1 <= value <= high:
        wanted = f"a whole number from 1 to {high}"
        raise ConfigError("value out of range", got=value, wanted=wanted, where=name)


def _tascade_version() -> str:
    try:
        return metadata.version("tascade")
    except metadata.PackageNotFoundError:  # used from a source tree
        return "unknown"


def _refuse_occupied(target: Path, overwrite: bool) -> None:
    """Let only an empty place be used, or (``overwrite``) a folder with nothing but an index."""
    with writing(target):
        names = os.listdir(target) if target.exists() else []
    if not names:
        return
    ours = rf"{re.escape(MANIFEST)}|{STRAY_MANIFEST}|{SHARDS}|{re.escape(LOCK)}|{LOG_NAME}"
    strange = [name for name in names if not re.fullmatch(ours, name)]
    if strange or not overwrite:
        raise PackError(
            "something is there already",
            got=f"a folder with {sorted(strange or names)[:5]}",
            wanted="an index to replace" if overwrite else "a new or empty folder",
            where=str(target),
            fix="choose another path" if strange else "pass overwrite=True to replace the index",
        )

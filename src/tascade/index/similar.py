"""Which examples of the task have a prompt like this one? Their outputs are good drafts.

Each prompt is a set of features: its tokens and its pairs of tokens in a row. A feature counts by
how rare it is among the examples, and one that a fifth of them share (the chat template, standing
instructions) does not count at all: the score of an example is the sum of ``idf`` over the
features it shares with the request, divided by its ``norm``. On disk::

    manifest.json   counts, digests and fingerprint, checksummed
    features.npy    [F] uint32, hashes of the features, ascending
    offsets.npy     [F + 1] int64, where the list of each feature begins in postings
    postings.npy    [P] uint32, numbers of the examples with the feature, ascending in each list
    idf.npy         [F] float32, ln(examples / examples with the feature)
    norms.npy       [E] float32, square root of the sum of idf ** 2 over an example's features
    documents.npy   [E] int64, where in the corpus index the output of each example is
"""

from __future__ import annotations

import json
import os
import threading
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tascade.core import FloatArray, IntArray, LongArray
from tascade.errors import ConfigError, DataError, FingerprintError, PackError
from tascade.index.similar_kernels import (
    MAX_VISITS,
    SimilarArrays,
    features_of,
    index_features,
    rank,
)
from tascade.index.store import IN_MEMORY_BYTES, read_array, sha256_of, sync_file
from tascade.util.files import checksum, folder_beside, install_folder, write_atomic

FORMAT = "tascade-similar-index"
VERSION = 1
MANIFEST = "manifest.json"
MAX_FEATURES = 512
TOP = 48
COPIES = 2
"""How many of the similar examples may have one and the same output."""
_MAX_MANIFEST_BYTES = 1 << 20
_COUNTS = ("examples", "features", "postings")

Fetch = Callable[[int], IntArray | None]


_DTYPES = SimilarArrays(*map(np.dtype, ("<u4", "<i8", "<u4", "<f4", "<f4", "<i8")))  # type: ignore[arg-type]


class SimilarIndex:
    """Finds the examples whose prompts are most like a request's, and fetches their outputs.

    Made by :meth:`build` or :meth:`open`; never changed after. Safe to share between threads if
    ``fetch`` is.

    Attributes:
        path: the index folder.
        fingerprint: of the tokenizer the prompts were made with.
    """

    def __init__(
        self, path: Path, fingerprint: str, arrays: SimilarArrays, fetch: Fetch | None
    ) -> None:
        """Internal: use :meth:`build` or :meth:`open`."""
        self.path, self.fingerprint = path, fingerprint
        self._arrays, self._fetch = arrays, fetch
        self._scores = np.zeros(self.n_examples, np.float32)
        self._touched = np.empty(self.n_examples, np.uint32)
        self._scratch = threading.Lock()

    @classmethod
    def build(
        cls,
        path: str | os.PathLike[str],
        prompts: Iterable[tuple[int, Sequence[int] | IntArray]],
        *,
        fingerprint: str,
        fetch: Fetch | None = None,
        max_features: int = MAX_FEATURES,
        overwrite: bool = False,
    ) -> SimilarIndex:
        """Index prompts and put the result at ``path`` in one step, or not at all.

        Args:
            path: the folder to make.
            prompts: the id of an example's output in the corpus index, and its prompt's tokens.
            fingerprint: of the tokenizer, so that no other is used with the index.
            fetch: as for :meth:`open`; without it the result can :meth:`rank` only.
            max_features: how many features a prompt keeps, the rarest; bounds the size.
            overwrite: replace an index already there (and nothing else).

        Returns:
            The index, open. The build takes about 30 bytes of memory a prompt token.

        Raises:
            DataError: an id is negative, or a prompt is not a flat list of token ids.
            ConfigError: ``max_features`` out of range.
            PackError: something else is at ``path``, or it cannot be written.
        """
        if max_features < 1:
            raise ConfigError(
                "value out of range", got=max_features, wanted=">= 1", where="max_features"
            )
        target = Path(os.path.realpath(path))
        _refuse_occupied(target, overwrite)
        _install(_index_prompts(prompts, max_features), target, fingerprint, overwrite)
        return cls.open(path, fetch=fetch, fingerprint=fingerprint)

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        fetch: Fetch | None,
        fingerprint: str | None = None,
        verify: bool = False,
    ) -> SimilarIndex:
        """Open an index (mapped above 64 MB), and check it so far that no lookup can go astray.

        Args:
            path: the index folder. Its contents are not trusted.
            fetch: gives the output with an id, None if there is none: ``CorpusIndex.document``.
            fingerprint: of the tokenizer about to be used; checked when given.
            verify: also compare every file with its digest.

        Raises:
            FingerprintError: the index was made for another tokenizer.
            PackError: missing, damaged, or of a newer format.
        """
        root = Path(path)
        body = _read_manifest(root)
        if fingerprint is not None and fingerprint != body["fingerprint"]:
            raise FingerprintError(
                "the index of similar examples was made for another tokenizer",
                got=body["fingerprint"],
                wanted=fingerprint,
                where=str(root / MANIFEST),
                fix="use the tokenizer it was made for, or rebuild the index with this one",
            )
        return cls(root, body["fingerprint"], _open_arrays(root, body, verify), fetch)

    @property
    def n_examples(self) -> int:
        """How many examples are in the index."""
        return len(self._arrays.documents)

    @property
    def n_bytes(self) -> int:
        """Bytes of the arrays."""
        return sum(int(part.nbytes) for part in self._arrays)

    def rank(
        self, prompt: Sequence[int] | IntArray, top: int = TOP
    ) -> tuple[LongArray, FloatArray]:
        """The most similar examples.

        Args:
            prompt: [T] token ids of the request's prompt.
            top: how many at most.

        Returns:
            Document ids [n] int64 and scores [n] float32, best first; among equals the later
            example first. Only examples that share a feature that counts.
        """
        tokens = np.ascontiguousarray(prompt, np.int32)
        with self._scratch:
            best, scores = rank(
                tokens, self._arrays[:5], self._scores, self._touched, max(top, 0), MAX_VISITS
            )
        return self._arrays.documents[best], scores

    def lookup(
        self, prompt: Sequence[int] | IntArray, top: int = TOP, max_tokens: int = 8192
    ) -> list[IntArray]:
        """Outputs of the most similar examples.

        Args:
            prompt: [T] token ids of the request's prompt.
            top: how many outputs at most; third copies make room for the next example.
            max_tokens: how many tokens they have together at most; the least similar go first.

        Returns:
            The outputs, the most similar last. None where no example shares a rare feature.
        """
        if self._fetch is None:
            raise ConfigError(
                "this index of similar examples has no outputs to give",
                got="fetch=None",
                wanted="a function from document ids to outputs",
                fix="pass fetch=corpus.document to SimilarIndex.open",
            )
        found: list[IntArray] = []
        copies: Counter[bytes] = Counter()
        for document in self.rank(prompt, 2 * top)[0].tolist():
            if len(found) == top:
                break
            output = self._fetch(document)
            if output is None or len(output) == 0:
                continue
            key = output.tobytes()
            copies[key] += 1
            if copies[key] > COPIES:
                continue
            max_tokens -= len(output)
            if max_tokens < 0:
                break
            found.append(output)
        return found[::-1]

    def __repr__(self) -> str:
        return f"SimilarIndex({str(self.path)!r}, {self.n_examples} examples)"


def _index_prompts(
    prompts: Iterable[tuple[int, Sequence[int] | IntArray]], most: int
) -> SimilarArrays:
    """Compute the arrays of an index."""
    documents, ends, parts = array("q"), array("q", [0]), array("I")
    for number, prompt in prompts:
        hashes = features_of(_as_prompt(number, prompt))
        documents.append(number)
        parts.frombytes(hashes.tobytes())
        ends.append(len(parts))
    hashes, starts = np.frombuffer(parts, np.uint32), np.frombuffer(ends, np.int64)
    return index_features(np.array(documents, np.int64), hashes, starts, most)


def _as_prompt(number: int, prompt: Sequence[int] | IntArray) -> IntArray:
    """Check one example and return its prompt as [T] int32."""
    try:
        ids = np.asarray(prompt)
        if number < 0 or ids.ndim != 1 or (len(ids) and ids.dtype.kind not in "iu"):
            raise ValueError(f"document id {number}, an array of {ids.dtype} {list(ids.shape)}")
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < 2**31:
            raise ValueError(f"token ids from {ids.min()} to {ids.max()}")
    except (ValueError, TypeError, OverflowError) as error:
        raise DataError(
            "this prompt cannot be put into an index of similar examples",
            got=str(error)[:300],
            wanted="a document id of 0 or more, and a flat list of token ids",
            where=f"prompt of document {number}",
            fix="tokenize the prompt with the model's own tokenizer",
        ) from error
    return np.ascontiguousarray(ids, np.int32)


# --- the folder ---------------------------------------------------------------------------------


def _install(arrays: SimilarArrays, target: Path, fingerprint: str, overwrite: bool) -> None:
    """Write the folder beside ``target``, then put it in its place."""
    try:
        with folder_beside(target) as part:
            _write(arrays, part, fingerprint)
            _refuse_occupied(target, overwrite)
            install_folder(part, target)
    except OSError as error:
        raise PackError(
            "the index of similar examples could not be written",
            got=error.strerror or error,
            wanted="a folder with room and permission to write",
            where=str(error.filename or target),
            fix="free some space or change the permissions, then try again",
        ) from error


def _write(arrays: SimilarArrays, folder: Path, fingerprint: str) -> None:
    digests = {}
    for name, part in arrays._asdict().items():
        with (folder / f"{name}.npy").open("wb") as file:
            np.save(file, part, allow_pickle=False)
            sync_file(file)
        digests[name] = sha256_of(folder / f"{name}.npy")
    counts = (len(arrays.documents), len(arrays.features), len(arrays.postings))
    body = {"format": FORMAT, "version": VERSION, "fingerprint": fingerprint}
    body |= {"sha256": digests, **dict(zip(_COUNTS, counts, strict=True))}
    body["checksum"] = checksum(body)
    write_atomic(folder / MANIFEST, (json.dumps(body, indent=1) + "\n").encode())


def _refuse_occupied(target: Path, overwrite: bool) -> None:
    """Let only an empty place be used, or (``overwrite``) a folder with nothing but an index."""
    try:
        names = os.listdir(target) if target.exists() else []
    except OSError as error:
        raise _damaged(target, error.strerror or error, "a folder that can be read") from error
    ours = {MANIFEST, *(f"{name}.npy" for name in SimilarArrays._fields)}
    strange = sorted(set(names) - ours)
    if strange or (names and not overwrite):
        raise PackError(
            "something is there already",
            got=f"a folder with {strange[:5] or sorted(names)[:5]}",
            wanted="an index to replace" if overwrite else "a new or empty folder",
            where=str(target),
            fix="choose another path" if strange else "pass overwrite=True to replace the index",
        )


def _damaged(path: Path, got: object, wanted: str) -> PackError:
    return PackError(
        "the index of similar examples is damaged",
        got=str(got)[:300],
        wanted=wanted,
        where=str(path),
        fix="rebuild the index from the task data, or restore the folder from a copy",
    )


def _read_manifest(root: Path) -> dict[str, Any]:
    """Read and check a manifest that nobody vouches for."""
    path = root / MANIFEST
    try:
        with path.open("rb") as file:
            body = json.loads(file.read(_MAX_MANIFEST_BYTES))
            stated = body.pop("checksum", None) if isinstance(body, dict) else None
            altered = stated != checksum(body)
    except OSError as error:
        raise PackError(
            "no index of similar examples can be read here",
            got=error.strerror or error,
            wanted=f"a folder with {MANIFEST}",
            where=str(path),
            fix="check the path, or build the index with SimilarIndex.build",
        ) from error
    except (ValueError, RecursionError) as error:
        raise _damaged(path, error, "JSON") from error
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        raise _damaged(path, "another kind of file", f'"format": "{FORMAT}"')
    if body.get("version") != VERSION or isinstance(body["version"], bool):
        raise PackError(
            "this version of tascade does not read this format of similar-example index",
            got=f"format version {body.get('version')!r}"[:80],
            wanted=f"format version {VERSION}",
            where=str(path),
            fix="upgrade tascade, or rebuild the index with this version",
        )
    if altered:
        raise _damaged(path, "contents that do not match their checksum", "an unaltered manifest")
    counts = [body.get(name) for name in _COUNTS]
    sound = all(type(n) is int and 0 <= n < 2**48 for n in counts) and isinstance(
        body.get("fingerprint"), str
    )
    digests = body.get("sha256")
    if not sound or not isinstance(digests, dict) or set(digests) != set(SimilarArrays._fields):
        raise _damaged(path, "fields missing or of another type", "the fields of format 1")
    return body


def _open_arrays(root: Path, body: dict[str, Any], verify: bool) -> SimilarArrays:
    """Read or map the arrays and check that the kernels stay inside them."""
    n, f, p = (body[name] for name in _COUNTS)
    found, mapped = [], 16 * f + 4 * p + 12 * n > IN_MEMORY_BYTES
    for name, dtype, length in zip(
        SimilarArrays._fields, _DTYPES, (f, f + 1, p, f, n, n), strict=True
    ):
        path = root / f"{name}.npy"
        try:
            found.append(read_array(path, dtype, (length,), mapped=mapped))  # type: ignore[arg-type]
        except PackError as error:
            raise _damaged(path, error.got, error.wanted) from error
        if verify and (digest := sha256_of(path)) != body["sha256"][name]:
            raise _damaged(path, f"sha256 {digest}", f"sha256 {body['sha256'][name]}")
    a = SimilarArrays(*found)
    ends = int(a.offsets[0]) == 0 and int(a.offsets[-1]) == p
    checks = {
        "features": bool((a.features[1:] > a.features[:-1]).all()),
        "offsets": ends and bool((a.offsets[1:] > a.offsets[:-1]).all()),
        "postings": p == 0 or int(a.postings.max()) < n,
        "idf": bool((a.idf >= 0).all() and np.isfinite(a.idf).all()),
        "norms": bool((a.norms > 0).all() and np.isfinite(a.norms).all()),
        "documents": n == 0 or int(a.documents.min()) >= 0,
    }
    for name, sound in checks.items():
        if not sound:
            raise _damaged(root / f"{name}.npy", "values out of order or range", "as build writes")
    return a

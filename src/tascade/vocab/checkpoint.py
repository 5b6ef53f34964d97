"""Which tensor of a safetensors checkpoint lies where; nothing but headers is read.

A checkpoint is a file from outside: every length, offset, name and path in it is checked before it
is used, and no file outside the folder is opened.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tascade.errors import ConfigError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
HEADER_LIMIT = 100_000_000
"""Longest header the format allows, in bytes; also taken for the index of a sharded one."""
_MOST_DIMENSIONS = 16
ITEM_SIZES = {"F32": 4, "F16": 2, "BF16": 2}
"""Bytes of one number, for the types a table may have."""


@dataclass(frozen=True, slots=True)
class TensorPlace:
    """Bytes ``start`` to ``stop`` of ``file``, counted from the beginning of the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class Checkpoint:
    """The tensors of a folder of safetensors files, by name.

    Args:
        folder: holds ``model.safetensors``, or an index and its shards (chosen as Transformers
            does: the single file first).
        weights: the file (or index) to read instead of those.

    Attributes:
        places: tensor name -> :class:`TensorPlace`.
        digest: sha256 over every file's header and size, in the order of the file names.

    Raises:
        ConfigError: no such file, one that lies outside the folder, or a damaged header.
    """

    def __init__(self, folder: str | Path, weights: str | None = None) -> None:
        self.folder = Path(folder)
        self.places: dict[str, TensorPlace] = {}
        digest = hashlib.sha256()
        for file in self._files(weights):
            header, size = _read_header(file)
            digest.update(len(header).to_bytes(8, "little") + header + size.to_bytes(8, "little"))
            for name, place in _places(header, size, file):
                if name in self.places:
                    raise _damaged(file, f"{name!r} is also in {self.places[name].file.name}")
                self.places[name] = place
        self.digest = digest.hexdigest()

    def place(self, name: str) -> TensorPlace:
        """Where a tensor lies.

        Raises:
            ConfigError: the checkpoint has no tensor of that name.
        """
        if name not in self.places:
            raise ConfigError(
                "the checkpoint has no such tensor",
                got=name,
                wanted=f"one of its {len(self.places)} tensors, e.g. {sorted(self.places)[:3]}",
                where=str(self.folder),
            )
        return self.places[name]

    def _files(self, weights: str | None) -> list[Path]:
        if weights is None:
            weights = WEIGHTS if (self.folder / WEIGHTS).is_file() else INDEX
        first = self._inside(weights, self.folder)
        if not first.name.endswith(".index.json"):
            return [first]
        names = _shard_names(first)
        return [self._inside(name, first) for name in names]

    def _inside(self, name: str, source: Path) -> Path:
        """The file of that name, if it is a regular file of this folder."""
        path = self.folder / name
        plain = name and not Path(name).is_absolute() and ".." not in Path(name).parts
        if not plain or "\\" in name or "\0" in name:
            raise _damaged(source, f"the file name {name!r} leads out of the folder")
        real, roots = Path(os.path.realpath(path)), self._roots()
        if not any(real.is_relative_to(root) for root in roots):
            raise _damaged(source, f"{name!r} is a link out of the folder")
        if not real.is_file():
            raise ConfigError(
                "the checkpoint lacks a file",
                got=f"no file {name}",
                wanted=f"{WEIGHTS}, or {INDEX} and the files it names",
                where=str(self.folder),
                fix="download the whole checkpoint; weights must be safetensors",
            )
        return path

    def _roots(self) -> list[Path]:
        """The folder; the hub's cache keeps the files themselves in ``blobs``, two folders up."""
        root = Path(os.path.realpath(self.folder))
        if root.parent.name == "snapshots":
            return [root, root.parent.parent / "blobs"]
        return [root]


def _shard_names(index: Path) -> list[str]:
    size = index.stat().st_size
    if size > HEADER_LIMIT:
        raise _damaged(index, f"an index of {size:,} bytes")
    whole = _json(index.read_bytes(), index)
    mapping = whole.get("weight_map")
    if not isinstance(mapping, dict) or not mapping:
        raise _damaged(index, "no weight_map")
    if not all(isinstance(name, str) for name in mapping.values()):
        raise _damaged(index, "a file name that is no string")
    return sorted(set(mapping.values()))


def _read_header(file: Path) -> tuple[bytes, int]:
    """The header's bytes, and the size of the file."""
    with file.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(HEADER_LIMIT, size - 8):
            raise _damaged(file, f"a header of {length:,} bytes in a file of {size:,}")
        header = stream.read(length)
    if len(header) != length:
        raise _damaged(file, "it ends within its header")
    return header, size


def _places(header: bytes, size: int, file: Path) -> Iterable[tuple[str, TensorPlace]]:
    """The tensors of one file: they fill it from the header to its end, without gap or overlap."""
    base, found = 8 + len(header), []
    for name, entry in _json(header, file).items():
        if name == "__metadata__":
            continue
        place = _place(entry, base, file)
        if place is None:
            raise _damaged(file, f"the entry of {name!r}: {str(entry)[:200]}")
        found.append((name, place))
    at = base
    for name, place in sorted(found, key=lambda pair: (pair[1].start, pair[1].stop)):
        if place.start != at:
            raise _damaged(file, f"{name!r} begins at byte {place.start:,}, not at {at:,}")
        at = place.stop
    if at != size:
        raise _damaged(file, f"its tensors end at byte {at:,} of {size:,}")
    return found


def _place(entry: Any, base: int, file: Path) -> TensorPlace | None:
    """An entry of a header; ``None`` if it is not one, or contradicts itself."""
    if not isinstance(entry, dict):
        return None
    dtype: Any = entry.get("dtype")
    shape: Any = entry.get("shape")
    span: Any = entry.get("data_offsets")
    if not (isinstance(dtype, str) and _counts(shape) and _counts(span) and len(span) == 2):
        return None
    if span[0] > span[1] or len(shape) > _MOST_DIMENSIONS:
        return None
    if dtype in ITEM_SIZES and math.prod(shape) * ITEM_SIZES[dtype] != span[1] - span[0]:
        return None
    return TensorPlace(file, dtype, tuple(shape), base + span[0], base + span[1])


def _counts(value: Any) -> bool:
    """Whether this is a list of integers that a length or an offset can be."""
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 63 for n in value)


def _json(content: bytes, file: Path) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) != len(pairs):
            raise ValueError("a name is there twice")
        return dict(pairs)

    try:
        value = json.loads(content.decode("utf-8"), object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise _damaged(file, f"not the JSON it should be: {error}") from error
    if not isinstance(value, dict):
        raise _damaged(file, f"JSON that is no object, but {type(value).__name__}")
    return value


def _damaged(file: Path, got: str) -> ConfigError:
    return ConfigError(
        "the checkpoint is damaged, or was made to mislead",
        got=got,
        wanted="safetensors files whose headers describe them, all inside the folder",
        where=str(file),
        fix="download it again, from a source you trust",
    )

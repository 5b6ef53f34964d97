"""The tensors of a safetensors checkpoint, mapped into memory one by one.

A checkpoint is a file from outside: safetensors checks its headers before they are used, and no
file outside the folder is opened.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from tascade.errors import ConfigError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
INDEX_LIMIT = 100_000_000
"""Longest index of a sharded checkpoint, in bytes: as long as a safetensors header may be."""


class Checkpoint:
    """The tensors of a folder of safetensors files, by name.

    Args:
        folder: holds ``model.safetensors``, or an index and its shards (chosen as Transformers
            does: the single file first).
        weights: the file (or index) to read instead of those.

    Attributes:
        shapes: tensor name -> shape.

    Raises:
        ConfigError: no such file, one that lies outside the folder, or a damaged header.
    """

    def __init__(self, folder: str | Path, weights: str | None = None) -> None:
        self.folder = Path(folder)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._file_of: dict[str, Path] = {}
        for file in self._files(weights):
            with _opened(file) as stored:
                for name in stored.keys():  # noqa: SIM118 (it is no mapping)
                    if name in self._file_of:
                        raise _damaged(file, f"{name!r} is also in {self._file_of[name].name}")
                    self._file_of[name] = file
                    self.shapes[name] = tuple(stored.get_slice(name).get_shape())

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor on the CPU, mapped: its pages come from the file when they are read.

        The map is private to this process: were the tensor written to, the file would not change.

        Raises:
            ConfigError: the checkpoint has no tensor of that name, or not any more.
        """
        if name not in self._file_of:
            raise ConfigError(
                "the checkpoint has no such tensor",
                got=name,
                wanted=f"one of its {len(self.shapes)} tensors, e.g. {sorted(self.shapes)[:3]}",
                where=str(self.folder),
            )
        with _opened(self._file_of[name]) as stored:
            found: torch.Tensor = stored.get_tensor(name)
            return found

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
    if size > INDEX_LIMIT:
        raise _damaged(index, f"an index of {size:,} bytes")
    whole = _json(index.read_bytes(), index)
    mapping = whole.get("weight_map")
    if not isinstance(mapping, dict) or not mapping:
        raise _damaged(index, "no weight_map")
    if not all(isinstance(name, str) for name in mapping.values()):
        raise _damaged(index, "a file name that is no string")
    return sorted(set(mapping.values()))


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """A safetensors file; whatever it is damaged in becomes an error of ours."""
    try:
        with safe_open(file, framework="pt", device="cpu") as stored:
            yield stored
    except (SafetensorError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise _damaged(file, str(error)) from error


def _json(content: bytes, file: Path) -> dict[str, Any]:
    try:
        value = json.loads(content.decode("utf-8"))
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

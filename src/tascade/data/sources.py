"""A source's name -> the data files it stands for. Nothing outside a named folder is read."""

from __future__ import annotations

import difflib
import itertools
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

from tascade.data.rows import SUFFIXES, display, suffix_of, unreadable
from tascade.errors import DataError

_HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*)/[A-Za-z0-9][\w.-]*(:[\w.-]+)?", re.ASCII)
_SHARD = re.compile(r"-(\d+)-of-(\d+)$")
_MAX_LISTED = 10_000
_MAX_STATE_BYTES = 2**24


@dataclass(frozen=True, slots=True)
class Located:
    """What a named source stands for: local files in reading order, or (none) a Hub dataset."""

    name: str
    files: tuple[Path, ...]
    root: Path | None = None


def locate(source: str | os.PathLike[str], split: str) -> Located:
    """Find the files of a path, or see that the name is a Hub dataset's.

    Args:
        source: a data file, a folder, or ``owner/name`` or ``owner/name:config``.
        split: which split of a folder to take; a single file has none.

    Raises:
        DataError: no such path, no data of that split, or a folder that points out of itself.
    """
    text = os.fspath(source)
    path = Path(text)
    name = display(path)
    try:
        if text and path.is_dir():
            return Located(name, tuple(_folder_files(path, split)), path)
        if text and path.is_file():
            return Located(name, (_known(path),))
        exists = path.exists()
    except (OSError, ValueError) as error:
        raise unreadable(error, name) from error
    if text and not exists and isinstance(source, str) and _is_hub_id(text):
        return Located(text, ())
    raise _missing(path, name if text else "''", exists and bool(text))


def _is_hub_id(text: str) -> bool:
    """Whether the name can only be meant for the Hub: its owner is no folder here."""
    match = _HUB_ID.fullmatch(text)
    return match is not None and not suffix_of(Path(text)) and not Path(match[1]).exists()


def _known(path: Path) -> Path:
    if suffix_of(path):
        return path
    fix = "rename the file, or convert it to JSONL"
    if path.suffix.lower() == ".json":
        fix = "write one object a line (`jq -c '.[]' FILE > FILE.jsonl`)"
    raise DataError(
        "the file's name does not say which format it is",
        got=f"suffix {path.suffix!r}",
        wanted="one of " + " ".join(SUFFIXES),
        where=display(path),
        fix=fix,
    )


def _missing(path: Path, name: str, exists: bool) -> DataError:
    """The refusal of a path that is no file or folder, with near names."""
    parent, last = path.parent, path.name
    while parent != parent.parent and not os.path.isdir(parent):
        parent, last = parent.parent, parent.name
    near = difflib.get_close_matches(last[:255], _names(parent), 3)
    found = ", ".join(repr(display(parent / match)) for match in near)
    return DataError(
        "neither a file nor a folder" if exists else "no such file or folder",
        got=name,
        wanted="a data file, a folder, or a Hub dataset 'owner/name' whose owner is no folder here",
        where=name,
        fix=f"did you mean {found}?" if near else f"look in {display(parent.absolute())}",
    )


def _names(folder: Path) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return [entry.name for entry in itertools.islice(entries, _MAX_LISTED)]
    except (OSError, ValueError):
        return []


def _folder_files(folder: Path, split: str) -> list[Path]:
    """``<split>.<suffix>`` or ``<split>-*.parquet``, here or in ``data/``; else a saved dataset."""
    for place in (folder, folder / "data"):
        if place.is_dir():
            files = _of_split(_inside(folder, place), split)
            if files:
                return [_inside(folder, file) for file in files]
    saved = _saved_dataset(folder, split)
    if saved is not None:
        return saved
    shown = [display(Path(name)) for name in sorted(_names(folder))[:12]]
    raise DataError(
        f"the folder holds no data of the split {split!r}",
        got=", ".join(shown) or "an empty folder",
        wanted=f"'{split}.jsonl' (or .csv, .parquet ...), '{split}-*.parquet', the same in 'data/',"
        " or a folder of datasets.save_to_disk",
        where=display(folder),
        fix="name the file itself, or another split",
    )


def _of_split(place: Path, split: str) -> list[Path]:
    """The one file of the split, or all its shards in order."""
    exact, shards = [], []
    with os.scandir(place) as entries:
        for entry in entries:
            path = place / entry.name
            suffix = suffix_of(path)
            if not suffix or not (entry.is_file() or entry.is_symlink()):
                continue
            stem = entry.name[: -len(suffix)]
            if stem == split:
                exact.append(path)
            elif suffix == ".parquet" and stem.startswith(f"{split}-"):
                shards.append(path)
    if len(exact) > 1 or (exact and shards):
        raise DataError(
            f"several files could be the split {split!r}",
            got=", ".join(sorted(display(path) for path in exact + shards)[:12]),
            wanted="one file, or shards of one set",
            where=display(place),
            fix="name the file itself, or move the others away",
        )
    _check_shards(place, shards)
    return exact or sorted(shards)


def _check_shards(place: Path, shards: list[Path]) -> None:
    """Shards named ``-00000-of-00003`` must all be there, once."""
    found = [match for path in shards if (match := _SHARD.search(path.stem))]
    if not found:
        return
    totals, numbers = {int(match[2]) for match in found}, sorted(int(m[1]) for m in found)
    whole = len(found) == len(shards) and totals == {len(found)}
    if not whole or numbers != list(range(len(found))):
        raise DataError(
            "the shards are not one complete set",
            got=", ".join(sorted(display(Path(path.name)) for path in shards)[:12]),
            wanted=f"{max(totals)} shards, numbered from 0",
            where=display(place),
            fix="download the missing shards, or move other sets away",
        )


def _inside(folder: Path, path: Path) -> Path:
    """``path``, unless it leads out of ``folder``: data from elsewhere may hold such links."""
    target = Path(os.path.realpath(path))
    if not target.is_relative_to(os.path.realpath(folder)):
        raise DataError(
            "a link points out of the folder",
            got=display(target),
            wanted=f"files inside {display(folder)}",
            where=display(path),
            fix="name that file itself if you trust it, or copy it into the folder",
        )
    return path


def _saved_dataset(folder: Path, split: str) -> list[Path] | None:
    """The Arrow files of a ``datasets.save_to_disk`` folder; None if it is not one."""
    root = folder / split if (folder / "dataset_dict.json").is_file() else folder
    state_path = root / "state.json"
    if not state_path.is_file():
        return None
    where = display(state_path)
    try:
        with _inside(folder, state_path).open("rb") as file:
            state = json.loads(file.read(_MAX_STATE_BYTES))
        names = [item["filename"] for item in state["_data_files"]]
        indices, saved_split = state.get("_indices_data_files"), state.get("_split")
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise unreadable(error, where) from error
    odd = [n for n in names if not isinstance(n, str) or n in ("", "..") or Path(n).name != n]
    if odd or indices:
        raise DataError(
            "the saved dataset names files that are not plain files of its folder",
            got=repr(odd[0] if odd else indices)[:80],
            wanted="names such as 'data-00000-of-00001.arrow'",
            where=where,
            fix="save it again with datasets.save_to_disk of version 2 or later",
        )
    if root == folder and saved_split not in (None, split):
        raise DataError(
            f"the saved dataset is not of the split {split!r}",
            got=f"split {str(saved_split)[:80]!r}",
            wanted=f"split {split!r}",
            where=where,
            fix="name its split, or the right folder",
        )
    return [_inside(folder, root / name) for name in names]

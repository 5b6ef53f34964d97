"""Where a pack may be put, and what of it may leave this machine."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tascade.errors import ConfigError, PackError, TascadeError
from tascade.util.files import checksum, without_folders, write_atomic

FORMAT = "tascade-pack"
VOCABULARIES = ("vocabulary.json", "vocabulary.next.json")
"""Where a pack may have its list of tokens; the second is used while the first is replaced."""
COMES_WITH_US, MADE_ELSEWHERE = "tascade:", "./"
"""Before the name of a model in a published pack: a folder of the library, or of anyone."""
Put = Callable[[str, str], object]

_HERE = Path(__file__).resolve().parents[1]
_PARTS = (
    "pack.json",
    "corpus",
    "similar",
    "model",
    "calibration.json",
    "drafter.safetensors",
    "bench.json",
    "report.html",
)
UNFINISHED = ".bench.json"
"""A pack's file of a benchmark that was stopped; hidden, so that it is not published."""
_KNOWN = (*_PARTS, *VOCABULARIES, UNFINISHED)
_LEFT = re.compile(rf"\.({'|'.join(map(re.escape, _KNOWN))})\..+\.(part|part\.old|tmp|old)")
"""What a process that was killed leaves in a pack."""
_TOLD = (
    "pack.json",
    "bench.json",
    "corpus/manifest.json",
    *(f"model/{name}.json" for name in ("tokens", "tuning", "config", "generation_config")),
    *(f"model/{name}.json" for name in ("tokenizer_config", "adapter_config")),
)
"""Files of a pack that may tell of the machine they were made on."""
_PLACES = re.compile("model|train|validation|path|sources|skipped_rows|.*name_or_path")


def place_for(
    out: str | Path,
    *,
    overwrite: bool | None = None,
    used: Sequence[Any] = (),
    wanted: type[TascadeError] = ConfigError,
) -> Path:
    """Where a folder may be put: a new place or, to ``overwrite``, an empty folder or a pack.

    Only what tascade wrote is ever replaced. A pack that holds other files as well is refused.

    Args:
        out: the folder.
        overwrite: whether a pack there may be replaced; ``None`` where there is no such option.
        used: model and data, none of which may lie in the folder that is replaced.
        wanted: what to raise.

    Raises:
        ConfigError: something else is there, which the message names.
    """
    target = Path(os.path.abspath(out))
    if not os.path.lexists(target):
        return target
    if not overwrite:
        replaced = overwrite is not None and not _not_replaced(target, used)
        raise wanted(
            "the folder exists already",
            got=str(out),
            wanted="a new folder",
            where="out",
            fix="choose another name" + ", or replace it (overwrite, --overwrite)" * replaced,
        )
    if reason := _not_replaced(target, used):
        raise wanted(
            "only a pack is ever replaced",
            got=f"{out}: {reason}",
            wanted="a new folder, or one with a pack and nothing else",
            where="out",
            fix="choose another name, or move away what is there",
        )
    return target


def named_place(out: str | Path | None) -> str | Path:
    """The folder for what must have one.

    Raises:
        ConfigError: none was given.
    """
    if out is None:
        raise ConfigError(
            "a tuned model needs a folder",
            got="tune without out",
            wanted="the folder of the new pack",
            where="out",
            fix="pass out=...",
        )
    return out


def _not_replaced(target: Path, used: Sequence[Any]) -> str:
    """Why a folder must not be replaced by a pack; nothing if it may be."""
    if target.is_symlink():
        return "a link; name the folder itself"
    if not target.is_dir():
        return "a file"
    real = target.resolve()
    if Path.cwd().resolve().is_relative_to(real) or os.path.ismount(target):
        return "the working directory, one above it, or a file system of its own"
    names = sorted(os.listdir(target))
    if not names:
        return ""
    try:
        is_pack = json.loads((target / "pack.json").read_bytes())["format"] == FORMAT
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        is_pack = False
    strange = [name for name in names if name not in _KNOWN and not _LEFT.fullmatch(name)]
    if not is_pack or strange:
        holds = "a pack that also holds" if is_pack else "no pack, a folder with"
        return f"{holds} {', '.join((strange or names)[:5])}"
    for source in used:
        here = isinstance(source, str | Path) and os.path.exists(source)
        if here and Path(source).resolve().is_relative_to(real):
            return f"holds {source}, which is in use"
    return ""


def publish(pack: Path, folder: Path, put: Put = shutil.copy2) -> None:
    """Copy into an empty folder whatever others need of a pack.

    What tells of the user's machine stays behind: hidden files, the command line, the folders
    above the model and the data. A report that shows any of these is left out.

    Args:
        pack: its folder.
        folder: to fill.
        put: copies one file, or links to it; called with (from, to).

    Raises:
        PackError: a file that would have to be changed is damaged.
    """
    shutil.copytree(pack, folder, copy_function=put, ignore=_hidden, dirs_exist_ok=True)
    told = {text for name in _TOLD for text in forget_places(folder / name)}
    report = folder / "report.html"
    if report.is_file():
        page = html.unescape(report.read_text(encoding="utf-8", errors="replace"))
        if any(text in page for text in told):
            report.unlink()


def forget_places(file: Path) -> set[str]:
    """Rewrite a JSON file, if it is there, without what tells of this machine; returns that.

    Raises:
        PackError: it is damaged.
    """
    if not file.is_file():
        return set()
    try:
        raw = json.loads(file.read_bytes())
        kept = _portable(raw)
        if file.name == "pack.json":
            kept["model"] = _portable_model(raw["model"])
        if "checksum" in raw and kept != raw:
            kept["checksum"] = _checksum_after(raw, kept)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise PackError("the pack is damaged", got=error, where=file.name) from error
    if kept == raw:
        return set()
    write_atomic(file, (json.dumps(kept, indent=1) + "\n").encode())
    return set(_texts(raw)) - set(_texts(kept))


def link_or_copy(source: str, copy: str) -> None:
    """For :func:`publish`, where the folder is read and then removed: weights need no copy."""
    try:
        os.symlink(os.path.abspath(source), copy)
    except OSError:
        shutil.copy2(source, copy)


def _hidden(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if name.startswith(".")]


def _portable(value: Any, key: str = "") -> Any:
    """JSON without a command's arguments, and with the last part alone of paths."""
    if isinstance(value, dict):
        return {name: _portable(part, name) for name, part in value.items()}
    if isinstance(value, list):
        return [_portable(part, key) for part in value]
    if isinstance(value, str) and key == "command":
        return " ".join(value.split()[:2]) if value.startswith("tascade ") else ""
    if isinstance(value, str) and _PLACES.fullmatch(key):
        return without_folders(value)
    return value


def _checksum_after(raw: dict[str, Any], kept: dict[str, Any]) -> str:
    """The checksum of a changed manifest; one that was wrong before must not become right."""
    before, after = ({k: v for k, v in b.items() if k != "checksum"} for b in (raw, kept))
    if raw["checksum"] != checksum(before):
        raise ValueError("contents that do not match their checksum")
    return checksum(after)


def _portable_model(name: str) -> str:
    """A model's name for other machines: one that comes with tascade, any folder's, or a hub id."""
    if Path(name).is_relative_to(_HERE):
        return COMES_WITH_US + Path(name).relative_to(_HERE).as_posix()
    kept = without_folders(name)
    return name if kept == name else MADE_ELSEWHERE + kept


def _texts(value: Any) -> Iterator[str]:
    """Every string in a JSON value that is long enough to tell anything."""
    if isinstance(value, str) and len(value) > 1:
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _texts(part)

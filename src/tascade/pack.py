"""A pack: the folder that holds everything learned about a task."""

from __future__ import annotations

import json
import os
import stat
import sys
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from tascade.config import DataConfig, Recipe
from tascade.data.chat import ChatConfig
from tascade.errors import ConfigError, FingerprintError, PackError
from tascade.util.fields import shown, typed
from tascade.util.files import folder_beside, install_folder, read_json, write_atomic
from tascade.util.places import (
    COMES_WITH_US,
    FORMAT,
    MADE_ELSEWHERE,
    VOCABULARIES,
    place_for,
    publish,
)

VERSION = 1
_HERE = Path(__file__).parent
_MOST_BYTES = 16 << 20
_MOST_SIZES = 4096


@dataclass(frozen=True, slots=True)
class PackInfo:
    """What ``pack.json`` says: which model and tokenizer, which data, made how.

    ``model`` is a hub id or a folder, ``./NAME`` in a pack that was published: one of this name;
    ``fingerprint`` identifies the tokenizer (see :func:`tascade.data.encode.fingerprint`); ``data``
    lists each source's name, sha256 and bytes; ``costs`` maps a machine to the measured seconds of
    a step by its number of tokens, and in half precision to the counts of rows that round alike;
    ``own_answers`` counts the outputs that are the model's own; ``rows`` says how many were held
    out, calibrated on and compared with plain decoding, and how that came out; ``prefixes`` are
    token ids that many prompts begin with; ``drafter`` is what was forecast of a trained drafter
    before it was trained (see :class:`tascade.train_drafter.Worth`); ``vocabulary`` is the file of
    the list of tokens, where there is one.
    """

    model: str
    fingerprint: str
    vocab_size: int
    data: list[dict[str, Any]] = field(default_factory=list)
    recipe: dict[str, Any] = field(default_factory=dict)
    stages: list[str] = field(default_factory=list)
    costs: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    max_new_tokens: int = 256
    own_answers: int = 0
    rows: dict[str, int] = field(default_factory=dict)
    prefixes: list[list[int]] = field(default_factory=list)
    drafter: dict[str, float] = field(default_factory=dict)
    command: str = ""
    created: str = ""
    tascade: str = ""
    vocabulary: str = VOCABULARIES[0]


class Pack:
    """Paths inside a pack folder, and its ``pack.json``."""

    def __init__(self, path: Path, info: PackInfo) -> None:
        self.path, self.info = path, info

    @property
    def name(self) -> str:
        """The name of its folder."""
        return self.path.resolve().name

    @property
    def tuned(self) -> Path:
        """Folder of the tuned model, in packs that hold one (TASC-ft)."""
        return self.path / "model"

    @property
    def model(self) -> str:
        """What to load and to serve: the tuned model, or the one the pack was made for.

        Raises:
            ConfigError: see :attr:`base`.
        """
        return str(self.tuned) if (self.tuned / "config.json").is_file() else self.base

    @property
    def base(self) -> str:
        """The model that the pack was made for, before any tuning: a hub id or a folder.

        Raises:
            ConfigError: it was in a folder of another machine, and no such folder is beside the
                pack or in the working directory.
        """
        name = self.info.model
        if name.startswith(COMES_WITH_US):
            return str(_HERE / name.removeprefix(COMES_WITH_US))
        if not name.startswith(MADE_ELSEWHERE):
            return name
        for place in (self.path.parent / name, Path(name)):
            if (place / "config.json").is_file():
                return str(place)
        raise ConfigError(
            "this pack was made for a model in a folder, and published without its place",
            got=f"no folder {name.removeprefix(MADE_ELSEWHERE)!r} beside the pack or here",
            wanted="the model that the pack was made for",
            where=str(self.path),
            fix="pass it: model=... in Python, --model on the command line",
        )

    @property
    def reading(self) -> DataConfig:
        """How rows for this pack are read unless said otherwise: fields of the names it had."""
        made = Recipe.from_dict(self.info.recipe, stored=True).data
        return DataConfig(
            prompt_field=made.prompt_field,
            completion_field=made.completion_field,
            prompt_template=made.prompt_template,
        )

    def precision(self, asked: str = "auto") -> str:
        """The precision to load its model in: the one asked for, else the one it was made in.

        A pack is measured and compared with plain decoding in one precision; in another one the
        answers may be others. ``auto``, as the weights were saved, where it names none.
        """
        made = Recipe.from_dict(self.info.recipe, stored=True).dtype
        return asked if asked != "auto" else made

    @property
    def chat(self) -> ChatConfig:
        """What its prompts take along into the chat template; nothing in packs that say nothing.

        Raises:
            PackError: ``pack.json`` has it wrong.
        """
        try:
            return ChatConfig(**self.info.recipe.get("chat", {}))
        except (TypeError, ConfigError) as error:
            raise PackError(
                "pack.json has a wrong chat section",
                got=str(error)[:300],
                where=str(self.path / "pack.json"),
                fix="upgrade tascade, or adapt again",
            ) from error

    @property
    def corpus(self) -> Path:
        """Folder of the corpus index."""
        return self.path / "corpus"

    @property
    def similar(self) -> Path:
        """Folder of the similar-examples index."""
        return self.path / "similar"

    @property
    def vocabulary(self) -> Path:
        """File of the tailored vocabulary, in packs that hold one (VocabTailor)."""
        return self.path / self.info.vocabulary

    @property
    def drafter(self) -> Path:
        """File of the trained drafter, in packs that hold one (TAPS)."""
        return self.path / "drafter.safetensors"

    @property
    def calibration(self) -> Path:
        """File of the learned calibration."""
        return self.path / "calibration.json"

    @property
    def bench(self) -> Path:
        """File of the last benchmark."""
        return self.path / "bench.json"

    @property
    def report(self) -> Path:
        """File of the HTML report."""
        return self.path / "report.html"

    def note(self, **changes: Any) -> None:
        """Change what ``pack.json`` will say; nothing is written before :meth:`save`."""
        self.info = replace(self.info, **changes)

    def save(self) -> Pack:
        """Write ``pack.json``, or replace it, atomically; returns the pack."""
        body = {"format": FORMAT, "version": VERSION, **asdict(self.info)}
        write_atomic(self.path / "pack.json", json.dumps(body, indent=1).encode())
        return self

    @classmethod
    def open(cls, path: str | Path) -> Pack:
        """Open a pack folder.

        Raises:
            PackError: no pack there, another format version, a damaged ``pack.json`` (the field is
                named), or a link that leads out of the folder.
        """
        path = Path(path)
        file = path / "pack.json"
        if (path / "config.json").is_file() and not file.is_file():
            raise PackError(
                "this is a model, and no pack",
                got="config.json, and no pack.json",
                wanted="a folder written by `tascade adapt`",
                where=str(path),
                fix=f"run `tascade adapt --model {path} --data D --out PACK`, and use PACK",
            )
        if not file.is_file():
            raise PackError(
                "no pack in this folder",
                got="no pack.json",
                wanted="a folder written by `tascade adapt`",
                where=str(path),
                fix="run `tascade adapt --model M --data D --out PACK`",
            )
        try:
            raw = read_json(file, _MOST_BYTES)
            found = (raw.pop("format", None), raw.pop("version", None))
        except (OSError, ValueError, AttributeError, TypeError) as error:
            raise PackError("pack.json is damaged", got=error, where=str(file)) from error
        if found != (FORMAT, VERSION):
            raise PackError(
                "a pack this version cannot read",
                got=f"{shown(found[0])}, version {shown(found[1])}",
                wanted=f"{FORMAT} version {VERSION}",
                where=str(file),
                fix="upgrade tascade, or adapt again",
            )
        _refuse_links(path)
        return cls(path, _info(raw, file))

    def check_tokenizer(self, found: str, name: str) -> None:
        """Refuse to serve a model whose tokenizer is not the one the pack was made for."""
        if found != self.info.fingerprint:
            raise FingerprintError(
                "this pack was made for another tokenizer",
                got=f"{name} (tokenizer {found})",
                wanted=f"{self.info.model} (tokenizer {self.info.fingerprint})",
                where=str(self.path),
                fix="load the pack with the model it was made for, or adapt again for this one",
            )

    def copy_to(self, path: Path) -> Pack:
        """Publish to a new folder, complete or not at all: :func:`tascade.util.places.publish`."""
        place_for(path, wanted=PackError)
        with folder_beside(path) as part:
            publish(self.path, part)
            place_for(path, wanted=PackError)
            install_folder(part, path)
        return Pack.open(path)


def _refuse_links(path: Path) -> None:
    """Refuse what leads out of a pack: it would be read, copied and published as the pack's own.

    Of the Hub's cache the files are links to its ``blobs``; pipes and devices are no files at all.
    """
    root = Path(os.path.realpath(path))
    own = [root, *(p.parent / "blobs" for p in root.parents if p.name == "snapshots")]
    for folder, folders, files in os.walk(root):
        for entry in (Path(folder, name) for name in (*folders, *files)):
            try:
                mode = entry.lstat().st_mode
            except FileNotFoundError:  # a file that a writer has just replaced
                continue
            kept = stat.S_ISREG(mode) or stat.S_ISDIR(mode)
            if stat.S_ISLNK(mode):
                target = Path(os.path.realpath(entry))  # which may go round in circles
                kept = target.is_file() and any(target.is_relative_to(place) for place in own)
            if not kept:
                raise PackError(
                    "something in the pack leads out of its folder, or is no file",
                    got=f"{entry.relative_to(root)} -> {os.path.realpath(entry)}",
                    wanted="files and folders of the pack's own",
                    where=str(path),
                    fix="put a copy of the file there instead",
                )


def _info(raw: dict[str, Any], file: Path) -> PackInfo:
    try:
        info = PackInfo(**raw)
    except TypeError as error:
        raise PackError(
            "pack.json has unknown or missing fields",
            got=error,
            where=str(file),
            fix="upgrade tascade, or adapt again",
        ) from error
    try:
        _check_info(info)
    except ConfigError as error:
        raise PackError(
            f"pack.json: {error.message}",
            got=error.got,
            wanted=error.wanted,
            where=f"{file}: {error.where}",
            fix="upgrade tascade if a newer one made this pack; else adapt again",
        ) from error
    return info


def _check_info(info: PackInfo) -> None:
    """Check every value that is used; raises a ConfigError that names it."""
    for name, least in (("vocab_size", 1), ("max_new_tokens", 1), ("own_answers", 0)):
        if typed(int, getattr(info, name), name) < least:
            got = getattr(info, name)
            raise ConfigError("out of range", got=got, wanted=f"{least} or more", where=name)
    for name in ("model", "fingerprint", "command", "created", "tascade"):
        typed(str, getattr(info, name), name)
    if info.vocabulary not in VOCABULARIES:
        wanted = " or ".join(VOCABULARIES)
        raise ConfigError("unknown file", got=info.vocabulary, wanted=wanted, where="vocabulary")
    Recipe.from_dict(info.recipe, "recipe.", stored=True)
    for at, stage in enumerate(typed(list, info.stages, "stages")):
        typed(str, stage, f"stages[{at}]")
    for at, source in enumerate(typed(list, info.data, "data")):
        _check_source(source, f"data[{at}]")
    for name, count in typed(dict, info.rows, "rows").items():
        typed(int, count, f"rows[{name!r:.80}]")
    for at, prefix in enumerate(typed(list, info.prefixes, "prefixes")):
        for token in typed(list, prefix, f"prefixes[{at}]"):
            if not 0 <= typed(int, token, f"prefixes[{at}]") < info.vocab_size:
                wanted = f"token ids below {info.vocab_size}"
                raise ConfigError(
                    "no token of the model", got=token, wanted=wanted, where=f"prefixes[{at}]"
                )
    for key, table in typed(dict, info.costs, "costs").items():
        _check_costs(table, f"costs[{key!r:.80}]")


def _check_source(source: Any, where: str) -> None:
    texts, numbers = ("role", "path", "sha256"), ("rows", "skipped", "bytes")
    for name, value in typed(dict, source, where).items():
        if name in texts or name in numbers:
            typed(str if name in texts else int, value, f"{where}.{name}")
    for row in typed(list, source.get("skipped_rows", []), f"{where}.skipped_rows"):
        typed(tuple[str, ...], row, f"{where}.skipped_rows")
    typed(tuple[str, ...], source.get("not_used", []), f"{where}.not_used")


def _check_costs(table: Any, where: str) -> None:
    """Sizes of steps, rising, and the seconds of each: a list is made of the largest size."""
    columns = []
    for name in ("sizes", "seconds"):
        place = f"{where}.{name}"
        column = typed(list, typed(dict, table, where).get(name), place)
        columns.append([typed(float, value, place) for value in column])
    for name in ("equal_rows", "product_rows"):
        for count in typed(list, table.get(name, []), f"{where}.{name}"):
            typed(float, count, f"{where}.{name}")
    sizes, seconds = columns
    rising = all(a < b for a, b in pairwise([0.0, *sizes, _MOST_SIZES + 1.0]))
    if not rising or not len(sizes) == len(seconds) > 1 or min(seconds) <= 0:
        raise ConfigError(
            "not a table of costs",
            got=shown(table),
            wanted=f"rising sizes from 1 to {_MOST_SIZES}, and seconds above 0 for each",
            where=where,
        )


def provenance() -> dict[str, Any]:
    """Command line, time and version, for ``pack.json``."""
    import tascade

    name = Path(sys.argv[0]).name
    return {
        "command": " ".join(["tascade" if name == "__main__.py" else name, *sys.argv[1:]]),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "tascade": tascade.__version__,
    }

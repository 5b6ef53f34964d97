"""A pack: the folder that holds everything learned about a task."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tascade.errors import FingerprintError, PackError
from tascade.files import write_atomic

FORMAT = "tascade-pack"
VERSION = 1


@dataclass(frozen=True, slots=True)
class PackInfo:
    """What ``pack.json`` says: which model and tokenizer, which data, made how.

    ``model`` is a hub id or a folder; ``fingerprint`` identifies the tokenizer (see
    :func:`tascade.encode.fingerprint`); ``data`` lists each source's name, sha256 and bytes;
    ``costs`` maps a machine to the measured seconds of a step by its number of tokens;
    ``own_answers`` counts the outputs that are the model's own; ``rows`` says how many were held
    out, calibrated on and compared with plain decoding, and how that came out.
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
    command: str = ""
    created: str = ""
    tascade: str = ""


class Pack:
    """Paths inside a pack folder, and its ``pack.json``."""

    def __init__(self, path: Path, info: PackInfo) -> None:
        self.path, self.info = path, info

    @property
    def tuned(self) -> Path:
        """Folder of the tuned model, in packs that hold one (TASC-ft)."""
        return self.path / "model"

    @property
    def model(self) -> str:
        """What to load and to serve: the tuned model, or the one the pack was made for."""
        return str(self.tuned) if (self.tuned / "config.json").is_file() else self.info.model

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
        return self.path / "vocabulary.json"

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

    def save_info(self, info: PackInfo) -> None:
        """Replace ``pack.json``, atomically."""
        body = {"format": FORMAT, "version": VERSION, **asdict(info)}
        write_atomic(self.path / "pack.json", json.dumps(body, indent=1).encode())
        self.info = info

    @classmethod
    def create(cls, path: Path, info: PackInfo) -> Pack:
        """Start a pack in an empty folder."""
        path.mkdir(parents=True, exist_ok=True)
        pack = cls(path, info)
        pack.save_info(info)
        return pack

    @classmethod
    def open(cls, path: str | Path) -> Pack:
        """Open a pack folder.

        Raises:
            PackError: no pack there, another format version, or a damaged ``pack.json``.
        """
        path = Path(path)
        file = path / "pack.json"
        if not file.is_file():
            raise PackError(
                "no pack in this folder",
                got="no pack.json",
                wanted="a folder written by `tascade adapt`",
                where=str(path),
                fix="run `tascade adapt --model M --data D --out PACK`",
            )
        try:
            raw = json.loads(file.read_bytes())
            found = (raw.pop("format", None), raw.pop("version", None))
        except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
            raise PackError("pack.json is damaged", got=error, where=str(file)) from error
        if found != (FORMAT, VERSION):
            raise PackError(
                "a pack this version cannot read",
                got=f"{found[0]} version {found[1]}",
                wanted=f"{FORMAT} version {VERSION}",
                where=str(file),
                fix="upgrade tascade, or adapt again",
            )
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
        """Copy the whole pack, complete or not at all."""
        if path.exists():
            raise PackError(
                "the folder exists already",
                got=str(path),
                wanted="a new folder",
                fix="remove it or choose another name",
            )
        part = path.with_name(f".{path.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        try:
            shutil.copytree(self.path, part)
            part.rename(path)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
        return Pack.open(path)


def _info(raw: dict[str, Any], file: Path) -> PackInfo:
    try:
        info = PackInfo(**raw)
        sound = all(
            type(getattr(info, name)) is kind
            for name, kind in (
                ("model", str),
                ("fingerprint", str),
                ("vocab_size", int),
                ("data", list),
                ("recipe", dict),
                ("stages", list),
                ("costs", dict),
                ("rows", dict),
                ("max_new_tokens", int),
            )
        )
    except TypeError as error:
        raise PackError(
            "pack.json has unknown or missing fields", got=error, where=str(file)
        ) from error
    if not sound:
        raise PackError("pack.json has a field of a wrong type", where=str(file), fix="adapt again")
    return info


def provenance() -> dict[str, Any]:
    """Command line, time and version, for ``pack.json``."""
    import tascade

    name = Path(sys.argv[0]).name
    return {
        "command": " ".join(["tascade" if name == "cli.py" else name, *sys.argv[1:]]),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "tascade": tascade.__version__,
    }

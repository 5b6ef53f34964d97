"""What a user tells the vLLM proposer, and the engines it refuses. Needs no vLLM."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tascade.errors import ConfigError

OLDEST, NEWEST = (0, 32), (0, 33)
"""vLLM minor versions this proposer was made for, both included."""
PACK_VARIABLE = "TASCADE_PACK"
_DEFAULT = "default"
_KEYS = {"pack", "packs", "adapters", "budget", "learn"}


@dataclass(frozen=True, slots=True)
class Options:
    """What ``additional_config["tascade"]`` says.

    ``packs``: folders by name, the first one the default; ``adapters``: which pack the requests of
    a LoRA adapter use; ``budget``: whether step times decide how much is drafted (else all is);
    ``learn``: a folder in which finished answers become drafts.
    """

    packs: dict[str, Path]
    adapters: dict[str, str] = field(default_factory=dict)
    budget: bool = True
    learn: str = ""


def read_options(additional: Any, environment: Any = os.environ) -> Options:
    """Options from vLLM's ``additional_config`` and the environment.

    Raises:
        ConfigError: an unknown key, a value of the wrong type, no pack named, or an adapter that
            names a pack which is not there.
    """
    where = "additional_config.tascade"
    raw = additional.get("tascade", {}) if isinstance(additional, dict) else {}
    if not isinstance(raw, dict) or set(raw) - _KEYS:
        raise ConfigError(
            "unknown tascade options", got=raw, wanted=f"a mapping of {sorted(_KEYS)}", where=where
        )
    packs = raw.get("packs", {})
    adapters = raw.get("adapters", {})
    for name, value in (("packs", packs), ("adapters", adapters)):
        strings = isinstance(value, dict) and all(
            isinstance(part, str) for item in value.items() for part in item
        )
        if not strings:
            raise ConfigError(
                f"{name} must map names to names", got=value, wanted="strings", where=where
            )
    single = raw.get("pack", environment.get(PACK_VARIABLE) if not packs else None)
    if single is not None:
        packs = {_DEFAULT: single, **packs}
    if not packs or not all(isinstance(path, str) for path in packs.values()):
        raise ConfigError(
            "no pack is named",
            got=raw,
            wanted="the folder of a pack",
            where=where,
            fix=f'add --additional-config \'{{"tascade": {{"pack": "FOLDER"}}}}\', '
            f"or set {PACK_VARIABLE}",
        )
    unknown = set(adapters.values()) - set(packs)
    if unknown:
        raise ConfigError(
            "an adapter names a pack that is not there",
            got=sorted(unknown),
            wanted=str(sorted(packs)),
            where=f"{where}.adapters",
        )
    folders = {name: Path(path).expanduser() for name, path in packs.items()}
    learn = raw.get("learn", "")
    if not isinstance(learn, str) or (learn and len(folders) > 1):
        raise ConfigError(
            "learn takes one folder, and one pack", got=raw, wanted="a folder", where=where
        )
    return Options(folders, adapters, bool(raw.get("budget", True)), learn)


def check_version(found: str) -> None:
    """Refuse a vLLM whose proposer interface was not tried.

    Raises:
        ConfigError: outside the range, with the range.
    """
    try:
        minor = tuple(int(part) for part in found.split(".")[:2])
    except ValueError:
        minor = (0, 0)
    if not OLDEST <= minor <= NEWEST:
        newest, oldest = (".".join(map(str, v)) for v in (NEWEST, OLDEST))
        raise ConfigError(
            "this vLLM was not tried with tascade",
            got=f"vllm {found}",
            wanted=f"{oldest} to {newest}",
            fix=f'pip install "vllm>={oldest},<{NEWEST[0]}.{NEWEST[1] + 1}"',
        )


def check_parallel(found: str, pipeline: int) -> None:
    """Refuse pipeline parallelism where vLLM fails with any drafter, less clearly.

    Raises:
        ConfigError: a vLLM whose first stages look for a drafter that only the last one has.
    """
    if pipeline > 1 and found.startswith("0.32."):
        raise ConfigError(
            "this vLLM cannot draft with pipeline parallelism, whatever the drafter",
            got=f"vllm {found}, {pipeline} stages",
            wanted="one stage; tensor parallelism works",
            where="pipeline_parallel_size",
            fix="use --tensor-parallel-size, or leave the speculative config out",
        )

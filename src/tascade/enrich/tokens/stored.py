"""Reading `tokens.json`: which base ids a model's new tokens stand for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tascade.enrich.tokens.merger import TokenMerger
from tascade.errors import ConfigError

TOKENS_FILE = "tokens.json"
TUNING_FILE = "tuning.json"
"""How the model beside it was tuned, and what the gate found."""
FORMAT, VERSION = "tascade-tokens", 1
_LARGEST = 64 << 20
_MOST = 1 << 20


def read_tokens(folder: str | Path) -> TokenMerger | None:
    """The new tokens of a model in a folder; ``None`` where it has none.

    Raises:
        ConfigError: a damaged file, or one of another version.
    """
    file = Path(folder) / TOKENS_FILE
    if not file.is_file():
        return None
    try:
        if file.stat().st_size > _LARGEST:
            raise ValueError(f"{file.stat().st_size} bytes")
        raw: Any = json.loads(file.read_bytes())
        found = (raw["format"], raw["version"])
        if found != (FORMAT, VERSION):
            raise ValueError(f"{found[0]} version {found[1]}")
        first, expansions = raw["first"], raw["expansions"]
        if type(first) is not int or not isinstance(expansions, list) or len(expansions) > _MOST:
            raise ValueError("first or expansions of a wrong type")
        if not all(type(token) is int for expansion in expansions for token in expansion):
            raise ValueError("an expansion that is not a list of ids")
        return TokenMerger(expansions, first)
    except (OSError, ValueError, KeyError, TypeError, RecursionError, OverflowError) as error:
        raise ConfigError(
            "cannot read the new tokens",
            got=f"{type(error).__name__}: {error}"[:300],
            wanted=f"{FORMAT} version {VERSION}, as `tascade enrich` and `tune` write it",
            where=str(file),
            fix="make it anew, or remove it if this model has no new tokens",
        ) from error

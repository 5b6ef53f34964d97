"""A tokenizer with new tokens that only answers use: prompts are read exactly as before.

A new token is an entry of the vocabulary that no merge leads to, so that reading text never finds
it; writing text from it is what every engine does with any token. Tokens added the usual way
(``add_tokens``) are matched in text instead, and cut the tokens around them.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tascade.enrich.tokens.family import TokenizerFamily
from tascade.errors import ConfigError
from tascade.util.files import write_atomic
from tascade.util.places import forget_places

TOKENIZER_FILE = "tokenizer.json"


def extended_layout(
    family: TokenizerFamily, expansions: Sequence[Sequence[int]], first: int
) -> dict[str, Any]:
    """The contents of ``tokenizer.json`` with new tokens.

    Args:
        family: the base tokenizer's.
        expansions: base ids of each new token.
        first: the id of the first one; the others follow.

    Raises:
        ConfigError: ids that are taken, or base ids that must not become one token.
    """
    if first < family.size:
        raise ConfigError(
            "the ids of the new tokens are taken",
            got=f"the first one is {first}",
            wanted=f"{family.size} or more",
        )
    layout = copy.deepcopy(family.layout)
    vocabulary: dict[str, int] = layout["model"]["vocab"]
    # The library numbers added tokens behind the vocabulary unless the vocabulary holds them: a
    # longer one would move every special id.
    vocabulary |= {content: number for number, content in family.added.items()}
    for number, expansion in enumerate(expansions):
        string = family.spell(expansion)
        if string is None or string in vocabulary:
            raise ConfigError(
                "these ids must not become one token",
                got=list(expansion),
                wanted="plain ids that begin and end with a character, as choose() gives them",
                where=f"new token {number}",
            )
        vocabulary[string] = first + number
    return layout


def save_extended(
    tokenizer: Any, expansions: Sequence[Sequence[int]], first: int, folder: Path
) -> None:
    """Write a tokenizer with new tokens; any Transformers or vLLM opens it.

    Args:
        tokenizer: the base tokenizer, which stays as it is.
        expansions: base ids of each new token.
        first: the id of the first one.
        folder: where its files go; there may be others.

    Raises:
        ConfigError: see :func:`extended_layout`, or a tokenizer of another kind.
    """
    layout = extended_layout(TokenizerFamily(tokenizer), expansions, first)
    tokenizer.save_pretrained(folder)
    forget_places(Path(folder) / "tokenizer_config.json")
    text = json.dumps(layout, ensure_ascii=False, indent=1)
    write_atomic(Path(folder) / TOKENIZER_FILE, text.encode())

"""Tokens that a list always keeps, so that no text is out of reach."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from tascade.core import IntArray

_BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")
_LONGEST_SPACE = 8


def pinned_tokens(tokenizer: Any, ends: Sequence[int]) -> IntArray:
    """Ids that any list keeps: [n] int32, ascending.

    These are the bytes (of which every text can be made), added tokens (special or not: marks of
    thinking and of tool calls are such), end tokens, white space and single digits. The reference's
    lists lack all but the special ones, and some texts cannot be said with them.

    Args:
        tokenizer: a Transformers tokenizer.
        ends: of the model.
    """
    strings: dict[str, int] = tokenizer.get_vocab()
    byte_letters = set(_byte_letters()) if _is_byte_level(tokenizer) else set()
    kept = {*map(int, ends), *map(int, tokenizer.get_added_vocab().values())}
    for string, number in strings.items():
        if string in byte_letters or _BYTE_PIECE.fullmatch(string) or _is_plain(string):
            kept.add(int(number))
    return np.asarray(sorted(kept), np.int32)


def _is_plain(string: str) -> bool:
    """White space, or one digit, with or without the space before it."""
    text = string.replace("▁", " ").replace("Ġ", " ").replace("Ċ", "\n").replace("ĉ", "\t")
    text = text.replace("č", "\r")
    if not text.strip():
        return 0 < len(text) <= _LONGEST_SPACE
    digit = text.removeprefix(" ")
    return len(digit) == 1 and digit in "0123456789"


def _is_byte_level(tokenizer: Any) -> bool:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return False
    layout = json.loads(backend.to_str())
    return '"ByteLevel"' in json.dumps(layout.get("decoder"))


def _byte_letters() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = 256 - len(shown)
    return [chr(code) for code in shown] + [chr(256 + i) for i in range(hidden)]

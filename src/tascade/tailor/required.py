"""Tokens that a list always keeps, so that no text is out of reach."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from tascade.core import IntArray
from tascade.data.encode import BYTE_LETTERS

_BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")
_LONGEST_SPACE = 8
_INNER = "##"  # word pieces within a word
# The others stand in no text, and some vocabularies (Pythia's) have no token for them.
_UTF8 = frozenset(range(256)) - {0xC0, 0xC1, *range(0xF5, 0x100)}


def pinned_tokens(tokenizer: Any, ends: Sequence[int]) -> IntArray:
    """Ids that any list keeps: [n] int32, ascending.

    These are the bytes (of which every text can be made), added tokens (special or not: marks of
    thinking and of tool calls are such), end tokens, white space and single digits. The reference's
    lists lack all but the special ones, and some texts cannot be said with them. Where a tokenizer
    has not all bytes (T5), they are the tokens of one character too: what it can read, it can say.

    Args:
        tokenizer: a Transformers tokenizer.
        ends: of the model.
    """
    strings: dict[str, int] = tokenizer.get_vocab()
    byte_letters = set(BYTE_LETTERS.values()) if _is_byte_level(tokenizer) else set()
    kept = {*map(int, ends), *map(int, tokenizer.get_added_vocab().values())}
    partly = bool(lacking_bytes(tokenizer))
    for string, number in strings.items():
        if (
            string in byte_letters
            or _BYTE_PIECE.fullmatch(string)
            or _is_plain(string)
            or (partly and len(string.removeprefix(_INNER)) == 1)
        ):
            kept.add(int(number))
    return np.asarray(sorted(kept), np.int32)


def lacking_bytes(tokenizer: Any) -> list[int]:
    """Bytes of UTF-8 texts that no token stands for; of such a tokenizer's own, not of a list's."""
    strings = tokenizer.get_vocab()
    if _is_byte_level(tokenizer):
        names = BYTE_LETTERS
    else:
        names = {byte: f"<0x{byte:02X}>" for byte in _UTF8}
    return sorted(byte for byte in _UTF8 if names[byte] not in strings)


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

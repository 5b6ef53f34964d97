"""Tokens that a list always keeps, and the characters of scripts that it may leave out."""

from __future__ import annotations

import bisect
import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from tascade.core import IntArray
from tascade.data.encode import BYTE_LETTERS
from tascade.errors import ConfigError

Ranges = tuple[tuple[int, int], ...]

# First and last code points, from the Unicode blocks.
ALWAYS: Ranges = (
    (0x0000, 0x0040),  # control, punctuation, digits
    (0x005B, 0x0060),
    (0x007B, 0x00BF),
    (0x00D7, 0x00D7),
    (0x00F7, 0x00F7),
    (0x2000, 0x206F),  # general punctuation
    (0x2070, 0x209F),  # super- and subscripts
    (0x20A0, 0x20CF),  # currency
    (0x2100, 0x214F),  # letter-like
    (0x2150, 0x218F),  # number forms
    (0x2190, 0x21FF),  # arrows
    (0x2460, 0x24FF),  # enclosed alphanumerics
)
_LATIN: Ranges = ((0x41, 0x5A), (0x61, 0x7A))
_ACCENTS: Ranges = (*_LATIN, (0xC0, 0x17F))
_HAN: Ranges = ((0x3000, 0x303F), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xFF00, 0xFFEF))
SCRIPTS: dict[str, Ranges] = {
    "english": _LATIN,
    "code": _LATIN,
    "math": (*_LATIN, (0x370, 0x3FF), (0x2200, 0x23FF), (0x27C0, 0x2AFF), (0x1D400, 0x1D7FF)),
    "spanish": _ACCENTS,
    "portuguese": _ACCENTS,
    "italian": _ACCENTS,
    "german": (*_ACCENTS, (0x1E9E, 0x1E9E)),
    "french": _ACCENTS,
    "hindi": ((0x900, 0x97F), (0xA8E0, 0xA8FF)),
    "thai": ((0xE00, 0xE7F),),
    "chinese": (*_HAN, (0x20000, 0x3134F)),
    "japanese": (*_HAN, (0x3040, 0x30FF), (0x31F0, 0x31FF)),
    "korean": ((0x1100, 0x11FF), (0x3130, 0x318F), (0xAC00, 0xD7AF)),
    "arabic": ((0x600, 0x6FF), (0x750, 0x77F), (0x8A0, 0x8FF), (0xFB50, 0xFDFF), (0xFE70, 0xFEFF)),
    "cyrillic": ((0x400, 0x52F), (0x1C80, 0x1C8F), (0x2DE0, 0x2DFF)),
    "greek": ((0x370, 0x3FF), (0x1F00, 0x1FFF)),
    "hebrew": ((0x590, 0x5FF), (0xFB1D, 0xFB4F)),
    "emoji": (
        (0x20E3, 0x20E3),  # keycaps
        (0x2300, 0x23FF),  # watches, clocks, keys
        (0x25A0, 0x27BF),
        (0x2934, 0x2935),
        (0x2B00, 0x2BFF),  # arrows, stars
        (0xFE0F, 0xFE0F),
        (0x1F000, 0x1FAFF),
        (0xE0020, 0xE007F),  # flags of regions
    ),
}
"""Names that a recipe may use (:data:`tascade.config.SCRIPTS`); ``ALWAYS`` needs none."""


class Charset:
    """The characters that some scripts write.

    Raises:
        ConfigError: a script of no known name.
    """

    def __init__(self, scripts: Sequence[str]) -> None:
        unknown = [name for name in scripts if name not in SCRIPTS]
        if unknown:
            raise ConfigError(
                "unknown script",
                got=", ".join(unknown),
                wanted=", ".join(SCRIPTS),
                where="vocab.scripts",
            )
        spans = sorted({*ALWAYS, *(span for name in scripts for span in SCRIPTS[name])})
        # Spans of several scripts overlap: the furthest end so far is what counts.
        self._starts = [first for first, _ in spans]
        self._ends: list[int] = []
        for _, last in spans:
            self._ends.append(max(last, self._ends[-1] if self._ends else 0))

    def write(self, text: str) -> bool:
        """Whether every character of ``text`` is one of these; a broken one (U+FFFD) may be any."""
        return all(char == "�" or self._has(ord(char)) for char in text)

    def _has(self, code: int) -> bool:
        at = bisect.bisect_right(self._starts, code) - 1
        return at >= 0 and code <= self._ends[at]


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

"""The text of an answer that is still being made."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tascade.core import Generation

if TYPE_CHECKING:  # it brings torch, which whoever shows text need not wait for
    from tascade.decode.sampling import SamplingParams

_CONTEXT = range(4, 9)
"""How many tokens of what has been said are decoded again with new ones. A character cut short has
three bytes at most, so that four tokens hold the last whole one.
"""
_WINDOW = 12
_CLEANED = 6
"""Longest run of characters that ``clean_up_tokenization`` makes others of, " n ' t"; each begins
with a space.
"""
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


class Detokenizer:
    """Decodes an answer token by token, in time that grows with its length.

    The parts that :meth:`add` gives, and :meth:`rest` at the end, are together what the tokenizer
    makes of the whole answer without its special tokens.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        added = getattr(tokenizer, "added_tokens_decoder", {})
        self._silent = {i for i, token in added.items() if token.special}
        self._cleans = bool(getattr(tokenizer, "clean_up_tokenization_spaces", False))
        self._ids: list[int] = []  # the newest tokens
        self._told = 0  # characters of their text that were given out

    def add(self, tokens: Sequence[int]) -> str:
        """Take the next tokens; returns the text that no later one can change."""
        new = [token for token in tokens if token not in self._silent]
        self._ids += new
        # Byte tokens in a row are read together, and one that is wrong spoils them all.
        if not new or _BYTE.fullmatch(self._tokenizer.convert_ids_to_tokens(new[-1]) or ""):
            return ""
        text = self._decode(self._ids)
        sure = len(text) - text.endswith("�")  # perhaps the beginning of a character
        if self._cleans and " " in text[max(0, sure - _CLEANED + 1) : sure]:
            sure = text.index(" ", max(0, sure - _CLEANED + 1), sure)
        part = text[self._told : sure]
        self._told = max(self._told, sure)
        if len(self._ids) > _WINDOW:
            self._forget(text)
        return part

    def rest(self) -> str:
        """What is left at the end."""
        return self._decode(self._ids)[self._told :]

    def _forget(self, text: str) -> None:
        """Leave out tokens at the front, so far as the others' text stays what it is."""
        for kept in _CONTEXT:
            end = self._decode(self._ids[-kept:])
            told = self._told - (len(text) - len(end))
            if told > 0 and text.endswith(end):
                self._ids, self._told = self._ids[-kept:], told
                return

    def _decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text


class TextStream:
    """Hands out the text of one growing answer, each part as soon as it is sure not to change."""

    def __init__(self, tokenizer: Any, params: SamplingParams) -> None:
        self._text, self._params = Detokenizer(tokenizer), params
        self._longest = max((len(stop) for stop in params.stop), default=0)
        self._seen = 0
        self._told: list[str] = []
        self._held = ""  # may be the beginning of a stop string
        self._stopped = False

    def take(self, result: Generation) -> str:
        """The text of the answer so far that was not handed out yet."""
        if result.text:
            told = "".join(self._told)
            new = result.text[len(told) :] if result.text.startswith(told) else ""
        else:
            tokens = result.tokens[self._seen :]
            said = self._text.add([t for t in tokens if t not in self._params.end_tokens])
            new = self._before_a_stop(self._held + said)
        self._seen = len(result.tokens)
        self._told.append(new)
        return new

    def _before_a_stop(self, text: str) -> str:
        """The part of ``text`` in front of a stop string, or of what may become one."""
        if self._stopped:
            return ""
        found = [at for at in map(text.find, self._params.stop) if at >= 0]
        if found:
            self._stopped = True
            return text[: min(found)]
        sure = max(0, len(text) - self._longest)
        while sure < len(text) and not any(s.startswith(text[sure:]) for s in self._params.stop):
            sure += 1
        self._held = text[sure:]
        return text[:sure]

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
    makes of the whole answer, without its special tokens or with them.
    """

    def __init__(self, tokenizer: Any, skip_special_tokens: bool = True) -> None:
        self._tokenizer, self._skips = tokenizer, skip_special_tokens
        self.silent = special_tokens(tokenizer) if skip_special_tokens else frozenset[int]()
        self._cleans = bool(getattr(tokenizer, "clean_up_tokenization_spaces", False))
        self._ids: list[int] = []  # the newest tokens
        self._told = 0  # characters of their text that were given out
        self._tail = ""  # of their text, what was not
        self._run, self._before = bytearray(), ""  # byte tokens at the end, and what is before them

    def add(self, tokens: Sequence[int]) -> str:
        """Take the next tokens; returns the text that no later one can change."""
        new = [token for token in tokens if token not in self.silent]
        self._ids += new
        # Byte tokens in a row are read together, and one that is wrong spoils them all.
        if not new:
            return ""
        if (byte := byte_of(self._tokenizer.convert_ids_to_tokens(new[-1]))) is not None:
            self._before = self._before if self._run else self._tail
            self._run.append(byte)
            return ""
        self._run.clear()
        text = self._decode(self._ids)
        sure = len(text) - text.endswith("�")  # perhaps the beginning of a character
        if self._cleans and " " in text[max(0, sure - _CLEANED + 1) : sure]:
            sure = text.index(" ", max(0, sure - _CLEANED + 1), sure)
        part = text[self._told : sure]
        self._told = max(self._told, sure)
        self._tail = text[self._told :]
        if len(self._ids) > _WINDOW:
            self._forget(text)
        return part

    def rest(self) -> str:
        """What is left at the end."""
        return self._decode(self._ids)[self._told :]

    def tail(self) -> str:
        """:meth:`rest`, where tokens are added one by one, at no cost that grows with a run."""
        if not self._run:
            return self._tail
        try:
            return self._before + self._run.decode()
        except UnicodeDecodeError:
            return self._before + "�" * len(self._run)

    def _forget(self, text: str) -> None:
        """Leave out tokens at the front, so far as the others' text stays what it is."""
        for kept in _CONTEXT:
            end = self._decode(self._ids[-kept:])
            told = self._told - (len(text) - len(end))
            if told > 0 and text.endswith(end):
                self._ids, self._told = self._ids[-kept:], told
                return

    def _decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=self._skips)
        return text


def byte_of(string: str | None) -> int | None:
    """The byte that a token of a byte-fallback tokenizer stands for (``<0xE2>``), if it does."""
    return int(string[3:5], 16) if string and _BYTE.fullmatch(string) else None


def special_tokens(tokenizer: Any) -> frozenset[int]:
    """Ids of the tokens that ``skip_special_tokens`` leaves out."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return frozenset(i for i, token in added.items() if token.special)


class AnswerText:
    """The text of a growing answer, up to the first stop string in it.

    Stop strings are looked for in what is shown, and in the text with its special tokens, as
    Transformers does: they may be one, or hold one. End tokens are in neither.

    Args:
        tokenizer: of the model.
        params: its ``stop``, ``end_tokens`` and ``skip_special_tokens``.
    """

    def __init__(self, tokenizer: Any, params: SamplingParams) -> None:
        self._stop, self._ends = params.stop, frozenset(params.end_tokens)
        self._longest = max(map(len, params.stop), default=0)
        self._shown = _Growing(tokenizer, params.skip_special_tokens)
        self._whole = self._shown  # until a special token comes that is not shown
        self._tokenizer = tokenizer
        self._special = self._shown.silent
        self._ids: list[int] = []
        self._starts: list[tuple[int, int, bool]] = []  # of each token: in both texts, is special
        self.stopped, self._cut = False, 0

    def add(self, tokens: Sequence[int]) -> bool:
        """Take the next tokens; whether a stop string stands in the text now."""
        for token in tokens:
            if self.stopped:
                break
            if token not in self._ends:
                self._add(token)
        return self.stopped

    def _add(self, token: int) -> None:
        shown, whole = self._shown, self._whole
        if not self._stop:
            shown.add(token)
            return
        if token in self._special and whole is shown:
            whole = self._whole = _Growing(self._tokenizer, False)
            for before in self._ids:
                whole.add(before)
        self._ids.append(token)
        self._starts.append((len(whole.text), len(shown.text), token in self._special))
        found = []
        for part in {id(shown): shown, id(whole): whole}.values():
            first = max(0, len(part.sure) - self._longest)
            part.add(token)
            places = (part.text.find(stop, first) for stop in self._stop)
            found += [at if part is shown else self._in_shown(at) for at in places if at >= 0]
        if found:
            self.stopped, self._cut = True, min(found)

    def _in_shown(self, at: int) -> int:
        """Where a place in the text with special tokens lies in what is shown."""
        whole, shown, special = next(s for s in reversed(self._starts) if s[0] <= at)
        return shown + (0 if special else at - whole)

    def text(self) -> str:
        """What is shown so far, as if no token came any more."""
        return self._shown.text[: self._cut] if self.stopped else self._shown.text

    def sure(self) -> str:
        """As much of it as no later token can change or cut."""
        if self.stopped:
            return self.text()
        ends = [self._undecided(self._shown.sure)]
        if self._whole is not self._shown:
            at = self._undecided(self._whole.sure)
            ends += [self._in_shown(at)] if at < len(self._whole.sure) else []
        return self._shown.sure[: min(ends)]

    def _undecided(self, text: str) -> int:
        """Where a stop string may have begun that has not ended; the text's end if none has."""
        at = max(0, len(text) - self._longest)
        while at < len(text) and not any(stop.startswith(text[at:]) for stop in self._stop):
            at += 1
        return at


class _Growing:
    """A text as tokens come: what is ``sure`` not to change, and all of it as it stands."""

    def __init__(self, tokenizer: Any, skip_special_tokens: bool) -> None:
        self._parts = Detokenizer(tokenizer, skip_special_tokens)
        self.silent = self._parts.silent
        self.sure = self.text = ""

    def add(self, token: int) -> None:
        self.sure += self._parts.add([token])
        self.text = self.sure + self._parts.tail()


class TextStream:
    """Hands out the text of one growing answer, each part as soon as it is sure not to change."""

    def __init__(self, tokenizer: Any, params: SamplingParams) -> None:
        self._text, self._seen, self._told = AnswerText(tokenizer, params), 0, 0

    def take(self, result: Generation) -> str:
        """The text of the answer so far that was not handed out yet."""
        self._text.add(result.tokens[self._seen :])
        self._seen = len(result.tokens)
        text = result.text or self._text.sure()
        new = text[self._told :]
        self._told = max(self._told, len(text))
        return new

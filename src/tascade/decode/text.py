"""The text of an answer that is still being made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tascade.core import Generation
from tascade.decode.sample import SamplingParams


class TextStream:
    """Hands out the text of one growing answer, each part as soon as it is sure not to change."""

    def __init__(self, tokenizer: Any, params: SamplingParams) -> None:
        self._tokenizer, self._params = tokenizer, params
        self._told = ""

    def take(self, result: Generation) -> str:
        """The text of the answer so far that was not handed out yet."""
        text = result.text or settled(self._tokenizer, result.tokens, self._params)
        new = text[len(self._told) :] if text.startswith(self._told) else ""
        self._told += new
        return new


def settled(tokenizer: Any, tokens: Sequence[int], params: SamplingParams) -> str:
    """Text that later tokens cannot change: no half character, no start of a stop string."""
    ids = [t for t in tokens if t not in params.end_tokens]
    text: str = tokenizer.decode(ids, skip_special_tokens=True)
    while text.endswith("�"):
        text = text[:-1]
    longest = max((len(s) for s in params.stop), default=0)
    for size in range(min(longest, len(text)), 0, -1):
        if any(s.startswith(text[-size:]) for s in params.stop):
            return text[:-size]
    return text

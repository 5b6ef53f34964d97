"""What kind of tokenizer this is, and which of its ids may become one token.

Handled are byte-level BPE (GPT-2, Llama-3, Qwen, Pythia, OLMo) and SentencePiece-like BPE with
byte fallback (Llama-2, Phi-3, Gemma). In both a token's string is the plain concatenation of what
its parts stand for, so that a longer token decodes to the same text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from tascade.data.encode import BYTE_OF_LETTER
from tascade.errors import ConfigError

Kind = Literal["byte-level", "sentencepiece"]
_BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")


class TokenizerFamily:
    """A tokenizer's kind, and how its tokens are spelled.

    Args:
        tokenizer: a fast Transformers tokenizer.

    Raises:
        ConfigError: a tokenizer of another kind, with the reason.
    """

    def __init__(self, tokenizer: Any) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise _refused("it has no fast tokenizer (tokenizer.json)")
        self._backend = backend
        self.layout: dict[str, Any] = json.loads(backend.to_str())
        self.kind: Kind = _kind_of(self.layout)
        self._ignores_merges = bool(self.layout["model"].get("ignore_merges"))
        vocabulary: dict[str, int] = self.layout["model"]["vocab"]
        self._strings = {number: string for string, number in vocabulary.items()}
        self.added = {entry["id"]: entry["content"] for entry in self.layout["added_tokens"]}
        self._taken = set(vocabulary) | set(self.added.values())
        self.size = 1 + max(*self._strings, *self.added, 0)
        """One more than the highest id in use."""

    def is_plain(self, token: int) -> bool:
        """Whether an id may be part of a new token: no special or added one, no byte piece."""
        string = self._strings.get(token)
        if string is None or token in self.added:
            return False
        return self.kind == "byte-level" or not _BYTE_PIECE.fullmatch(string)

    def spell(self, ids: Sequence[int]) -> str | None:
        """The string of a token that stands for ``ids``; ``None`` where there must not be one.

        That is where it holds an id that is not plain, begins or ends within a character, has the
        string of a token there is, or would be found in prompts (a tokenizer that ignores merges
        looks whole words up).
        """
        if not all(self.is_plain(token) for token in ids):
            return None
        string = "".join(self._strings[token] for token in ids)
        if string in self._taken:
            return None
        try:
            text = self._text(string)
        except UnicodeDecodeError:
            return None
        if self._ignores_merges and len(self._backend.pre_tokenizer.pre_tokenize_str(text)) == 1:
            return None
        return string

    def _text(self, string: str) -> str:
        if self.kind == "sentencepiece":
            return string.replace("▁", " ")
        return bytes(BYTE_OF_LETTER[char] for char in string).decode("utf-8")


def _kind_of(layout: dict[str, Any]) -> Kind:
    model = layout["model"]
    if model.get("type") != "BPE":
        raise _refused(f"its model is {model.get('type')}, not BPE")
    if model.get("dropout"):
        raise _refused("it splits text at random (BPE dropout)")
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise _refused("its tokens are marked where a word goes on or ends")
    decoders = {part.get("type") for part in _parts(layout.get("decoder"), "decoders")}
    if "ByteLevel" in decoders:
        return "byte-level"
    if model.get("byte_fallback") and "ByteFallback" in decoders:
        return "sentencepiece"
    raise _refused(f"its decoder is {sorted(map(str, decoders))}, neither bytes nor byte fallback")


def _parts(part: Any, name: str) -> Iterator[dict[str, Any]]:
    if isinstance(part, dict):
        if part.get("type") == "Sequence":
            for inner in part[name]:
                yield from _parts(inner, name)
        else:
            yield part


def _refused(reason: str) -> ConfigError:
    return ConfigError(
        "this tokenizer cannot be given new tokens",
        got=reason,
        wanted="byte-level BPE (GPT-2, Llama-3, Qwen) or BPE with byte fallback (Llama-2, Gemma)",
        fix="leave the vocabulary as it is: speculative decoding works with every tokenizer",
    )

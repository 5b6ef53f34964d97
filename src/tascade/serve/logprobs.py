"""Log-probabilities as OpenAI's API tells them: a token's bytes, and where its text begins."""

from __future__ import annotations

import codecs
import json
from collections import deque
from collections.abc import Sequence
from typing import Any

from tascade.core import TokenLogprob
from tascade.data.encode import BYTE_OF_LETTER
from tascade.decode.text import byte_of, special_tokens


class TokenBytes:
    """What each token adds to a text, as bytes: a character may take several tokens.

    Read off the token's own string, by the kind of the tokenizer's decoder: letters for bytes
    (GPT-2), ``<0xE2>`` (byte fallback), a mark for a space (SentencePiece) or for a piece within a
    word (WordPiece). Of other kinds, what the token alone decodes to.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        added = getattr(tokenizer, "added_tokens_decoder", {})
        self._added = {i: str(token) for i, token in added.items()}
        self._special = special_tokens(tokenizer)
        decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
        parts = [] if decoder is None else _parts(json.loads(decoder.__getstate__()))
        self._kinds = {part.get("type") for part in parts}
        self._marked = "Metaspace" in self._kinds or "ByteFallback" in self._kinds

    def __call__(self, token: int) -> bytes:
        """The bytes of a token: of a special one its name."""
        if token in self._added:
            return self._added[token].encode()
        string = self._tokenizer.convert_ids_to_tokens(token)
        if string is None:
            return b""
        if "ByteLevel" in self._kinds and all(letter in BYTE_OF_LETTER for letter in string):
            return bytes(BYTE_OF_LETTER[letter] for letter in string)
        if self._marked:
            if (byte := byte_of(string)) is not None:
                return bytes([byte])
            return str(string).replace("▁", " ").encode()
        if "WordPiece" in self._kinds:
            return (string[2:] if string.startswith("##") else f" {string}").encode()
        return str(self._tokenizer.decode([token])).encode()

    def first(self, token: int) -> bytes:
        """The bytes of an answer's first token, before which some tokenizers print no space."""
        found = self(token)
        if found.startswith(b" ") and not self._tokenizer.decode([token]).startswith(" "):
            return found[1:]
        return found

    def is_silent(self, token: int) -> bool:
        """Whether a token is special, and so no part of the text."""
        return token in self._special


def shown(token: bytes) -> str:
    r"""A token as text; as OpenAI shows it where it is no whole character: ``bytes:\xe2\x80``."""
    try:
        return token.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)


class AnswerLogprobs:
    """The log-probabilities of one answer's tokens, told as far as its text has come.

    Args:
        names: of the tokens.
        chat: whether in the shape of a chat's reply, or a completion's.
        most: alternatives asked for.
    """

    def __init__(self, names: TokenBytes, chat: bool, most: int) -> None:
        self._names, self._chat, self._most = names, chat, most
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._end, self._begun = 0, False
        self._waiting: deque[tuple[int, bytes, TokenLogprob]] = deque()

    def add(self, found: Sequence[TokenLogprob]) -> None:
        """Take the next tokens."""
        for token in found:
            own = self._names(token.token) if self._begun else self._names.first(token.token)
            self._waiting.append((self._end, own, token))
            if not self._names.is_silent(token.token):
                self._begun = True
                self._end += len(self._decoder.decode(own))

    def upto(self, length: int) -> dict[str, Any] | None:
        """Those whose text begins within the first ``length`` characters and was not told yet."""
        told = []
        while self._waiting and self._waiting[0][0] < length:
            told.append(self._waiting.popleft())
        if not told:
            return None
        return self._as_chat(told) if self._chat else self._as_completion(told)

    def _top(self, token: TokenLogprob) -> list[tuple[int, float]]:
        """The likeliest, and the sampled token if it is none of them."""
        found = list(token.top[: self._most])
        if found and all(i != token.token for i, _ in found):
            found.append((token.token, token.logprob))
        return found

    def _as_chat(self, told: Sequence[tuple[int, bytes, TokenLogprob]]) -> dict[str, Any]:
        content = []
        for _, own, token in told:
            top = [_entry(self._names(i), value) for i, value in self._top(token)]
            content.append(_entry(own, token.logprob) | {"top_logprobs": top})
        return {"content": content, "refusal": None}

    def _as_completion(self, told: Sequence[tuple[int, bytes, TokenLogprob]]) -> dict[str, Any]:
        tops: list[dict[str, float]] = [{} for _ in told]
        for top, (_, _, token) in zip(tops, told, strict=True):
            for i, value in self._top(token):
                top.setdefault(shown(self._names(i)), value)
        return {
            "tokens": [shown(own) for _, own, _ in told],
            "token_logprobs": [token.logprob for _, _, token in told],
            "top_logprobs": tops if self._most else None,
            "text_offset": [at for at, _, _ in told],
        }


def _entry(token: bytes, logprob: float) -> dict[str, Any]:
    return {"token": shown(token), "logprob": logprob, "bytes": list(token)}


def _parts(part: dict[str, Any]) -> list[dict[str, Any]]:
    return (
        [p for inner in part["decoders"] for p in _parts(inner)] if "decoders" in part else [part]
    )

"""Answers in the shapes of OpenAI's API."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

from tascade.core import Generation, TokenLogprob

Decode = Callable[[int], str]


class Shape:
    """Builds the objects of one reply: of a chat or of a completion, whole or in chunks."""

    def __init__(self, kind: str, model: str, decode: Decode) -> None:
        self.chat = kind == "chat"
        self.model, self._decode = model, decode
        self.id = ("chatcmpl-" if self.chat else "cmpl-") + uuid.uuid4().hex
        self.created = int(time.time())

    def _envelope(self, kind: str, choices: list[Any]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }

    def whole(self, results: Sequence[Generation], logprobs: bool, each: int) -> dict[str, Any]:
        """A reply that is not streamed; ``each``: answers to one prompt."""
        choices = []
        for i, result in enumerate(results):
            said = self._logprobs(result.logprobs) if logprobs else None
            choice = {"index": i, "logprobs": said, "finish_reason": result.finish_reason}
            if self.chat:
                choice["message"] = {"role": "assistant", "content": result.text, "refusal": None}
            else:
                choice["text"] = result.text
            choices.append(choice)
        kind = "chat.completion" if self.chat else "text_completion"
        return self._envelope(kind, choices) | {"usage": usage(results, each)}

    def chunk(
        self,
        index: int,
        text: str,
        logprobs: Sequence[TokenLogprob] = (),
        *,
        reason: str | None = None,
        first: bool = False,
    ) -> dict[str, Any]:
        """A part of a streamed reply; ``reason`` with the last one."""
        said = self._logprobs(logprobs) if logprobs else None
        choice: dict[str, Any] = {"index": index, "logprobs": said, "finish_reason": reason}
        if not self.chat:
            return self._envelope("text_completion", [choice | {"text": text}])
        delta: dict[str, Any] = {"role": "assistant"} if first else {}
        if text or first:
            delta["content"] = text
        return self._envelope("chat.completion.chunk", [choice | {"delta": delta}])

    def last(self, results: Sequence[Generation], each: int) -> dict[str, Any]:
        """The chunk that only tells the usage."""
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return self._envelope(kind, []) | {"usage": usage(results, each)}

    def _logprobs(self, found: Sequence[TokenLogprob]) -> dict[str, Any]:
        if not self.chat:
            return {
                "tokens": [self._decode(t.token) for t in found],
                "token_logprobs": [t.logprob for t in found],
                "top_logprobs": [{self._decode(i): p for i, p in t.top} for t in found],
            }
        content = [
            self._token(t.token, t.logprob)
            | {"top_logprobs": [self._token(i, p) for i, p in t.top]}
            for t in found
        ]
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._decode(token)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


def usage(results: Sequence[Generation], each: int) -> dict[str, int]:
    """Token counts: a prompt counts once, however many answers it was asked for."""
    read = sum(result.prompt_tokens for result in results[::each])
    said = sum(len(result.tokens) for result in results)
    return {"prompt_tokens": read, "completion_tokens": said, "total_tokens": read + said}

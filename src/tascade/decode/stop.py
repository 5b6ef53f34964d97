"""When a request ends: an end token, a stop string, or the token limit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from tascade.decode.sampling import SamplingParams
from tascade.decode.text import AnswerText
from tascade.errors import ConfigError

ExtraStop = Callable[[Sequence[int]], bool]
"""A caller's own rule: (output so far, its newest token last) -> whether that token is the last."""


def bounded(
    params: SamplingParams, prompt_tokens: int, positions: int | None, where: str = "prompt"
) -> SamplingParams:
    """The options with as many new tokens as fit behind the prompt.

    Args:
        params: as asked for.
        prompt_tokens: length of the prompt.
        positions: most tokens that the model can place, ``None`` for any.
        where: the prompt's name in an error.

    Raises:
        ConfigError: the prompt alone leaves no room for an answer.
    """
    most = min((n for n in (params.max_length, positions) if n), default=None)
    if most is None or prompt_tokens + params.max_new_tokens <= most:
        return params
    if prompt_tokens >= most:
        by = "max_length" if most == params.max_length else "the model's table of positions"
        raise ConfigError(
            "the prompt is too long",
            got=f"{prompt_tokens} tokens",
            wanted=f"at most {most - 1}, by {by}",
            where=where,
            fix="shorten the prompt, or "
            + (
                "raise max_length; max_new_tokens counts the answer alone"
                if by == "max_length"
                else "use a model with a longer context"
            ),
        )
    return replace(params, max_new_tokens=most - prompt_tokens)


class StopRule:
    """Decides after each token, as a function of the tokens alone.

    An ``extra`` rule is asked once for each committed token, in order, whatever else holds.

    Stop strings are looked for in the text, which is decoded token by token; where ``output`` is
    not what it was and more, as when guesses are taken back, from its beginning.
    """

    def __init__(
        self, params: SamplingParams, tokenizer: Any = None, extra: ExtraStop | None = None
    ) -> None:
        if params.stop and tokenizer is None:
            raise ConfigError("stop strings need a tokenizer", fix="pass tokenizer=...")
        self.params, self._tokenizer, self._extra = params, tokenizer, extra
        self._ends = frozenset() if params.ignore_end else frozenset(params.end_tokens)
        self._read, self._last = 0, -1
        self.reason = "length"

    def is_last(self, output: Sequence[int]) -> bool:
        """Whether the last of ``output`` (all tokens so far) ends the request; sets ``reason``."""
        stopped = self._extra is not None and self._extra(output)
        if stopped or output[-1] in self._ends:
            self.reason = "stop"
            return True
        if self.params.stop and self._reads_a_stop(output):
            self.reason = "stop"
            return True
        return len(output) >= self.params.max_new_tokens

    def remaining(self, output: Sequence[int]) -> int:
        """Tokens the limit still allows."""
        return self.params.max_new_tokens - len(output)

    def _reads_a_stop(self, output: Sequence[int]) -> bool:
        goes_on = 0 < self._read < len(output) and output[self._read - 1] == self._last
        if not goes_on:
            self._read, self._text = 0, AnswerText(self._tokenizer, self.params)
        found = self._text.add(output[self._read :])
        self._read, self._last = len(output), output[-1]
        return found

    def text(self, output: Sequence[int]) -> str:
        """The text of ``output`` without end tokens, cut before the first stop string."""
        if self._tokenizer is None:
            return ""
        if self.params.stop:
            text = AnswerText(self._tokenizer, self.params)
            text.add(output)
            return text.text()
        ids = [t for t in output if t not in self.params.end_tokens]
        skips = self.params.skip_special_tokens
        return str(self._tokenizer.decode(ids, skip_special_tokens=skips))

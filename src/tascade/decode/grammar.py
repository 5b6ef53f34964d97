"""Answers held to a JSON schema: at each place the tokens that cannot go on with one are ruled out.

The work is llguidance's (https://github.com/guidance-ai/llguidance); here it becomes a logits
processor whose scores depend on the text before them alone, so that drafts change nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from tascade.decode.sampling import Processor
from tascade.errors import ConfigError

_KEPT = 16
"""Compiled schemas that are kept: a client asks with the same few again and again."""


class JSONGrammars:
    """Compiles JSON schemas for one tokenizer.

    Args:
        tokenizer: of the model; a fast one.
        vocab_size: logits that the model gives.
        end_tokens: ids that end an answer; one of them may follow a complete JSON text.

    Raises:
        ConfigError: llguidance is not installed, or cannot read the tokenizer.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, end_tokens: Sequence[int]) -> None:
        try:
            from llguidance import LLMatcher
            from llguidance.hf import from_tokenizer
        except ImportError as error:
            raise ConfigError(
                "JSON schemas need llguidance", fix="install tascade with its serve extra"
            ) from error
        try:
            ends = [*end_tokens]
            own = from_tokenizer(tokenizer, n_vocab=vocab_size, eos_token=ends)
        except ValueError as error:
            raise ConfigError(
                "this tokenizer cannot be held to a JSON schema",
                got=str(error)[:200],
                wanted="a fast tokenizer",
            ) from error
        self._matcher, self._tokenizer = LLMatcher, own
        self._compiled = lru_cache(_KEPT)(self._compile)

    def _compile(self, schema: str) -> Any:
        try:
            grammar = self._matcher.grammar_from_json_schema(schema)
        except ValueError as error:
            raise _refused(str(error)) from error
        made = self._matcher(self._tokenizer, grammar, log_level=0)
        if made.is_error():
            raise _refused(made.get_error())
        return made

    def processor(self, schema: Mapping[str, Any], prompt_tokens: int) -> Processor:
        """What holds one answer to a schema.

        Args:
            schema: a JSON schema.
            prompt_tokens: how many tokens the answer's prompt has.

        Raises:
            ConfigError: no schema, or one that llguidance does not know how to hold to.
        """
        compiled = self._compiled(json.dumps(schema))
        return _Held(compiled.deep_copy(), prompt_tokens)


class _Held:
    """A logits processor; it follows a text from token to token, and back where a draft is left."""

    def __init__(self, matcher: Any, prompt_tokens: int) -> None:
        self._matcher, self._start = matcher, prompt_tokens
        self._read: list[int] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores [1, V] behind ``input_ids`` [1, T]: minus infinity for what cannot follow."""
        said = input_ids[0, self._start :].tolist()
        pairs = enumerate(zip(said, self._read, strict=False))
        same = next((i for i, (a, b) in pairs if a != b), min(len(said), len(self._read)))
        if same < len(self._read):
            self._matcher.rollback(len(self._read) - same)
        self._matcher.consume_tokens(said[same:])
        self._read = said
        if self._matcher.is_error():
            raise ConfigError(
                "an answer cannot be held to its schema", got=self._matcher.get_error()
            )
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        allowed = torch.from_numpy(np.unpackbits(bits, bitorder="little")[: scores.shape[1]])
        return scores.masked_fill(allowed.to(scores.device)[None] == 0, -torch.inf)


def _refused(why: str) -> ConfigError:
    return ConfigError(
        "this JSON schema cannot be held to",
        got=why.splitlines()[0][:200] if why else "an error",
        wanted="a JSON schema",
        where="response_format",
    )

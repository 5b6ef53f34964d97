"""Text to token ids: chat templates, completions as the model would emit them, end tokens."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from tascade.core import Example, IntArray
from tascade.errors import ConfigError

Prompt = str | Sequence[dict[str, str]]


def fingerprint(tokenizer: Any) -> str:
    """Identifies a tokenizer by what it does to text, not by its name: ``<tokens>-<sha256>``.

    Padding and truncation, which callers switch on and off, are left out.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        state = json.loads(backend.to_str())
        state.pop("padding", None)
        state.pop("truncation", None)
        content = json.dumps(state, sort_keys=True)
    else:
        content = json.dumps(sorted(tokenizer.get_vocab().items()))
    return f"{len(tokenizer)}-{hashlib.sha256(content.encode()).hexdigest()[:24]}"


def end_tokens(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """Ids that end an answer: the model's own list first, then the tokenizer's end token."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if configured is None:
        configured = getattr(model.config, "eos_token_id", None)
    ids = configured if isinstance(configured, list | tuple) else [configured]
    found = [int(i) for i in ids if i is not None]
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in found:
        found.append(int(tokenizer.eos_token_id))
    return tuple(found)


def _messages(prompt: Prompt) -> list[dict[str, str]]:
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    return [dict(message) for message in prompt]


def encode_prompt(tokenizer: Any, prompt: Prompt) -> IntArray:
    """Ids of a prompt [T], ready for the answer: through the chat template where there is one.

    Raises:
        ConfigError: chat messages for a tokenizer without a chat template.
    """
    if getattr(tokenizer, "chat_template", None):
        text = tokenizer.apply_chat_template(
            _messages(prompt), add_generation_prompt=True, tokenize=False
        )
        return encode_text(tokenizer, text)
    if not isinstance(prompt, str):
        raise ConfigError(
            "the tokenizer has no chat template, so it cannot take messages",
            got=f"{len(prompt)} messages",
            wanted="a prompt string",
            fix="pass the prompt as one string, or use a chat model",
        )
    return encode_text(tokenizer, prompt, special=True)


def encode_completion(
    tokenizer: Any, example: Example, prompt_ids: IntArray, ends: Sequence[int]
) -> IntArray:
    """Ids of an answer as the model would emit it, its end token included.

    The whole conversation is encoded where its prompt part comes out as the same ids; the answer
    is what follows, up to the first end token. Otherwise the answer is encoded by itself.
    """
    whole = _encode_whole(tokenizer, example)
    n = len(prompt_ids)
    if whole is not None and len(whole) > n and (whole[:n] == prompt_ids).all():
        answer = whole[n:]
    else:
        answer = encode_text(tokenizer, example.completion)
    for i, token in enumerate(answer.tolist()):
        if token in ends:
            return answer[: i + 1]
    tail = np.asarray(ends[:1], np.int32)
    return np.concatenate((answer, tail))


def _encode_whole(tokenizer: Any, example: Example) -> IntArray | None:
    prompt = example.prompt if example.prompt is not None else ""
    if getattr(tokenizer, "chat_template", None):
        messages = [*_messages(prompt), {"role": "assistant", "content": example.completion}]
        return encode_text(tokenizer, tokenizer.apply_chat_template(messages, tokenize=False))
    if not isinstance(prompt, str) or example.prompt is None:
        return None
    return encode_text(tokenizer, prompt + example.completion, special=True)


def encode_text(tokenizer: Any, text: str, *, special: bool = False) -> IntArray:
    """Ids of a text as it stands [T], with the tokenizer's own marks around it if ``special``.

    Padding and truncation that its owner has set in the tokenizer play no part, and stay set.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return np.asarray(tokenizer(text, add_special_tokens=special).input_ids, np.int32)
    truncation, padding = backend.truncation, backend.padding
    try:
        return np.asarray(tokenizer(text, add_special_tokens=special).input_ids, np.int32)
    finally:
        if backend.truncation != truncation:
            backend.enable_truncation(**truncation)
        if backend.padding != padding:
            backend.enable_padding(**padding)


def encode_example(
    tokenizer: Any, example: Example, ends: Sequence[int]
) -> tuple[IntArray | None, IntArray]:
    """(prompt ids or ``None``, answer ids) of one example."""
    prompt = encode_prompt(tokenizer, example.prompt if example.prompt is not None else "")
    answer = encode_completion(tokenizer, example, prompt, ends)
    return (None if example.prompt is None else prompt), answer

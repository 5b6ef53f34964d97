"""Text to token ids: chat templates, completions as the model would emit them, end tokens."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import numpy as np

from tascade.core import Example, IntArray
from tascade.data.chat import ChatConfig
from tascade.errors import ConfigError


class RowRefusedError(ConfigError):
    """A prompt or an example that cannot be encoded, by its own fault: others may be."""


Prompt = str | Sequence[dict[str, str]]
_PLAIN = ChatConfig()
_SYSTEM = ("system", "developer")
_MARK = "A5f1c0ffee5A"

_SHOWN = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_OTHERS = (byte for byte in range(256) if byte not in _SHOWN)
BYTE_LETTERS = {b: chr(b) for b in _SHOWN} | {b: chr(256 + i) for i, b in enumerate(_OTHERS)}
BYTE_OF_LETTER = {letter: byte for byte, letter in BYTE_LETTERS.items()}
"""The letter that stands for each byte in the tokens of byte-level BPE (GPT-2's table)."""


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


def _check_prompt(prompt: object) -> None:
    """Refuse what is neither a text nor chat messages.

    Raises:
        ConfigError: saying what it is.
    """
    texts = [prompt] if isinstance(prompt, str) else []
    if not texts:
        if not isinstance(prompt, list | tuple) or not prompt:
            empty = " without messages" if isinstance(prompt, list | tuple) else ""
            _refuse_prompt(type(prompt).__name__ + empty)
        for message in prompt:
            if not isinstance(message, Mapping) or "role" not in message:
                _refuse_prompt(f"a list that holds {type(message).__name__} without a role")
            if message.get("content") is None and not message.get("tool_calls"):
                _refuse_prompt(f"a message of role {message['role']!r} without content")
            texts += [message["content"]] if isinstance(message.get("content"), str) else []
    for text in texts:
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            _refuse_prompt("half a surrogate pair, which is no character")


def _refuse_prompt(got: str) -> NoReturn:
    raise ConfigError(
        "this is no prompt",
        got=got,
        wanted="a string, or a list of messages with role and content; a list of strings for many",
        where="prompt",
    )


def _messages(prompt: Prompt, system: str) -> list[dict[str, str]]:
    given = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    messages = [dict(message) for message in given]
    if system and not any(message.get("role") in _SYSTEM for message in messages):
        messages.insert(0, {"role": "system", "content": system})
    return messages


def encode_prompt(
    tokenizer: Any,
    prompt: Prompt,
    chat: ChatConfig = _PLAIN,
    continue_final_message: bool | None = None,
) -> IntArray:
    """Ids of a prompt [T], ready for the answer: through the chat template where there is one.

    Args:
        tokenizer: of the model.
        prompt: text, or chat messages; a system message of theirs is used instead of the pack's.
        chat: what the prompt takes along into the template.
        continue_final_message: whether the answer goes on with the last message instead of
            beginning a new one; by default where that is the assistant's, as in Transformers'
            text-generation pipeline.

    Raises:
        ConfigError: chat messages, or anything to take along, for a tokenizer without a chat
            template; a variable that its template does not have; messages that it refuses.
    """
    _check_prompt(prompt)
    if getattr(tokenizer, "chat_template", None):
        messages = _messages(prompt, chat.system)
        wanted = continue_final_message
        goes_on = _goes_on(messages) if wanted is None else wanted
        return encode_text(tokenizer, _render(tokenizer, messages, chat, not goes_on, goes_on))
    if not isinstance(prompt, str) or chat:
        what = "a system prompt, variables or tools" if isinstance(prompt, str) else "messages"
        raise ConfigError(
            f"the tokenizer has no chat template, so it cannot take {what}",
            got=what,
            wanted="a prompt string alone",
            fix="pass the prompt as one string, and no chat options, or use a chat model",
        )
    return encode_opening(tokenizer, prompt)


def _goes_on(messages: Sequence[Mapping[str, Any]]) -> bool:
    """Whether an answer continues the last of these messages."""
    last = messages[-1]
    said = last.get("content")
    return last.get("role") == "assistant" and isinstance(said, str) and bool(said)


def system_template(tokenizer: Any, chat: ChatConfig) -> str:
    """The tokenizer's chat template with a system message for prompts that bring none.

    For engines that know no default for it. It is a template before the template, so that a system
    message stands wherever the tokenizer's own puts one.

    Raises:
        ConfigError: there is no chat template.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError(
            "the tokenizer has no chat template, so it cannot take a system prompt",
            wanted="a chat model",
            where="chat.system",
        )
    template = str(tokenizer.get_chat_template(tools=list(chat.tools) or None))
    # vLLM looks for the quoted name of the second role, to see if a template knows it.
    roles = "['system', 'devel' ~ 'oper']"
    return (
        f"{{%- if not messages | selectattr('role', 'in', {roles}) | list -%}}"
        f"{{%- set messages = [{{'role': 'system', 'content': {chat.system!a}}}] + messages -%}}"
        f"{{%- endif +%}}{template}"
    )


def encode_completion(
    tokenizer: Any,
    example: Example,
    prompt_ids: IntArray,
    ends: Sequence[int],
    chat: ChatConfig = _PLAIN,
) -> IntArray:
    """Ids of an answer as the model would emit it, its end token included.

    The whole conversation is encoded where its prompt part comes out as the same ids; the answer
    is what follows, up to the first end token. Otherwise (a prompt ends in an empty thought, which
    the template leaves out of a conversation) the answer is encoded by itself, with what the
    template writes behind one.
    """
    whole = _encode_whole(tokenizer, example, chat)
    n = len(prompt_ids)
    if whole is not None and len(whole) > n and (whole[:n] == prompt_ids).all():
        answer = whole[n:]
    else:
        answer = encode_text(tokenizer, example.completion + _behind(tokenizer, example, chat))
        if not np.isin(answer, ends).any():
            answer = encode_text(tokenizer, example.completion)
    for i, token in enumerate(answer.tolist()):
        if token in ends:
            return answer[: i + 1]
    tail = np.asarray(ends[:1], np.int32)
    return np.concatenate((answer, tail))


def _behind(tokenizer: Any, example: Example, chat: ChatConfig) -> str:
    """What the chat template writes behind an answer: its end token, where it has one."""
    if not getattr(tokenizer, "chat_template", None):
        return ""
    marked = _conversation(tokenizer, example.prompt or "", _MARK, chat).rpartition(_MARK)
    return marked[2] if marked[1] else ""


def _conversation(tokenizer: Any, prompt: Prompt, answer: str, chat: ChatConfig) -> str:
    messages = _messages(prompt, chat.system)
    if _goes_on(messages):
        answer = messages.pop()["content"] + answer
    messages.append({"role": "assistant", "content": answer})
    return _render(tokenizer, messages, chat, False)


def _encode_whole(tokenizer: Any, example: Example, chat: ChatConfig) -> IntArray | None:
    prompt = example.prompt if example.prompt is not None else ""
    if getattr(tokenizer, "chat_template", None):
        return encode_text(tokenizer, _conversation(tokenizer, prompt, example.completion, chat))
    if not isinstance(prompt, str) or example.prompt is None:
        return None
    return encode_text(tokenizer, prompt + example.completion, special=True)


def _render(
    tokenizer: Any,
    messages: list[dict[str, str]],
    chat: ChatConfig,
    asking: bool,
    goes_on: bool = False,
) -> str:
    """Messages as text; ``asking``: with the beginning of the answer; ``goes_on``: up to the last
    word of the last message.
    """
    templates = tokenizer.chat_template
    text = " ".join(templates.values()) if isinstance(templates, dict) else str(templates)
    for name in chat.kwargs:
        # One that the template never reads would change nothing, in silence.
        if not re.search(rf"\b{name}\b", text):
            raise ConfigError(
                f"the tokenizer's chat template has no variable {name!r}",
                got=name,
                wanted="a variable that the template reads",
                where="chat",
                fix="look at tokenizer.chat_template, or leave it out",
            )
    try:
        return str(
            tokenizer.apply_chat_template(
                messages,
                add_generation_prompt=asking,
                continue_final_message=goes_on,
                tokenize=False,
                **chat.kwargs,
            )
        )
    except Exception as error:  # a template raises whatever it likes
        raise RowRefusedError(
            f"the chat template refuses the messages: {str(error)[:200]}",
            got=type(error).__name__,
            wanted="messages and options that the template takes",
            where="chat",
        ) from error


def encode_opening(tokenizer: Any, text: str) -> IntArray:
    """Ids of a text that an answer follows [T]: with the tokenizer's own marks before it, and
    without the end token that some tokenizers put behind every text.
    """
    ids, end = encode_text(tokenizer, text, special=True), tokenizer.eos_token_id
    if end is None or not len(ids) or ids[-1] != end:
        return ids
    added = _run_at_the_end(ids, end) - _run_at_the_end(encode_text(tokenizer, text), end)
    return ids[: len(ids) - added]


def _run_at_the_end(ids: IntArray, token: int) -> int:
    others = np.flatnonzero(ids != token)
    return len(ids) - (int(others[-1]) + 1 if len(others) else 0)


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
    tokenizer: Any, example: Example, ends: Sequence[int], chat: ChatConfig = _PLAIN
) -> tuple[IntArray | None, IntArray]:
    """(prompt ids or ``None``, answer ids) of one example."""
    prompt = encode_prompt(tokenizer, example.prompt if example.prompt is not None else "", chat)
    answer = encode_completion(tokenizer, example, prompt, ends, chat)
    return (None if example.prompt is None else prompt), answer

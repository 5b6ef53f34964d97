"""What a pack's prompts take along into the chat template: a system prompt, variables, tools."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from tascade.errors import ConfigError
from tascade.util.fields import shown, typed

_TAKEN = frozenset(
    {
        "self",
        "messages",
        "conversation",
        "conversations",
        "tools",
        "chat_template",
        "add_generation_prompt",
        "continue_final_message",
        "tokenize",
        "tokenizer_kwargs",
        "padding",
        "truncation",
        "max_length",
        "return_tensors",
        "return_dict",
        "return_assistant_tokens_mask",
    }
)
"""Names that are not a template's own: arguments of Transformers' functions that apply it."""
_DEEPEST = 32


@dataclass(frozen=True, slots=True)
class ChatConfig:
    """How prompts go through the tokenizer's chat template, in every use of a pack.

    ``system``: the system message of prompts that bring none; ``options``: variables of the
    template, such as ``enable_thinking: false``; ``tools``: JSON schemas of the functions that the
    model may call. Values are such as JSON has.
    """

    system: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    tools: tuple[dict[str, Any], ...] = ()

    def __post_init__(self) -> None:
        for name, kinds, wanted in (
            ("system", str, "text"),
            ("options", dict, "a mapping of the template's variables"),
            ("tools", (list, tuple), "a list of mappings"),
        ):
            if not isinstance(getattr(self, name), kinds):
                raise _wrong(getattr(self, name), wanted, f"chat.{name}")
        for i, tool in enumerate(self.tools):
            if not isinstance(tool, dict):
                raise _wrong(tool, "a mapping", f"chat.tools[{i}]")
        for name in self.options:
            if not isinstance(name, str) or not name.isidentifier() or name in _TAKEN:
                fix = "tools have a key of their own, beside options" if name == "tools" else ""
                raise ConfigError(
                    f"{name!r:.80} is no variable of a chat template",
                    got=f"{name!r:.80}",
                    wanted="a name such as enable_thinking",
                    where="chat.options",
                    fix=fix,
                )
        _check_plain(self.system, "chat.system")
        _check_plain(self.options, "chat.options")
        object.__setattr__(self, "tools", tuple(self.tools))  # JSON and YAML have lists alone
        _check_plain(self.tools, "chat.tools")

    def __bool__(self) -> bool:
        """Whether it adds anything."""
        return bool(self.system or self.options or self.tools)

    @property
    def kwargs(self) -> dict[str, Any]:
        """The template's variables, with the tools as one of them where there are any."""
        return {**self.options, **({"tools": list(self.tools)} if self.tools else {})}

    def over(self, kwargs: Mapping[str, Any]) -> ChatConfig:
        """With other variables laid over these, one by one; ``tools`` may be among them.

        Raises:
            ConfigError: a name that is not a template's, or a value that JSON does not have.
        """
        options = {**self.options, **kwargs}
        return replace(self, options=options, tools=options.pop("tools", self.tools))

    def given(self, system: str, kwargs: str | Mapping[str, Any]) -> ChatConfig:
        """With what was given to a command or a call laid over; what is empty changes nothing.

        Args:
            system: a system message.
            kwargs: variables of the template, and tools; as text a JSON object.

        Raises:
            ConfigError: ``kwargs`` is neither, or see :meth:`over`.
        """
        found: Any = kwargs or {}
        if isinstance(found, str):
            try:
                found = json.loads(found)
            except (ValueError, RecursionError) as error:
                raise ConfigError(
                    "not valid JSON", got=error, wanted="an object", where="--chat-template-kwargs"
                ) from error
        if not isinstance(found, Mapping):
            raise _wrong(found, "a JSON object", "--chat-template-kwargs")
        return replace(self.over(found), system=system or self.system)


def _check_plain(value: object, where: str, depth: int = 0) -> None:
    """Refuse what JSON has no word for: it could not be kept in a pack, or sent to an engine."""
    if depth > _DEEPEST:
        raise ConfigError("nested too deeply", wanted=f"at most {_DEEPEST} levels", where=where)
    if isinstance(value, dict):
        for key, part in value.items():
            if not isinstance(key, str):
                raise _wrong(key, "names that are text", where)
            _check_plain(part, f"{where}.{key:.80}", depth + 1)
    elif isinstance(value, list | tuple):
        for i, part in enumerate(value):
            _check_plain(part, f"{where}[{i}]", depth + 1)
    elif isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ConfigError(
                "not text", got=error.reason, wanted="Unicode", where=where
            ) from error
    elif isinstance(value, int | float) and not isinstance(value, bool):
        typed(type(value), value, where)
    elif value is not None and not isinstance(value, bool):
        raise _wrong(value, "text, numbers, true, false, null, lists and mappings", where)


def _wrong(value: object, wanted: str, where: str) -> ConfigError:
    return ConfigError("a value of the wrong type", got=shown(value), wanted=wanted, where=where)

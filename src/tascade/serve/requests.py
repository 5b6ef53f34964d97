"""What clients may ask: OpenAI's fields, and a clear refusal of what this server cannot do.

A field that is null is absent. A field of :data:`NEUTRAL` is taken where it asks nothing, and
refused by its name where it asks for something; any other is unknown.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from tascade.serve.failures import APIError

Number = Annotated[float, Field(allow_inf_nan=False)]
Stop = Annotated[str, Field(min_length=1, max_length=256)]
TokenId = Annotated[int, Field(ge=0, lt=2**31, strict=True)]

_ANYTHING = object()
NEUTRAL: dict[str, tuple[Any, ...]] = {
    # OpenAI's
    "user": (_ANYTHING,),
    "metadata": (_ANYTHING,),
    "safety_identifier": (_ANYTHING,),
    "prompt_cache_key": (_ANYTHING,),
    "prompt_cache_retention": (_ANYTHING,),
    "prompt_cache_options": (_ANYTHING,),
    "service_tier": (_ANYTHING,),
    "parallel_tool_calls": (_ANYTHING,),
    "store": (False,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "moderation": (),
    "best_of": (1,),
    "suffix": ("",),
    "echo": (False,),
    # vLLM's
    "spaces_between_special_tokens": (True,),
    "min_tokens": (0,),
    "ignore_eos": (False,),
    "length_penalty": (1,),
    "stop_token_ids": ([],),
    "include_stop_str_in_output": (False,),
    "use_beam_search": (False,),
    "bad_words": ([],),
    "allowed_token_ids": ([],),
    "prompt_logprobs": (0,),
    "truncate_prompt_tokens": (),
    "structured_outputs": (),
    "priority": (0,),
    "request_id": (_ANYTHING,),
    "return_tokens_as_token_ids": (False,),
}
"""Fields that this server knows and does nothing about: the values at which they ask nothing."""
INSTEAD = {
    "presence_penalty": "use repetition_penalty",
    "frequency_penalty": "use repetition_penalty",
    "best_of": "ask for n answers",
}


def unsupported(param: str) -> APIError:
    """A field this server knows and cannot honour."""
    message, instead = f"{param} is not supported by this server", INSTEAD.get(param)
    return APIError(
        400, f"{message}; {instead}" if instead else message, param=param, code="unsupported"
    )


def _without_neutral(given: Any) -> Any:
    if not isinstance(given, Mapping):
        return given
    found = {}
    for name, value in given.items():
        if value is None:
            continue
        if name not in NEUTRAL:
            found[name] = value
        elif not any(n is _ANYTHING or _same(value, n) for n in NEUTRAL[name]):
            raise unsupported(name)
    return found


def _same(value: object, neutral: object) -> bool:
    numbers = (int, float)
    if isinstance(neutral, bool) or isinstance(value, bool):
        return value is neutral
    if isinstance(neutral, numbers):
        return isinstance(value, numbers) and value == neutral
    return type(value) is type(neutral) and value == neutral


class _StreamOptions(BaseModel):
    """How a stream is told. Padding against eavesdroppers is not done, whatever is asked."""

    model_config = ConfigDict(extra="forbid")

    include_usage: bool = False
    include_obfuscation: bool = False

    @model_validator(mode="before")
    @classmethod
    def _nulls(cls, given: Any) -> Any:
        return _without_neutral(given)


class _JSONSchema(BaseModel):
    """A schema with its name; it is held to, whether ``strict`` says so or not."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: str = ""
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(BaseModel):
    """What form an answer has: any, a JSON object, or one of a schema."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text", "json_object", "json_schema"]
    json_schema: _JSONSchema | None = None

    @model_validator(mode="after")
    def _schema_where_it_is_named(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema goes with type json_schema, and the other way round")
        return self

    @property
    def schema_of_answer(self) -> dict[str, Any] | None:
        """The JSON schema that an answer is held to; ``None`` for none."""
        if self.type == "json_object":
            return {"type": "object"}
        return None if self.json_schema is None else self.json_schema.schema_


class _Options(BaseModel):
    """Fields that both kinds of request share."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str | None = None
    stream: bool = False
    stream_options: _StreamOptions | None = None
    n: int = Field(1, ge=1, le=1024)
    temperature: Annotated[Number, Field(ge=0, le=100)] = 1.0
    top_p: Annotated[Number, Field(gt=0, le=1)] = 1.0
    top_k: int = Field(0, ge=-1, lt=2**31)
    min_p: Annotated[Number, Field(ge=0, lt=1)] = 0.0
    repetition_penalty: Annotated[Number, Field(gt=0, le=100)] = 1.0
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    skip_special_tokens: bool = True
    response_format: ResponseFormat | None = None

    @model_validator(mode="before")
    @classmethod
    def _neutral(cls, given: Any) -> Any:
        return _without_neutral(given)

    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def refuse(self) -> None:
        """Refuse what is known but cannot be done here.

        Raises:
            APIError: naming the field.
        """
        if self.stream_options and not self.stream:
            raise APIError(400, "stream_options needs stream", param="stream_options")


class CompletionRequest(_Options):
    """Body of ``/v1/completions``."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=64)]
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[
            list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1, max_length=64)
        ]
    )
    max_tokens: int | None = Field(None, ge=1, lt=2**31)
    logprobs: int | None = Field(None, ge=0, le=20)

    def prompts(self) -> list[str | list[int]]:
        """The prompts, each a text or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return list(self.prompt)  # type: ignore[arg-type]


def default_temperature() -> float:
    """The temperature of a request that gives none: OpenAI's, at which tokens are drawn."""
    return float(_Options.model_fields["temperature"].default)


class TextPart(BaseModel):
    """A part of a message: text is all this server reads, and what a model refused to say."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["text", "refusal"]
    text: str = ""
    refusal: str = ""


_OF_ANSWERS = ("refusal", "tool_calls", "function_call", "audio", "annotations")
"""What servers put into an assistant's message, and clients send back."""


class Message(BaseModel):
    """One message of a chat: a client's, or a server's sent back."""

    model_config = ConfigDict(extra="forbid")

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _sent_back(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        found = {name: value for name, value in given.items() if value is not None}
        if found.get("role") in ("tool", "function"):
            raise unsupported("messages of role tool")
        if found.get("role") == "assistant":
            for name in _OF_ANSWERS:
                value = found.pop(name, None)
                if name == "refusal" and "content" not in found:
                    found["content"] = value
                elif value and name not in ("refusal", "annotations"):
                    raise unsupported(f"messages.{name}")
            if found.get("content") is None:
                found["content"] = ""
        return found

    def plain(self) -> dict[str, str]:
        """As the chat template takes it."""
        role = "system" if self.role == "developer" else self.role
        if isinstance(self.content, str):
            return {"role": role, "content": self.content}
        return {"role": role, "content": "".join(p.text or p.refusal for p in self.content)}


class ChatRequest(_Options):
    """Body of ``/v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=1024)]
    max_tokens: int | None = Field(None, ge=1, lt=2**31)
    max_completion_tokens: int | None = Field(None, ge=1, lt=2**31)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    chat_template_kwargs: dict[str, Any] | None = None
    continue_final_message: bool = False
    add_generation_prompt: bool | None = None

    def refuse(self) -> None:
        """See :class:`_Options`."""
        super().refuse()
        # As in vLLM, where one of the two is asked for.
        if self.add_generation_prompt is self.continue_final_message:
            what = "cannot be asked for together with" if self.continue_final_message else "or"
            message = f"add_generation_prompt {what} continue_final_message"
            message += "" if self.continue_final_message else " must be true"
            raise APIError(400, message, param="add_generation_prompt")
        if self.top_logprobs and not self.logprobs:
            raise APIError(400, "top_logprobs needs logprobs", param="top_logprobs")

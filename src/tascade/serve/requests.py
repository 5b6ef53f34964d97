"""What clients may ask: OpenAI's fields, and a clear refusal of what this server cannot do."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Number = Annotated[float, Field(allow_inf_nan=False)]
Stop = Annotated[str, Field(min_length=1, max_length=256)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]


class Refusal(Exception):
    """A request that is not answered: HTTP ``status``, and what the client is told."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after = retry_after

    @property
    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = kinds.get(
            self.status, "invalid_request_error" if self.status < 500 else "server_error"
        )
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    @property
    def headers(self) -> dict[str, str]:
        """Extra headers of the answer."""
        return {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}


class _Options(BaseModel):
    """Fields that both kinds of request share."""

    model_config = ConfigDict(extra="forbid", strict=False)

    model: str | None = None
    stream: bool = False
    stream_options: dict[str, bool] | None = None
    n: int = Field(1, ge=1, le=1024)
    temperature: Annotated[Number, Field(ge=0, le=100)] = 1.0
    top_p: Annotated[Number, Field(gt=0, le=1)] = 1.0
    top_k: int = Field(0, ge=-1, lt=2**31)
    min_p: Annotated[Number, Field(ge=0, lt=1)] = 0.0
    repetition_penalty: Annotated[Number, Field(gt=0, le=100)] = 1.0
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None
    presence_penalty: Number = 0.0
    frequency_penalty: Number = 0.0
    logit_bias: dict[str, Number] | None = None

    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def refuse(self) -> None:
        """Refuse what is known but cannot be done here.

        Raises:
            Refusal: naming the field.
        """
        for name in ("presence_penalty", "frequency_penalty"):
            if getattr(self, name):
                raise unsupported(name, "use repetition_penalty")
        if self.logit_bias:
            raise unsupported("logit_bias")
        if self.stream_options and not self.stream:
            raise Refusal(400, "stream_options needs stream", param="stream_options")
        for option in self.stream_options or {}:
            if option not in ("include_usage", "include_obfuscation"):
                raise unsupported(f"stream_options.{option}")


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
    max_tokens: int = Field(16, ge=1, lt=2**31)
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool = False
    best_of: int | None = None
    suffix: str | None = None

    def prompts(self) -> list[str | list[int]]:
        """The prompts, each a text or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return list(self.prompt)  # type: ignore[arg-type]

    def refuse(self) -> None:
        """See :class:`_Options`."""
        super().refuse()
        if self.best_of not in (None, 1):
            raise unsupported("best_of", "ask for n answers")
        if self.suffix:
            raise unsupported("suffix")
        if self.echo:
            raise unsupported("echo")


class TextPart(BaseModel):
    """A part of a message: text is all this server reads."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One message of a chat."""

    model_config = ConfigDict(extra="forbid")

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    def plain(self) -> dict[str, str]:
        """As the chat template takes it."""
        role = "system" if self.role == "developer" else self.role
        if isinstance(self.content, str):
            return {"role": role, "content": self.content}
        return {"role": role, "content": "".join(part.text for part in self.content)}


class ChatRequest(_Options):
    """Body of ``/v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=1024)]
    max_tokens: int | None = Field(None, ge=1, lt=2**31)
    max_completion_tokens: int | None = Field(None, ge=1, lt=2**31)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: dict[str, Any] | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    chat_template_kwargs: dict[str, Any] | None = None

    def refuse(self) -> None:
        """See :class:`_Options`."""
        super().refuse()
        if self.response_format and self.response_format.get("type") != "text":
            raise unsupported("response_format", "serve the pack in vLLM for JSON schemas")
        if self.tools:
            raise unsupported("tools")
        if self.tool_choice not in (None, "none"):
            raise unsupported("tool_choice")
        if self.top_logprobs and not self.logprobs:
            raise Refusal(400, "top_logprobs needs logprobs", param="top_logprobs")


def unsupported(param: str, instead: str = "") -> Refusal:
    """A field this server knows and cannot honour."""
    message = f"{param} is not supported by this server"
    return Refusal(
        400, f"{message}; {instead}" if instead else message, param=param, code="unsupported"
    )

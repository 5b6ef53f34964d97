"""The HTTP side: routes, error shapes, streams, logs."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from tascade.core import Generation
from tascade.serve.engine import Delta, Engine
from tascade.serve.failures import APIError
from tascade.serve.limits import Limits
from tascade.serve.logprobs import AnswerLogprobs, TokenBytes
from tascade.serve.requests import ChatRequest, CompletionRequest
from tascade.serve.turns import ClientRequest, encoded


class ResponseBuilder:
    """Builds the objects of one reply: of a chat or of a completion, whole or in chunks.

    Args:
        kind: ``chat`` or ``completion``.
        model: its name.
        body: what was asked.
        names: of the tokens.
    """

    def __init__(
        self, kind: str, model: str, body: ChatRequest | CompletionRequest, names: TokenBytes
    ) -> None:
        self.chat, self.model, self.body, self._names = kind == "chat", model, body, names
        self.id = ("chatcmpl-" if self.chat else "cmpl-") + uuid.uuid4().hex
        self.created = int(time.time())
        chunks = body.stream_options is not None and body.stream_options.include_usage
        self._usage: dict[str, Any] = {"usage": None} if chunks else {}
        self._said: dict[int, tuple[AnswerLogprobs, int]] = {}

    def _logprobs(self, index: int, piece: Delta) -> dict[str, Any] | None:
        """Of an answer's tokens so far, those whose text has come and that were not told yet."""
        if isinstance(self.body, ChatRequest):
            asked, most = self.body.logprobs, self.body.top_logprobs or 0
        else:
            asked, most = self.body.logprobs is not None, self.body.logprobs or 0
        if not asked:
            return None
        fresh = AnswerLogprobs(self._names, self.chat, most), 0
        said, length = self._said.get(index, fresh)
        said.add(piece.logprobs)
        length = length + len(piece.text) if piece.result is None else len(piece.result.text)
        self._said[index] = said, length
        return said.upto(length)

    def _envelope(self, kind: str, choices: list[Any]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }

    def whole(self, results: Sequence[Generation]) -> dict[str, Any]:
        """A reply that is not streamed."""
        choices = []
        for i, result in enumerate(results):
            said = self._logprobs(i, Delta(logprobs=tuple(result.logprobs), result=result))
            choice = {"index": i, "logprobs": said, "finish_reason": result.finish_reason}
            if self.chat:
                choice["message"] = {"role": "assistant", "content": result.text, "refusal": None}
            else:
                choice["text"] = result.text
            choices.append(choice)
        kind = "chat.completion" if self.chat else "text_completion"
        return self._envelope(kind, choices) | {"usage": usage(results, self.body.n)}

    def chunk(self, index: int, piece: Delta, *, first: bool = False) -> dict[str, Any]:
        """A part of a streamed reply."""
        said = self._logprobs(index, piece)
        reason = None if piece.result is None else piece.result.finish_reason
        choice: dict[str, Any] = {"index": index, "logprobs": said, "finish_reason": reason}
        if not self.chat:
            return self._envelope("text_completion", [choice | {"text": piece.text}]) | self._usage
        delta: dict[str, Any] = {"role": "assistant"} if first else {}
        if piece.text or first:
            delta["content"] = piece.text
        whole = self._envelope("chat.completion.chunk", [choice | {"delta": delta}])
        return whole | self._usage

    def last(self, results: Sequence[Generation]) -> dict[str, Any]:
        """The chunk that only tells the usage."""
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return self._envelope(kind, []) | {"usage": usage(results, self.body.n)}


def usage(results: Sequence[Generation], each: int) -> dict[str, int]:
    """Token counts: a prompt counts once, however many answers it was asked for."""
    read = sum(result.prompt_tokens for result in results[::each])
    said = sum(len(result.tokens) for result in results)
    return {"prompt_tokens": read, "completion_tokens": said, "total_tokens": read + said}


_POLL = 0.25
_HEALTH: dict[int | str, dict[str, Any]] = {503: {"description": "Warming up."}}
_ERRORS: dict[int | str, dict[str, Any]] = {
    code: {"description": text}
    for code, text in (
        (400, "The request cannot be answered as it stands."),
        (401, "Wrong or missing API key."),
        (413, "The body is too long."),
        (429, "Too many requests are waiting."),
        (503, "The server is stopping."),
        (504, "The request took too long."),
    )
}


def create_app(engine: Engine) -> FastAPI:
    """The server's ASGI application around a running engine."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        engine.stop()
        await asyncio.to_thread(engine.join, engine.settings.grace + 5.0)

    app = FastAPI(title="tascade", lifespan=lifespan, docs_url=None, redoc_url=None)
    _add_errors(app)
    _add_service_routes(app, engine)

    @app.post("/v1/completions", responses=_ERRORS, response_model=None)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        return await answer(engine, "completion", body, request)

    @app.post("/v1/chat/completions", responses=_ERRORS, response_model=None)
    async def chat(body: ChatRequest, request: Request) -> Response:
        return await answer(engine, "chat", body, request)

    app.add_middleware(Limits, engine=engine)
    if engine.settings.cors_origins:  # before the key: a browser's first question brings none
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(engine.settings.cors_origins),
            allow_methods=["*"],
            allow_headers=["*"],
        )
    return app


def _add_service_routes(app: FastAPI, engine: Engine) -> None:
    reads = ["GET", "HEAD"]

    @app.api_route("/health", methods=reads, response_model=None, responses=_HEALTH)
    async def health() -> Response:
        if engine.fault is not None:
            return JSONResponse({"status": "failed to start"}, 500)
        ready = engine.ready.is_set()
        return JSONResponse({"status": "ok" if ready else "warming up"}, 200 if ready else 503)

    @app.api_route("/metrics", methods=reads, response_model=None)
    async def metrics() -> Response:
        return Response(engine.metrics.text(), media_type="text/plain; version=0.0.4")

    about = {"object": "model", "created": 0, "owned_by": "tascade"}
    served = [{"id": name, **about} for name in engine.settings.names]

    @app.api_route("/v1/models", methods=reads, response_model=None)
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": served})

    @app.api_route("/v1/models/{name:path}", methods=reads, response_model=None)
    async def model(name: str) -> Response:
        _check_name(engine, name)
        return JSONResponse({"id": name, **about})


def _check_name(engine: Engine, name: str) -> None:
    if name not in engine.settings.names:
        there = " and ".join(map(repr, engine.settings.names))
        raise APIError(
            404,
            f"there is no model {name[:200]!r} here; there is {there}",
            param="model",
            code="model_not_found",
        )


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(APIError)
    async def refused(_: Request, error: APIError) -> Response:
        return JSONResponse(error.body, error.status, error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        where, said = _complaint(error.errors())
        found = APIError(400, f"{where}: {said}", param=where, code="invalid_value")
        return JSONResponse(found.body, 400)

    @app.exception_handler(HTTPException)
    async def other(_: Request, error: HTTPException) -> Response:
        found = APIError(error.status_code, str(error.detail))
        return JSONResponse(found.body, error.status_code, dict(error.headers or {}))


def _complaint(errors: Sequence[Any]) -> tuple[str, str]:
    """The field that is wrong, and why, without its value: that may be somebody's prompt.

    Where a field takes several types, each complains of its own: the one that the value has says
    which limit it is beyond, the others only that they are others.
    """
    types = ("_type", "_parsing")
    told = next((e for e in errors if not e["type"].endswith(types)), errors[0])
    if told["type"] == "json_invalid":
        return "body", f"no JSON: {told['ctx']['error']} (character {told['loc'][-1]})"
    path = [str(part) for part in told["loc"][1:]]
    # The names of a field's types, such as list[str], stand in the path as well.
    steps = [part for part in path[1:] if part.isdigit() or (part.isidentifier() and part != "str")]
    return ".".join([*path[:1], *steps]) or "body", str(told["msg"])


async def answer(
    engine: Engine, kind: str, body: ChatRequest | CompletionRequest, request: Request
) -> Response:
    """Answer a request, whole or as a stream.

    Raises:
        APIError: see :class:`tascade.serve.turns.ClientRequest`.
    """
    body.refuse()
    if body.model is not None:
        _check_name(engine, body.model)
    prompts = await asyncio.to_thread(encoded, engine, body)  # long ones take a while
    turn = ClientRequest(engine, body, prompts)
    shape = ResponseBuilder(kind, engine.settings.name, body, engine.token_bytes)
    if body.stream:
        return _Events(turn, shape)
    await _until_done(turn, request)
    return JSONResponse(shape.whole(turn.done()))


class _Events(StreamingResponse):
    """A stream that gives its jobs up however it ends, begun or not."""

    def __init__(self, turn: ClientRequest, shape: ResponseBuilder) -> None:
        super().__init__(_stream(turn, shape), media_type="text/event-stream")
        self._turn = turn

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._turn.give_up()


async def _until_done(turn: ClientRequest, request: Request) -> None:
    """Wait for the answers, or for the client to go away."""

    async def wait() -> None:
        async for _ in turn.pieces():
            pass

    task = asyncio.ensure_future(wait())
    try:
        while not task.done():
            await asyncio.wait({task}, timeout=_POLL)
            if not task.done() and await request.is_disconnected():
                raise APIError(499, "the client has gone")
        task.result()
    finally:
        turn.give_up()
        task.cancel()


async def _stream(turn: ClientRequest, shape: ResponseBuilder) -> AsyncIterator[str]:
    """Server-sent events; a failure is told as an event too, and the stream always ends."""
    body = turn.request
    begun: set[int] = set()
    try:
        async for number, piece in turn.pieces():
            if piece.result is not None:
                yield _event(shape.chunk(number, piece))
            elif piece.text or piece.logprobs or number not in begun:
                first = number not in begun
                begun.add(number)
                yield _event(shape.chunk(number, piece, first=first))
        if body.stream_options is not None and body.stream_options.include_usage:
            yield _event(shape.last(turn.done()))
    except APIError as refusal:
        yield _event(refusal.body)
    finally:
        turn.give_up()
    yield "data: [DONE]\n\n"


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body)}\n\n"

"""The HTTP side: routes, error shapes, streams, logs."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from tascade.serve.engine import Engine
from tascade.serve.limits import Gate
from tascade.serve.replies import Shape
from tascade.serve.requests import ChatRequest, CompletionRequest, Refusal
from tascade.serve.turns import Turn, encoded, token_text

_POLL = 0.25
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

    app.add_middleware(Gate, engine=engine)
    return app


def _add_service_routes(app: FastAPI, engine: Engine) -> None:
    @app.get("/health", response_model=None, responses={503: {"description": "Warming up."}})
    async def health() -> Response:
        if engine.fault is not None:
            return JSONResponse({"status": "failed to start"}, 500)
        ready = engine.ready.is_set()
        return JSONResponse({"status": "ok" if ready else "warming up"}, 200 if ready else 503)

    @app.get("/metrics", response_model=None)
    async def metrics() -> Response:
        return Response(engine.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models", response_model=None)
    async def models() -> Response:
        model = {"id": engine.settings.name, "object": "model", "created": 0, "owned_by": "tascade"}
        return JSONResponse({"object": "list", "data": [model]})


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(Refusal)
    async def refused(_: Request, error: Refusal) -> Response:
        return JSONResponse(error.body, error.status, error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        where, said = _complaint(error.errors())
        found = Refusal(400, f"{where}: {said}", param=where, code="invalid_value")
        return JSONResponse(found.body, 400)

    @app.exception_handler(HTTPException)
    async def other(_: Request, error: HTTPException) -> Response:
        found = Refusal(error.status_code, str(error.detail))
        return JSONResponse(found.body, error.status_code, dict(error.headers or {}))


def _complaint(errors: Sequence[Any]) -> tuple[str, str]:
    """The field that is wrong, and why, without its value: that may be somebody's prompt.

    Where a field takes several types, each complains of its own: the one that the value has says
    which limit it is beyond, the others only that they are others.
    """
    types = ("_type", "_parsing")
    told = next((e for e in errors if not e["type"].endswith(types)), errors[0])
    path = [str(part) for part in told["loc"][1:]]
    # The names of a field's types, such as list[str], stand in the path as well.
    steps = [part for part in path[1:] if part.isdigit() or (part.isidentifier() and part != "str")]
    return ".".join([*path[:1], *steps]) or "body", str(told["msg"])


async def answer(
    engine: Engine, kind: str, body: ChatRequest | CompletionRequest, request: Request
) -> Response:
    """Answer a request, whole or as a stream.

    Raises:
        Refusal: see :class:`tascade.serve.turns.Turn`.
    """
    body.refuse()
    if body.model is not None and body.model != engine.settings.name:
        raise Refusal(
            404,
            f"there is no model {body.model[:200]!r} here; there is {engine.settings.name!r}",
            param="model",
            code="model_not_found",
        )
    prompts = await asyncio.to_thread(encoded, engine, body)  # long ones take a while
    turn = Turn(engine, body, prompts)
    shape = Shape(kind, engine.settings.name, token_text(engine.model.tokenizer))
    if body.stream:
        return _Events(turn, shape)
    await _until_done(turn, request)
    asked = bool(body.logprobs) if kind == "chat" else body.logprobs is not None
    return JSONResponse(shape.whole(turn.done(), asked, body.n))


class _Events(StreamingResponse):
    """A stream that gives its jobs up however it ends, begun or not."""

    def __init__(self, turn: Turn, shape: Shape) -> None:
        super().__init__(_stream(turn, shape), media_type="text/event-stream")
        self._turn = turn

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._turn.give_up()


async def _until_done(turn: Turn, request: Request) -> None:
    """Wait for the answers, or for the client to go away."""

    async def wait() -> None:
        async for _ in turn.pieces():
            pass

    task = asyncio.ensure_future(wait())
    try:
        while not task.done():
            await asyncio.wait({task}, timeout=_POLL)
            if not task.done() and await request.is_disconnected():
                raise Refusal(499, "the client has gone")
        task.result()
    finally:
        turn.give_up()
        task.cancel()


async def _stream(turn: Turn, shape: Shape) -> AsyncIterator[str]:
    """Server-sent events; a failure is told as an event too, and the stream always ends."""
    body = turn.request
    begun: set[int] = set()
    try:
        async for number, piece in turn.pieces():
            if piece.result is not None:
                reason = piece.result.finish_reason
                yield _event(shape.chunk(number, "", reason=reason))
            elif piece.text or piece.logprobs or number not in begun:
                first = number not in begun
                begun.add(number)
                yield _event(shape.chunk(number, piece.text, piece.logprobs, first=first))
        if (body.stream_options or {}).get("include_usage"):
            yield _event(shape.last(turn.done(), body.n))
    except Refusal as refusal:
        yield _event(refusal.body)
    finally:
        turn.give_up()
    yield "data: [DONE]\n\n"


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body)}\n\n"

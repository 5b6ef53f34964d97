"""What stands before the routes: the API key, the size of a body, the count and the log."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from tascade.serve.engine import Engine
from tascade.serve.failures import APIError

_log = logging.getLogger("tascade.serve.access")

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

_OPEN = ("/health",)


class Limits:
    """ASGI middleware: refuses a wrong key at once, and a body as soon as it is too long.

    Counts and logs every request: its path, status and time, never its content.
    """

    def __init__(self, app: App, engine: Engine) -> None:
        self.app, self.engine, self.settings = app, engine, engine.settings

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Let a request through, or answer it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begun, status = time.perf_counter(), 499

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._pass(scope, receive, watched)
        finally:
            self._note(scope, status, time.perf_counter() - begun)

    async def _pass(self, scope: Message, receive: Receive, send: Send) -> None:
        try:
            self._check_key(scope)
            body, ended = await self._read(scope, receive)
        except APIError as refusal:
            await _refuse(refusal, send)
            return
        if ended:
            return
        sent = False

        async def replay() -> Message:
            nonlocal sent
            if sent:
                return await receive()
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app(scope, replay, send)

    def _note(self, scope: Message, status: int, seconds: float) -> None:
        path = getattr(scope.get("route"), "path", "other")
        self.engine.metrics.requests.labels(path, str(status)).inc()
        line = {
            "path": path,
            "method": scope["method"],
            "status": status,
            "ms": round(seconds * 1e3, 1),
            "queue": self.engine.waiting,
        }
        _log.info(json.dumps(line))

    def _check_key(self, scope: Message) -> None:
        if not self.settings.api_key or scope["path"] in _OPEN:
            return
        given = dict(scope["headers"]).get(b"authorization", b"")
        scheme, _, key = given.partition(b" ")
        right = hmac.compare_digest(key.strip(), self.settings.api_key.encode())
        if scheme.lower() != b"bearer" or not right:
            raise APIError(401, "wrong or missing API key", code="invalid_api_key")

    async def _read(self, scope: Message, receive: Receive) -> tuple[bytes, bool]:
        if scope["method"] in ("GET", "HEAD", "OPTIONS"):
            return b"", False
        told = dict(scope["headers"]).get(b"content-length", b"0")
        if told.isdigit() and (len(told) >= 18 or int(told) > self.settings.max_body):
            raise self._too_long()
        parts, size, more = [], 0, True
        while more:
            message = await self._next(receive)
            if message["type"] == "http.disconnect":
                return b"", True
            part = message.get("body", b"")
            size += len(part)
            if size > self.settings.max_body:
                raise self._too_long()
            parts.append(part)
            more = message.get("more_body", False)
        return b"".join(parts), False

    async def _next(self, receive: Receive) -> Message:
        try:
            return await asyncio.wait_for(receive(), self.settings.timeout)
        except TimeoutError:
            raise APIError(408, "the body did not come", code="timeout") from None

    def _too_long(self) -> APIError:
        return APIError(
            413, f"the body is longer than {self.settings.max_body} bytes", code="too_large"
        )


async def _refuse(refusal: APIError, send: Send) -> None:
    body = json.dumps(refusal.body).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    headers += [(name.lower().encode(), text.encode()) for name, text in refusal.headers.items()]
    if refusal.status in (401, 413):
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})

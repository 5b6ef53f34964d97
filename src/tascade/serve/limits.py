"""What stands before the routes: the API key and the size of a body."""

from __future__ import annotations

import hmac
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from tascade.serve.failures import Refusal
from tascade.serve.settings import Settings

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

_OPEN = ("/health",)


class Gate:
    """ASGI middleware: refuses a wrong key at once, and a body as soon as it is too long."""

    def __init__(self, app: App, settings: Settings) -> None:
        self.app, self.settings = app, settings

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Let a request through, or answer it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            self._check_key(scope)
            body, ended = await self._read(scope, receive)
        except Refusal as refusal:
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

    def _check_key(self, scope: Message) -> None:
        if not self.settings.api_key or scope["path"] in _OPEN:
            return
        given = dict(scope["headers"]).get(b"authorization", b"")
        wanted = b"Bearer " + self.settings.api_key.encode()
        if not hmac.compare_digest(given, wanted):
            raise Refusal(401, "wrong or missing API key", code="invalid_api_key")

    async def _read(self, scope: Message, receive: Receive) -> tuple[bytes, bool]:
        if scope["method"] in ("GET", "HEAD", "OPTIONS"):
            return b"", False
        parts, size, more = [], 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return b"", True
            part = message.get("body", b"")
            size += len(part)
            if size > self.settings.max_body:
                raise Refusal(
                    413, f"the body is longer than {self.settings.max_body} bytes", code="too_large"
                )
            parts.append(part)
            more = message.get("more_body", False)
        return b"".join(parts), False


async def _refuse(refusal: Refusal, send: Send) -> None:
    body = json.dumps(refusal.body).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    if refusal.status in (401, 413):
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})

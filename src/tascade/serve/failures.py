"""Refusals in the shape that clients of OpenAI's API expect."""

from __future__ import annotations

from typing import Any

_LONGEST = 400


class APIError(Exception):
    """A request that is not answered: HTTP ``status``, and what the client is told.

    What a client sent may stand in a message: it is cut, and what is no text is escaped.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        self.status, self.message, self.code = status, _shown(message), code
        self.param = None if param is None else _shown(param)
        super().__init__(self.message)
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
        found = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        if self.status == 401:
            found["WWW-Authenticate"] = "Bearer"
        return found


def _shown(text: str) -> str:
    cut = text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."
    return cut.encode("utf-8", "backslashreplace").decode()

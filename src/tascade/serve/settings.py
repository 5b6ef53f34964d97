"""What the built-in server is told: where it listens, what it lets through."""

from __future__ import annotations

from dataclasses import dataclass

from tascade.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Settings:
    """Limits and addresses of the built-in server.

    ``name``: what the API calls the model; ``api_key``: empty for none; ``max_queue``: requests
    that may wait (one is always being answered); ``max_body``: bytes of a request's body;
    ``max_prompt``: tokens of a prompt; ``timeout``: seconds a request may take, waiting included;
    ``grace``: seconds to finish what was begun after a signal to stop.
    """

    name: str
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str = ""
    max_queue: int = 64
    max_body: int = 4 * 1024 * 1024
    max_prompt: int = 8192
    max_tokens: int = 4096
    max_n: int = 8
    timeout: float = 120.0
    grace: float = 20.0

    def __post_init__(self) -> None:
        for field in ("max_queue", "max_body", "max_prompt", "max_tokens", "max_n", "timeout"):
            if getattr(self, field) <= 0:
                raise ConfigError(
                    f"{field} is out of range", got=getattr(self, field), wanted="above 0"
                )
        if self.grace < 0:
            raise ConfigError("grace is out of range", got=self.grace, wanted="0 or more seconds")

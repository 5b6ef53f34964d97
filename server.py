"""uvicorn with a shutdown of our own: refuse, finish what runs within a grace time, exit with 0."""

from __future__ import annotations

import logging
import time
from types import FrameType

import uvicorn

from tascade.serve.app import create_app
from tascade.serve.engine import Engine
from tascade.serve.settings import Settings

_log = logging.getLogger("tascade.serve")
_FLUSH_SECONDS = 5
"""How long the last bytes of a response may take to leave, once its job has ended."""


class Server(uvicorn.Server):
    """Serves until SIGTERM or SIGINT; a second one does not wait."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self._engine, self._settings = engine, settings
        self._signals, self._until = 0, 0.0
        app = create_app(engine, settings)
        super().__init__(
            uvicorn.Config(
                app,
                host=settings.host,
                port=settings.port,
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=_FLUSH_SECONDS,
            )
        )

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Note a signal. No lock is taken here: the thread it interrupts may hold it."""
        self._signals += 1
        self._engine.draining = True

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: is it time to stop?"""
        if self._engine.fault is not None:
            self.should_exit = True
        if self._signals and not self.should_exit:
            self._drain()
        return await super().on_tick(counter)

    def _drain(self) -> None:
        now = time.monotonic()
        if not self._until:
            self._until = now + self._settings.grace
            _log.info("shutting down", extra={"facts": {"grace": self._settings.grace}})
        if self._engine.idle or now >= self._until or self._signals > 1:
            self._engine.abort()
            self.should_exit = True

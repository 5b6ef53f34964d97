"""A server in a thread, and clients of it."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from openai import OpenAI

from tascade.model import TaskModel
from tascade.serve.app import create_app
from tascade.serve.engine import Engine, Metrics, Settings


class Running:
    """An engine behind uvicorn on a free port."""

    def __init__(self, model: TaskModel, *, learner: Any = None, **settings: Any) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.settings = Settings("tickets", port=port, **settings)
        self.engine = Engine(model, self.settings, Metrics(), learner)
        config = uvicorn.Config(
            create_app(self.engine), port=port, log_level="error", timeout_graceful_shutdown=5
        )
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        assert self.engine.ready.wait(60)
        while not self.server.started:
            time.sleep(0.01)
        self.url = f"http://127.0.0.1:{port}"

    def client(self, key: str = "none") -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0)

    def count(self, name: str, **labels: str) -> float:
        return self.engine.metrics.registry.get_sample_value(name, labels) or 0.0

    def close(self) -> None:
        self.server.should_exit = True
        self.thread.join(30)
        assert not self.thread.is_alive()


@pytest.fixture(scope="session")
def model(ticket_pack: Path) -> TaskModel:
    return TaskModel.from_pretrained(ticket_pack, dtype="float32")


@pytest.fixture(scope="module")
def running(model: TaskModel) -> Iterator[Running]:
    found = Running(model)
    yield found
    found.close()


@pytest.fixture
def client(running: Running) -> Iterator[OpenAI]:
    with running.client() as found:
        yield found


@pytest.fixture(scope="session")
def prompts() -> list[str]:
    from tascade import bundled
    from tascade.data.load import load_examples

    rows = list(load_examples(bundled.data_path("tickets", "test")))[:32]
    return [str(row.prompt) for row in rows]

"""Every limit of the server: 400 where a request can never fit, 429 or 503 where it may yet."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from conftest import Running
from tascade.model import TaskModel

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def small(model: TaskModel) -> Iterator[Running]:
    limits = {"max_queue": 8, "max_n": 4, "max_body": 60_000, "max_prompt": 400, "max_tokens": 64}
    found = Running(model, **limits)
    yield found
    found.close()


def ask(server: Running, path: str, **body: Any) -> httpx.Response:
    return httpx.post(f"{server.url}{path}", json=body, timeout=60)


@pytest.mark.parametrize(
    ("path", "body", "param", "said"),
    [
        (TEXT, {"prompt": ["a"] * 9}, None, ["9 answers", "at most 8"]),
        (TEXT, {"prompt": ["a"] * 64, "n": 2}, None, ["128 answers", "at most 8"]),
        (TEXT, {"prompt": [[5]] * 3, "n": 3}, None, ["9 answers", "at most 8"]),
        (TEXT, {"prompt": ["a"] * 65}, "prompt", ["at most 64 items"]),
        (TEXT, {"prompt": [[5]] * 65}, "prompt", ["at most 64 items"]),
        (TEXT, {"prompt": [5, -1]}, "prompt.1", ["greater than or equal to 0"]),
        (TEXT, {"prompt": [5] * 401}, "prompt", ["401 tokens", "at most 400"]),
        (TEXT, {"prompt": "a", "n": 5}, "n", ["at most 4"]),
        (TEXT, {"prompt": "a", "n": 5000}, "n", ["1024"]),
        (TEXT, {"prompt": "a", "best_of": 9}, "best_of", ["not supported"]),
        (TEXT, {"prompt": "a", "logprobs": 21}, "logprobs", ["20"]),
        (TEXT, {"prompt": "a", "max_tokens": 65}, "max_tokens", ["65", "64 fit"]),
        (CHAT, {"messages": HELLO, "stop": ["x"] * 5}, "stop", ["at most 4 items"]),
        (CHAT, {"messages": HELLO, "stop": "x" * 257}, "stop", ["at most 256 characters"]),
        (CHAT, {"messages": HELLO, "stop": ["x" * 257]}, "stop.0", ["at most 256 characters"]),
        (CHAT, {"messages": HELLO, "max_tokens": 2**31}, "max_tokens", ["2147483648"]),
        (
            CHAT,
            {"messages": HELLO, "max_completion_tokens": 65},
            "max_completion_tokens",
            ["64 fit"],
        ),
        (CHAT, {"messages": HELLO, "logprobs": True, "top_logprobs": 21}, "top_logprobs", ["20"]),
        (CHAT, {"messages": HELLO * 1025}, "messages", ["at most 1024 items"]),
        (
            CHAT,
            {"messages": [{"role": "user", "content": "x " * 5000}]},
            "messages",
            ["at most 400"],
        ),
    ],
)
def test_what_can_never_fit_is_refused_for_good(
    small: Running, path: str, body: dict[str, Any], param: str | None, said: list[str]
) -> None:
    reply = ask(small, path, **body)
    error = reply.json()["error"]
    assert reply.status_code == 400, error
    assert error["param"] == param
    assert all(text in error["message"] for text in said), error["message"]
    assert "retry-after" not in reply.headers


def test_a_body_that_is_too_long_is_told_the_limit(small: Running) -> None:
    whole = ask(small, TEXT, prompt="x" * 70_000)
    parts = (b'{"prompt": "' + b"x" * 9_000 for _ in range(9))
    chunked = httpx.post(f"{small.url}{TEXT}", content=parts)
    for reply in (whole, chunked):
        assert reply.status_code == 413
        assert "60000 bytes" in reply.json()["error"]["message"]


def test_what_just_fits_is_answered(small: Running) -> None:
    reply = ask(small, TEXT, prompt=["a", "b"], n=4, max_tokens=2)
    assert reply.status_code == 200
    assert len(reply.json()["choices"]) == 8


def test_a_full_queue_asks_to_come_again(small: Running) -> None:
    replies: list[httpx.Response] = []

    def fill() -> None:
        replies.append(ask(small, TEXT, prompt=["a"] * 8, max_tokens=64, temperature=50.0))

    threads = [threading.Thread(target=fill) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # The first leaves the queue by one answer at a time: the others find it too full as yet.
    assert sorted({reply.status_code for reply in replies}) == [200, 429]
    full = next(reply for reply in replies if reply.status_code == 429)
    assert int(full.headers["retry-after"]) > 0
    assert ask(small, TEXT, prompt=["a"] * 8, max_tokens=2).status_code == 200


def test_a_server_that_stops_asks_to_come_again(model: TaskModel) -> None:
    stopping = Running(model, grace=2.0)
    stopping.engine.stop()
    time.sleep(0.05)
    reply = ask(stopping, TEXT, prompt="a", max_tokens=2)
    assert reply.status_code == 503
    assert int(reply.headers["retry-after"]) > 0
    stopping.close()


def test_a_server_that_failed_to_start_says_so(small: Running) -> None:
    small.engine.fault = RuntimeError("no such model")
    try:
        reply = ask(small, TEXT, prompt="a", max_tokens=2)
    finally:
        small.engine.fault = None
    assert reply.status_code == 500  # waiting helps nobody here
    assert "failed to start" in reply.json()["error"]["message"]
    assert "retry-after" not in reply.headers

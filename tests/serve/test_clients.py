"""Clients that people use, over the built-in server: `make test-clients` installs them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from openai import OpenAI

from conftest import Running
from tascade.model import TaskModel

TURNS = 10


@pytest.fixture(scope="module")
def served(model: TaskModel) -> Iterator[Running]:
    found = Running(model, max_tokens=64, api_key="k")
    yield found
    found.close()


@pytest.mark.parametrize("streams", [False, True])
def test_langchain(served: Running, streams: bool) -> None:
    langchain = pytest.importorskip("langchain_openai")
    chat = langchain.ChatOpenAI(
        base_url=f"{served.url}/v1", api_key="k", model="tickets", max_tokens=8, max_retries=0
    )
    messages: list[Any] = []
    for turn in range(TURNS):
        messages.append(("human", f"number {turn}"))
        if streams:
            parts = list(chat.stream(messages))
            reply = parts[0]
            for part in parts[1:]:
                reply += part
        else:
            reply = chat.invoke(messages)
        assert isinstance(reply.content, str)
        messages.append(reply)
    assert len(messages) == 2 * TURNS


@pytest.mark.parametrize("streams", [False, True])
def test_litellm(served: Running, streams: bool) -> None:
    litellm = pytest.importorskip("litellm")
    messages: list[Any] = []
    for turn in range(TURNS):
        messages.append({"role": "user", "content": f"number {turn}"})
        reply = litellm.completion(
            "openai/tickets",
            messages=messages,
            api_base=f"{served.url}/v1",
            api_key="k",
            max_tokens=8,
            stream=streams,
        )
        if streams:
            reply = litellm.stream_chunk_builder(list(reply), messages=messages)
        messages.append(reply.choices[0].message.model_dump())
    assert len(messages) == 2 * TURNS


def test_instructor(served: Running) -> None:
    instructor = pytest.importorskip("instructor")
    from pydantic import BaseModel

    class Ticket(BaseModel):
        urgent: bool

    with OpenAI(base_url=f"{served.url}/v1", api_key="k", max_retries=0) as openai:
        client = instructor.from_openai(openai, mode=instructor.Mode.JSON_SCHEMA)
        made = client.chat.completions.create(
            model="tickets",
            response_model=Ticket,
            max_retries=1,
            messages=[{"role": "user", "content": "a ticket"}],
        )
    assert isinstance(made.urgent, bool)

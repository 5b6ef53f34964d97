"""The server asks as its pack does, and as a request does where it says otherwise."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from chat_templates import TOOLS, WEATHER, text_of, tokenizer_with
from conftest import Running
from tascade.config import Recipe, SpecConfig
from tascade.data.chat import ChatConfig
from tascade.data.encode import encode_prompt
from tascade.model import TaskModel
from tascade.pipeline import adapt
from tascade.testing import tiny_model

CHAT = ChatConfig("Speak Dutch.", {"style": "brief"}, (WEATHER,))
CLOCK = {"type": "function", "function": {"name": "clock"}}
USER = {"role": "user", "content": "item 3"}


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> TaskModel:
    folder = tmp_path_factory.mktemp("served")
    tiny_model("llama", vocab_size=260).save_pretrained(folder / "model")
    tokenizer_with(TOOLS).save_pretrained(folder / "model")
    recipe = Recipe(max_new_tokens=8, chat=CHAT, spec=SpecConfig(calibration_rows=2))
    rows = [{"prompt": f"item {i}", "completion": f"number {i % 7}"} for i in range(8)]
    return adapt(folder / "model", rows, out=folder / "pack", recipe=recipe)


@pytest.fixture(scope="module")
def served(chatty: TaskModel) -> Iterator[Running]:
    found = Running(TaskModel.from_pretrained(Path(chatty.pack.path)), max_prompt=1200)
    yield found
    found.close()


@pytest.fixture
def seen(served: Running, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The prompts that the engine decodes."""
    found: list[list[int]] = []
    whole = served.engine.model.steps

    def watched(prompt: Any, *args: Any) -> Any:
        found.append(list(map(int, prompt)))
        return whole(prompt, *args)

    monkeypatch.setattr(served.engine.model, "steps", watched)
    return found


def ask(served: Running, path: str = "chat/completions", **body: Any) -> httpx.Response:
    body = {"temperature": 0, "max_tokens": 4} | body
    return httpx.post(f"{served.url}/v1/{path}", json=body, timeout=60)


def wanted(messages: Any, chat: ChatConfig) -> list[int]:
    return encode_prompt(tokenizer_with(TOOLS), messages, chat).tolist()


def test_requests_take_along_what_the_packs_prompts_do(
    served: Running, chatty: TaskModel, seen: list[list[int]]
) -> None:
    reply = ask(served, messages=[USER])
    assert reply.status_code == 200, reply.text
    assert seen == [wanted("item 3", CHAT)]
    said = chatty.run("item 3", max_new_tokens=4).text
    assert reply.json()["choices"][0]["message"]["content"] == said
    assert "Speak Dutch." in text_of(seen[0])


@pytest.mark.parametrize(
    ("messages", "kwargs", "chat"),
    [
        ([{"role": "system", "content": "Mine."}, USER], None, CHAT),
        ([{"role": "developer", "content": "Mine."}, USER], {}, CHAT),
        ([USER], {"style": "long"}, ChatConfig("Speak Dutch.", {"style": "long"}, (WEATHER,))),
        ([USER], {"tools": []}, ChatConfig("Speak Dutch.", {"style": "brief"})),
        ([USER], {"tools": [CLOCK]}, ChatConfig("Speak Dutch.", {"style": "brief"}, (CLOCK,))),
        (
            [{"role": "system", "content": ""}, USER],
            {"style": "x", "tools": []},
            ChatConfig(options={"style": "x"}),
        ),
    ],
)
def test_what_a_request_brings_wins(
    served: Running, seen: list[list[int]], messages: Any, kwargs: Any, chat: ChatConfig
) -> None:
    reply = ask(served, messages=messages, chat_template_kwargs=kwargs)
    assert reply.status_code == 200, reply.text
    plain = [m | {"role": m["role"].replace("developer", "system")} for m in messages]
    assert seen == [wanted(plain, chat)]
    assert ("Mine." in text_of(seen[0])) == (messages[0]["content"] == "Mine.")


@pytest.mark.parametrize(
    ("kwargs", "said"),
    [
        ({"stile": "long"}, "stile"),
        ({"chat_template": "{{ 7 * 7 }}"}, "chat_template"),
        ({"tokenize": False}, "tokenize"),
        ({"conversation": []}, "conversation"),
        ({"messages": []}, "messages"),
        ({"return_tensors": "pt"}, "return_tensors"),
        ({"self": 1}, "self"),
        ({"add_generation_prompt": False}, "add_generation_prompt"),
        ({"a b": 1}, "a b"),
        ({"tools": "x"}, "wrong type"),
        ({"tools": ["x"]}, "wrong type"),
        ({"tools": [{}]}, "refuses"),
        ("x", "dictionary"),
    ],
)
def test_what_no_template_takes_is_refused(
    served: Running, seen: list[list[int]], kwargs: Any, said: str
) -> None:
    reply = ask(served, messages=[USER], chat_template_kwargs=kwargs)
    error = reply.json()["error"]
    assert reply.status_code == 400
    assert error["param"] == "chat_template_kwargs"
    assert said in error["message"]
    assert seen == []


def test_deep_and_large_values_do_no_harm(served: Running) -> None:
    deep = '{"style": ' + "[" * 5000 + "]" * 5000 + "}"
    body = f'{{"messages": [{json.dumps(USER)}], "chat_template_kwargs": {deep}}}'
    reply = httpx.post(
        f"{served.url}/v1/chat/completions",
        content=body,
        headers={"content-type": "application/json"},
    )
    assert reply.status_code == 400
    reply = ask(served, messages=[USER], chat_template_kwargs={"style": "x" * 100_000})
    assert reply.status_code == 400
    assert "at most 1200" in reply.json()["error"]["message"]


def test_tools_of_a_request_are_still_not_parsed(served: Running) -> None:
    reply = ask(served, messages=[USER], tools=[CLOCK])
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == "tools"


def test_text_completions_take_nothing_along(served: Running, seen: list[list[int]]) -> None:
    assert ask(served, "completions", prompt="item 3").status_code == 200
    assert text_of(seen[0]) == "item 3"

"""The built-in server, as the official client sees it."""

from __future__ import annotations

import json
import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI

from conftest import Running
from tascade.index.traffic import TrafficLearner
from tascade.model import TaskModel


def chat(client: OpenAI, prompt: str, **options: Any) -> Any:
    messages: Any = [{"role": "user", "content": prompt}]
    return client.chat.completions.create(
        model="tickets", messages=messages, **{"temperature": 0.0} | options
    )


def streamed(chunks: Any) -> tuple[str, list[str | None], Any]:
    """(text, finish reasons, usage) of a streamed chat."""
    text, reasons, usage = "", [], None
    for chunk in chunks:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            text += choice.delta.content or ""
            reasons.append(choice.finish_reason)
    return text, reasons, usage


def test_a_chat_says_what_the_model_says(
    client: OpenAI, model: TaskModel, prompts: list[str]
) -> None:
    wanted = model.run(prompts[0])
    reply = chat(client, prompts[0])
    assert reply.choices[0].message.content == wanted.text
    assert reply.choices[0].finish_reason == wanted.finish_reason
    assert reply.usage.completion_tokens == len(wanted.tokens)
    assert reply.usage.prompt_tokens == wanted.prompt_tokens


def test_a_stream_is_the_same_text(client: OpenAI, model: TaskModel, prompts: list[str]) -> None:
    for prompt in prompts[:4]:
        options: Any = {"stream": True, "stream_options": {"include_usage": True}}
        text, reasons, usage = streamed(chat(client, prompt, **options))
        wanted = model.run(prompt)
        assert text == wanted.text
        assert reasons[-1] == wanted.finish_reason
        assert usage.completion_tokens == len(wanted.tokens)


def test_completions_take_text_and_token_ids(client: OpenAI, model: TaskModel) -> None:
    ids = model.encode("Where is my parcel?").tolist()
    wanted = model.decoder.generate(ids, model.params(max_new_tokens=12))
    one = client.completions.create(model="tickets", prompt=ids, temperature=0, max_tokens=12)
    both = client.completions.create(
        model="tickets", prompt=[ids, ids[:9]], temperature=0, max_tokens=12
    )
    assert one.choices[0].text == both.choices[0].text == wanted.text
    assert [choice.index for choice in both.choices] == [0, 1]
    text = client.completions.create(model="tickets", prompt="Hello", max_tokens=3, temperature=0)
    assert text.usage is not None
    assert text.usage.completion_tokens <= 3


def test_seeds_and_many_answers(client: OpenAI, model: TaskModel, prompts: list[str]) -> None:
    hot: Any = {"temperature": 4.0, "seed": 5, "n": 3, "max_tokens": 20}
    texts = [choice.message.content for choice in chat(client, prompts[1], **hot).choices]
    again = [choice.message.content for choice in chat(client, prompts[1], **hot).choices]
    wanted = [
        model.run(prompts[1], temperature=4.0, seed=5 + i, max_new_tokens=20).text for i in range(3)
    ]
    assert texts == again == wanted
    assert len(set(texts)) > 1


def test_stop_strings_end_an_answer(client: OpenAI, model: TaskModel, prompts: list[str]) -> None:
    whole = model.run(prompts[0]).text
    stop = whole[8:12]
    reply = chat(client, prompts[0], stop=stop)
    assert reply.choices[0].message.content == whole[: whole.index(stop)]
    assert reply.choices[0].finish_reason == "stop"


def test_logprobs_are_the_models_own(client: OpenAI, model: TaskModel, prompts: list[str]) -> None:
    ids = model.encode(prompts[2])
    plain = model.plain.generate(ids, model.params(logprobs=2))
    reply = chat(client, prompts[2], logprobs=True, top_logprobs=2)
    found = reply.choices[0].logprobs.content
    assert len(found) == len(plain.tokens)
    for token, wanted in zip(found, plain.logprobs, strict=True):
        assert token.logprob == pytest.approx(wanted.logprob, abs=1e-3)
        assert [t.logprob for t in token.top_logprobs] == pytest.approx(
            [p for _, p in wanted.top], abs=1e-3
        )
    assert all(t.logprob == t.top_logprobs[0].logprob for t in found)  # greedy takes the likeliest


def test_concurrent_clients_get_what_they_would_get_alone(
    running: Running, model: TaskModel, prompts: list[str]
) -> None:
    wanted = [model.run(prompt, max_new_tokens=24).text for prompt in prompts]

    def ask(i: int) -> str:
        with running.client() as client:
            options: Any = {"max_completion_tokens": 24}
            if i % 2:
                return streamed(chat(client, prompts[i], stream=True, **options))[0]
            return str(chat(client, prompts[i], **options).choices[0].message.content)

    with ThreadPoolExecutor(len(prompts)) as pool:
        assert list(pool.map(ask, range(len(prompts)))) == wanted


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"logit_bias": {"5": 10}}, "logit_bias"),
        ({"presence_penalty": 1.0}, "presence_penalty"),
        ({"n": 99}, "n"),
        ({"temperature": -1.0}, "temperature"),
        ({"stop": ["a", "b", "c", "d", "e"]}, None),
        ({"extra_body": {"no_such_field": 1}}, "no_such_field"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
    ],
)
def test_what_cannot_be_done_is_refused(client: OpenAI, options: Any, param: str | None) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, "Hello", **options)
    body: Any = caught.value.body
    assert body["message"]
    if param:
        assert body["param"] == param


def test_an_unknown_model_is_not_found(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="tickets"):
        client.chat.completions.create(model="gpt", messages=[{"role": "user", "content": "x"}])
    assert [m.id for m in client.models.list()] == ["tickets"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"model": "tickets"}',
        b'{"messages": [{"role": "user", "content": "\xff"}]}',
        b'{"messages": "x", "temperature": NaN}',
        b'{"messages": [{"role": "user", "content": "x"}], "seed": ' + b"9" * 5000 + b"}",
        b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
        b"[" * 100_000,
        b'{"messages": [{"role": "robot", "content": "x"}]}',
        b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": 0}',
    ],
)
def test_malformed_bodies_are_refused(running: Running, body: bytes) -> None:
    reply = httpx.post(
        f"{running.url}/v1/chat/completions",
        content=body,
        headers={"content-type": "application/json"},
    )
    assert reply.status_code == 400
    assert reply.json()["error"]["message"]


def test_where_a_body_is_no_json_is_told(running: Running) -> None:
    url = f"{running.url}/v1/chat/completions"
    headers = {"content-type": "application/json"}
    error = httpx.post(url, content=b'{"messages": [', headers=headers).json()["error"]
    assert error["param"] == "body"
    assert error["message"].startswith("body: no JSON: Expecting value (character ")


def test_long_prompts_and_strange_ids_are_refused(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="tokens"):
        chat(client, "word " * 20_000)
    with pytest.raises(openai.BadRequestError, match="fit"):
        chat(client, "Hello", max_tokens=100_000)
    with pytest.raises(openai.BadRequestError, match="no row for a token"):
        client.completions.create(model="tickets", prompt=[99_999_999])
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model="tickets", prompt="")


@pytest.fixture(scope="module")
def endless(model: TaskModel, prompts: list[str]) -> dict[str, Any]:
    """A request that goes on for more than a second."""
    options: dict[str, Any] = {"temperature": 50.0}
    for seed in range(50):
        if len(model.run(prompts[0], seed=seed, max_new_tokens=600, **options).tokens) == 600:
            return options | {"seed": seed, "max_tokens": 900}
    raise AssertionError("every seed meets an end token")


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_the_engine(
    running: Running, prompts: list[str], endless: dict[str, Any], stream: bool
) -> None:
    before = running.count("tascade_cancelled_total")
    messages = [{"role": "user", "content": prompts[0]}]
    body = endless | {"model": "tickets", "messages": messages, "stream": stream}
    address = f"{running.url}/v1/chat/completions"
    try:
        with httpx.stream("POST", address, json=body, timeout=0.4) as reply:
            next(reply.iter_lines())
            assert stream
    except httpx.ReadTimeout:
        assert not stream
    with running.client() as client:  # else it would wait for 900 tokens
        assert chat(client, prompts[0]).choices[0].message.content
    assert running.count("tascade_cancelled_total") == before + 1


def test_metrics_count_what_happened(running: Running, prompts: list[str]) -> None:
    with running.client() as client:
        for prompt in prompts[:8]:
            chat(client, prompt)
        client.models.list()
    page = httpx.get(f"{running.url}/metrics").text
    assert 'tascade_requests_total{endpoint="/v1/chat/completions",status="200"}' in page
    assert running.count("tascade_completion_tokens_total", source="target") > 0
    assert running.count("tascade_accepted_tokens_total") > 0
    assert running.count("tascade_request_seconds_count") > 0


def test_logs_hold_no_prompt_and_no_answer(
    running: Running, prompts: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG, "tascade"), running.client() as client:
        answer = chat(client, "zanzibar " + prompts[0]).choices[0].message.content
        with pytest.raises(openai.BadRequestError):
            chat(client, "zanzibar", temperature=-5.0)
        # A line is written when its answer is out: one of an earlier test may come first.
        lines, until = [], time.monotonic() + 10
        while sum('"status": 400' in line for line in lines) < 1 and time.monotonic() < until:
            time.sleep(0.02)
            lines = [r.getMessage() for r in caplog.records if r.name.startswith("tascade")]
    assert [json.loads(line)["status"] for line in lines][-2:] == [200, 400]
    assert not any("zanzibar" in line or answer in line for line in lines)


@pytest.fixture
def guarded(model: TaskModel) -> Any:
    found = Running(model, api_key="secret", max_queue=2, max_body=20_000, timeout=1.0)
    yield found
    found.close()


def test_keys_queue_bodies_and_time_are_limited(
    guarded: Running, prompts: list[str], endless: dict[str, Any]
) -> None:
    with pytest.raises(openai.AuthenticationError):
        chat(guarded.client("wrong"), "x")
    assert httpx.get(f"{guarded.url}/health").status_code == 200
    client = guarded.client("secret")
    with pytest.raises(openai.APIStatusError) as caught:
        chat(client, "x" * 30_000)
    assert caught.value.status_code == 413

    failures: list[openai.APIStatusError] = []

    def ask() -> None:
        try:
            chat(client, prompts[0], **endless)
        except openai.APIStatusError as error:
            failures.append(error)

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
        time.sleep(0.02)
    for thread in threads:
        thread.join()
    codes = sorted(failure.status_code for failure in failures)
    full = [failure for failure in failures if failure.status_code == 429]
    assert codes[0] == 429
    assert all(failure.response.headers["retry-after"] for failure in full)
    assert codes[-1] == 504
    assert set(codes) == {429, 504}
    chat(client, prompts[0], max_tokens=4)  # and it goes on


def test_finished_answers_become_drafts_and_change_no_answer(
    ticket_pack: Path, prompts: list[str], tmp_path: Path
) -> None:
    model = TaskModel.from_pretrained(ticket_pack, dtype="float32")
    wanted = [model.plain.generate(model.encode(p), model.params()).text for p in prompts[:6]]
    with TrafficLearner.open(
        tmp_path / "learned",
        fingerprint=model.pack.info.fingerprint,
        vocab_size=model.corpus.vocab_size,
    ) as learner:
        model.draft_from(learner.view(model.corpus))
        learning = Running(model, learner=learner)
        try:
            with learning.client() as client:
                for _ in range(2):
                    for prompt, text in zip(prompts, wanted, strict=False):
                        reply = chat(client, prompt, max_tokens=200)
                        assert reply.choices[0].message.content.startswith(text)
            learner.flush()
            assert learner.stats()["documents"] >= 6
        finally:
            learning.close()

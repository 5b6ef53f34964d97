"""What OpenAI's clients send and expect: its fields, its own messages, its log-probabilities."""

from __future__ import annotations

import collections.abc
import json
import os
import random
import typing
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from openai import OpenAI
from openai.types import completion_create_params as text_params
from openai.types.chat import completion_create_params as chat_params
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from conftest import Running
from tascade.core import Generation, TokenLogprob
from tascade.model import TaskModel
from tascade.serve.app import ResponseBuilder
from tascade.serve.engine import Delta
from tascade.serve.logprobs import TokenBytes
from tascade.serve.requests import NEUTRAL, ChatRequest, CompletionRequest
from tascade.testing import byte_tokenizer

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "Hello"}]
ASKING: dict[str, Any] = {
    "presence_penalty": 0.5,
    "frequency_penalty": 0.5,
    "logit_bias": {"5": 1},
    "tools": [{"type": "function", "function": {"name": "f"}}],
    "length_penalty": 1.5,
    "min_tokens": 3,
    "prompt_logprobs": 1,
    "truncate_prompt_tokens": 5,
    "stop_token_ids": [5],
    "bad_words": ["x"],
    "allowed_token_ids": [5],
    "best_of": 2,
    "priority": 1,
}


@pytest.fixture(scope="module")
def served(model: TaskModel) -> Iterator[Running]:
    found = Running(model, max_tokens=4, cors_origins=("https://example.org",), api_key="k")
    with CLIENT:
        yield found
    found.close()


CLIENT = httpx.Client(timeout=60)


def ask(server: Running, path: str, body: dict[str, Any]) -> httpx.Response:
    content = json.dumps(body)
    headers = {"authorization": "bearer k", "content-type": "application/json"}
    return CLIENT.post(f"{server.url}{path}", content=content, headers=headers)


# --- fields ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_null_is_absent_for_every_field(served: Running, path: str) -> None:
    body = {name: None for kind in (ChatRequest, CompletionRequest) for name in kind.model_fields}
    own = {"messages": HELLO} if path == CHAT else {"prompt": "Hello"}
    fields = ChatRequest.model_fields if path == CHAT else CompletionRequest.model_fields
    nulls = {name: None for name in (*NEUTRAL, *body) if name in NEUTRAL or name in fields}
    assert ask(served, path, {**nulls, **own}).status_code == 200


def test_fields_that_ask_nothing_are_taken(served: Running) -> None:
    for name, values in NEUTRAL.items():
        for value in values:
            asked = "anything" if type(value) is object else value
            reply = ask(served, CHAT, {"messages": HELLO, name: asked})
            assert reply.status_code == 200, (name, asked, reply.text)


def test_fields_that_ask_for_what_is_not_done_are_refused_by_name(served: Running) -> None:
    for name, values in NEUTRAL.items():
        if any(type(value) is object for value in values):
            continue  # whatever they say changes no answer
        asked = ASKING.get(name, not values[0] if values and values[0] in (True, False) else "x")
        for path, own in ((CHAT, {"messages": HELLO}), (TEXT, {"prompt": "a"})):
            reply = ask(served, path, {**own, name: asked})
            assert reply.status_code == 400, (name, asked)
            error = reply.json()["error"]
            assert (error["param"], error["code"]) == (name, "unsupported")
            assert name in error["message"]


def test_every_field_of_the_installed_client_is_known() -> None:
    for kind, params in (
        (ChatRequest, chat_params.CompletionCreateParamsNonStreaming),
        (CompletionRequest, text_params.CompletionCreateParamsNonStreaming),
    ):
        known = {*kind.model_fields, *NEUTRAL}
        assert set(typing.get_type_hints(params)) <= known


# --- messages -------------------------------------------------------------------------------------


def test_ten_turns_with_every_message_sent_back(served: Running) -> None:
    with OpenAI(base_url=f"{served.url}/v1", api_key="k", max_retries=0) as client:
        messages: list[Any] = []
        for turn in range(10):
            messages.append({"role": "user", "content": f"number {turn}"})
            reply = client.chat.completions.create(
                model="tickets", messages=messages, max_tokens=2, temperature=0
            )
            messages.append(reply.choices[0].message)
        assert len(messages) == 20


def test_a_last_message_is_continued_where_it_is_asked_for(served: Running) -> None:
    half = [*HELLO, {"role": "assistant", "content": "The"}]

    def tokens(**fields: Any) -> int:
        reply = ask(served, CHAT, {"messages": half, **fields})
        return int(reply.json()["usage"]["prompt_tokens"]) if reply.is_success else 0

    both = {"continue_final_message": True, "add_generation_prompt": False}
    assert 0 < tokens(**both) == tokens(continue_final_message=True) < tokens()
    assert tokens(add_generation_prompt=True) == tokens(continue_final_message=False) == tokens()
    # As in vLLM: one of the two.
    assert tokens(continue_final_message=True, add_generation_prompt=True) == 0
    assert tokens(add_generation_prompt=False) == 0


@pytest.mark.parametrize(
    "more",
    [
        {"content": None},
        {"refusal": None},
        {"refusal": "no", "content": None},
        {"tool_calls": []},
        {"function_call": None, "audio": None, "annotations": [{"type": "x"}], "name": None},
        {"content": [{"type": "refusal", "refusal": "no"}]},
    ],
)
def test_what_servers_put_into_messages_comes_back(served: Running, more: dict[str, Any]) -> None:
    said = {"role": "assistant", "content": "hi", **more}
    assert ask(served, CHAT, {"messages": [*HELLO, said, *HELLO]}).status_code == 200


@pytest.mark.parametrize(
    ("message", "named"),
    [
        ({"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}, "tool_calls"),
        ({"role": "tool", "content": "1", "tool_call_id": "1"}, "tool"),
        ({"role": "user", "content": None}, "content"),
        ({"role": "user", "content": "x", "refusal": "no"}, "refusal"),
    ],
)
def test_other_messages_are_refused_by_name(
    served: Running, message: dict[str, Any], named: str
) -> None:
    reply = ask(served, CHAT, {"messages": [*HELLO, message]})
    assert reply.status_code == 400
    assert named in reply.json()["error"]["message"]


# --- log-probabilities ----------------------------------------------------------------------------


def metaspace() -> Any:
    vocabulary = {"[UNK]": 0, "▁a": 1, "▁good": 2, "▁day": 3, "</s>": 4}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    core.decoder = decoders.Metaspace(prepend_scheme="first")
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")


def answered(tokenizer: Any, ids: list[int], text: str, body: Any, pieces: int = 1) -> list[Any]:
    """The log-probabilities of an answer, in chunks or, of one piece, whole."""
    names = TokenBytes(tokenizer)
    found = [TokenLogprob(i, -0.5, ((0, -0.25), (1, -0.75))[: body_top(body)]) for i in ids]
    shape = ResponseBuilder("chat" if isinstance(body, ChatRequest) else "text", "m", body, names)
    if pieces == 1:
        return [shape.whole([Generation(ids, text, logprobs=found)])["choices"][0]["logprobs"]]
    out, step = [], -(-len(text) // pieces)
    for at in range(pieces):  # text comes later than its tokens, as it does behind a stop string
        some = tuple(found) if at == 0 else ()
        piece = Delta(text[max(0, at - 1) * step : at * step], some)
        out.append(shape.chunk(0, piece)["choices"][0]["logprobs"])
    last = Delta(result=Generation(ids, text))
    return [*out, shape.chunk(0, last)["choices"][0]["logprobs"]]


def body_top(body: Any) -> int:
    return (body.top_logprobs or 0) if isinstance(body, ChatRequest) else body.logprobs


def test_bytes_of_a_character_over_several_tokens_are_its_own() -> None:
    tokenizer = byte_tokenizer()
    text = "é🙂."
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert len(ids) == 7
    body = ChatRequest.model_validate({"messages": HELLO, "logprobs": True, "top_logprobs": 2})
    (said,) = answered(tokenizer, ids, text, body)
    assert bytes(b for token in said["content"] for b in token["bytes"]) == text.encode()
    assert said["content"][0]["token"] == r"bytes:\xc3"
    tops = [[top["logprob"] for top in token["top_logprobs"]] for token in said["content"]]
    assert tops[0] == [-0.25, -0.75, -0.5] or len(tops[0]) == 2  # the sampled one is among them
    asked = CompletionRequest.model_validate({"prompt": "a", "logprobs": 2})
    (said,) = answered(tokenizer, ids, text, asked)
    assert said["text_offset"] == [0, 0, 1, 1, 1, 1, 2]
    assert all(own in top for own, top in zip(said["tokens"], said["top_logprobs"], strict=True))


def test_spaces_are_where_the_text_has_them() -> None:
    body = CompletionRequest.model_validate({"prompt": "a", "logprobs": 0})
    (said,) = answered(metaspace(), [2, 3, 4], "good day", body)
    assert (said["tokens"], said["text_offset"]) == (["good", " day"], [0, 4])
    assert said["top_logprobs"] is None


def test_tokens_end_where_the_text_ends_in_chunks_too() -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer("one END two", add_special_tokens=False).input_ids
    body = CompletionRequest.model_validate({"prompt": "a", "logprobs": 0, "stream": True})
    (whole,) = answered(tokenizer, ids, "one ", body)
    assert "".join(whole["tokens"]) == "one "
    chunks = [said for said in answered(tokenizer, ids, "one ", body, pieces=3) if said]
    assert [t for said in chunks for t in said["tokens"]] == whole["tokens"]
    assert [t for said in chunks for t in said["text_offset"]] == whole["text_offset"]


@pytest.mark.parametrize("temperature", [0, 3])
def test_a_stream_tells_the_same_logprobs_as_the_whole(served: Running, temperature: float) -> None:
    body = {"prompt": "Hello", "logprobs": 2, "seed": 5, "temperature": temperature}
    whole = ask(served, TEXT, body).json()["choices"][0]
    stream = ask(served, TEXT, {**body, "stream": True, "stream_options": {"include_usage": True}})
    lines = [line[6:] for line in stream.text.splitlines() if line.startswith("data: {")]
    chunks = [json.loads(line) for line in lines]
    assert [chunk["usage"] is None for chunk in chunks] == [True] * (len(chunks) - 1) + [False]
    said = [c["logprobs"] for chunk in chunks for c in chunk["choices"] if c["logprobs"]]
    for name in ("tokens", "token_logprobs", "text_offset", "top_logprobs"):
        assert [t for part in said for t in part[name]] == whole["logprobs"][name]
    for own, top in zip(
        whole["logprobs"]["tokens"], whole["logprobs"]["top_logprobs"], strict=True
    ):
        assert own in top
        assert list(top.values()) == sorted(top.values(), reverse=True)


# --- manners --------------------------------------------------------------------------------------


def test_manners(served: Running) -> None:
    key = {"authorization": "BEARER k"}
    assert httpx.head(f"{served.url}/health").status_code == 200
    one = httpx.get(f"{served.url}/v1/models/tickets", headers=key)
    assert (one.status_code, one.json()["id"]) == (200, "tickets")
    assert httpx.get(f"{served.url}/v1/models/other", headers=key).status_code == 404
    refused = httpx.get(f"{served.url}/v1/models", headers={"authorization": "Basic k"})
    assert (refused.status_code, refused.headers["www-authenticate"]) == (401, "Bearer")
    asked = {"origin": "https://example.org", "access-control-request-method": "POST"}
    allowed = httpx.options(f"{served.url}{CHAT}", headers=asked)
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == "https://example.org"
    other = httpx.options(f"{served.url}{CHAT}", headers={**asked, "origin": "https://other.org"})
    assert "access-control-allow-origin" not in other.headers


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": "a", "stream_options": {"\ud800": True}},
        {"prompt": "a", "\ud800": 1},
        {"prompt": "\ud800"},
        {"prompt": "a", "x" * 100_000: 1},
        {"prompt": "a", "model": "\ud800" * 1000},
        {"prompt": [True]},
        {"prompt": "a", "n": True},
        {"prompt": "a", "logprobs": True},
        {"prompt": "a", "seed": 1.5},
    ],
)
def test_errors_are_short_and_in_openais_shape(served: Running, body: dict[str, Any]) -> None:
    reply = ask(served, TEXT, body)
    assert reply.status_code in (400, 404)
    assert len(reply.text) < 3000
    assert reply.json()["error"]["type"] == "invalid_request_error"


# --- anything that the schema allows --------------------------------------------------------------


def made(rng: random.Random, kind: Any, depth: int = 0) -> Any:
    """A value of an annotated type, as the client's own parameters are annotated."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Required, typing.NotRequired, typing.Annotated):
        return made(rng, args[0], depth)
    if origin is typing.Literal:
        return rng.choice(args)
    if origin is typing.Union or str(origin) == "<class 'types.UnionType'>":
        return made(rng, rng.choice(args), depth)
    if origin in (list, collections.abc.Iterable, collections.abc.Sequence, tuple):
        return [made(rng, args[0], depth + 1) for _ in range(rng.choice((0, 1, 1, 2)))]
    if origin in (dict, collections.abc.Mapping):
        return {made(rng, str): made(rng, args[1], depth + 1) for _ in range(rng.choice((0, 1)))}
    if hasattr(kind, "__required_keys__"):
        hints = typing.get_type_hints(kind, include_extras=True)
        needed = kind.__required_keys__
        names = [n for n in hints if n in needed or rng.random() < (0.15 if depth == 0 else 0.4)]
        return {name: made(rng, hints[name], depth + 1) for name in names}
    plain = {
        str: ["", "a", "Hello", "x" * 300, "🙂", "\ud800", "tickets", "5"],
        int: [0, 1, 2, 5, -1, 2**31, 2**63],
        float: [0.0, 0.5, 1.0, -1.0, 2.0, 1e9],
        bool: [True, False],
        type(None): [None],
    }
    return rng.choice(plain.get(kind, ["x", 1, None, [], {}]))


def test_requests_made_from_openais_schema_are_answered_or_refused(served: Running) -> None:
    rng = random.Random(7)
    count = 2000 if os.environ.get("CI") else 300
    seen: collections.Counter[int] = collections.Counter()
    kinds = [
        (CHAT, chat_params.CompletionCreateParamsNonStreaming),
        (TEXT, text_params.CompletionCreateParamsNonStreaming),
        (CHAT, chat_params.CompletionCreateParamsStreaming),
    ]
    for _ in range(count):
        path, kind = rng.choice(kinds)
        body = made(rng, kind)
        if rng.random() < 0.6:  # else a name or a message of chance refuses nearly all
            body["model"] = "tickets"
            body.update({"messages": HELLO} if path == CHAT else {"prompt": "Hello"})
        reply = ask(served, path, body)
        seen[reply.status_code] += 1
        assert reply.status_code in (200, 400, 404), (body, reply.text)
        if reply.status_code != 200:
            assert set(reply.json()["error"]) == {"message", "type", "param", "code"}
    assert seen[200] > count / 20
    assert seen[400] > count / 20

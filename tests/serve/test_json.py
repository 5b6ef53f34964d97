"""Answers held to a JSON schema: valid, the same with drafts as without, and refused where none."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import openai
import pytest
from openai import OpenAI

from tascade.decode.grammar import JSONGrammars
from tascade.decode.loop import AllNodes, Decoder
from tascade.decode.sampling import SamplingParams
from tascade.decode.target import Target
from tascade.draft.budget import NoDrafter
from tascade.errors import ConfigError
from tascade.testing import OracleDrafter, RandomTreeDrafter, byte_tokenizer, tiny_model

END = 256
SCHEMAS: dict[str, dict[str, Any]] = {
    "flags": {
        "type": "object",
        "properties": {"open": {"type": "boolean"}, "kind": {"enum": ["bug", "wish"]}},
        "required": ["open", "kind"],
        "additionalProperties": False,
    },
    "list": {
        "type": "array",
        "items": {"type": "integer", "minimum": 0, "maximum": 99},
        "minItems": 1,
        "maxItems": 4,
    },
    "null or text": {"anyOf": [{"type": "null"}, {"type": "string", "maxLength": 5}]},
}
PARAMS = {
    "greedy": SamplingParams(max_new_tokens=80, end_tokens=(END,)),
    "sampled": SamplingParams(max_new_tokens=80, end_tokens=(END,), temperature=1.2, seed=5),
}


@pytest.mark.parametrize("how", PARAMS)
@pytest.mark.parametrize("name", SCHEMAS)
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_drafts_do_not_change_an_answer_held_to_a_schema(family: str, name: str, how: str) -> None:
    target = Target(tiny_model(family, 2, vocab_size=264))
    tokenizer, params = byte_tokenizer(), PARAMS[how]
    grammars = JSONGrammars(tokenizer, 264, [END])
    ended = 0
    for prompt in ([1, 2, 3], [65, 66], [9]):

        def said(drafter: Any) -> list[int]:
            held = grammars.processor(SCHEMAS[name], len(prompt))  # noqa: B023
            decoder = Decoder(target, drafter, AllNodes(8), tokenizer)
            return decoder.generate(prompt, params, [held]).tokens  # noqa: B023

        plain = said(NoDrafter())
        for drafter in (
            OracleDrafter(plain, wrong_every=0),
            OracleDrafter(plain, wrong_every=3),
            RandomTreeDrafter(264, 1),
        ):
            assert said(drafter) == plain
        if plain[-1] == END:
            ended += 1
            jsonschema.validate(json.loads(tokenizer.decode(plain[:-1])), SCHEMAS[name])
    assert ended


def test_what_is_no_schema_is_refused() -> None:
    grammars = JSONGrammars(byte_tokenizer(), 260, [END])
    for schema in ({"type": "no such"}, {"$ref": "#/nowhere"}, {"type": "string", "pattern": "("}):
        with pytest.raises(ConfigError, match="schema cannot be held to"):
            grammars.processor(schema, 1)


def form(schema: dict[str, Any]) -> Any:
    return {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": schema}}


def test_the_server_answers_in_json(client: OpenAI) -> None:
    asked: Any = {
        "model": "tickets",
        "messages": [{"role": "user", "content": "Hello"}],
        "max_tokens": 200,
        "temperature": 0,
        "response_format": form(SCHEMAS["flags"]),
    }
    answer = client.chat.completions.create(**asked).choices[0]
    assert answer.finish_reason == "stop"
    jsonschema.validate(json.loads(answer.message.content or ""), SCHEMAS["flags"])
    parts = client.chat.completions.create(stream=True, **asked)
    text = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
    assert text == answer.message.content
    loose = client.chat.completions.create(**{**asked, "response_format": {"type": "json_object"}})
    assert (loose.choices[0].message.content or "").lstrip().startswith("{")
    plain = client.completions.create(
        model="tickets",
        prompt="Hello",
        max_tokens=200,
        extra_body={"response_format": form(SCHEMAS["list"])},
    )
    if plain.choices[0].finish_reason == "stop":
        jsonschema.validate(json.loads(plain.choices[0].text), SCHEMAS["list"])


@pytest.mark.parametrize(
    "wrong",
    [
        {"type": "yaml"},
        {"type": "json_schema"},
        {"type": "json_object", "json_schema": {"name": "x", "schema": {}}},
        form({"type": "no such"}),
        form({"$ref": "#/nowhere"}),
    ],
)
def test_a_form_that_is_none_is_refused_by_its_name(client: OpenAI, wrong: Any) -> None:
    with pytest.raises(openai.BadRequestError, match=r"response_format|[jJ](son|SON).schema"):
        client.chat.completions.create(
            model="tickets",
            messages=[{"role": "user", "content": "Hello"}],
            response_format=wrong,
        )

"""Requests as servers log them, with their answers, are rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import tascade
from tascade.config import SpecConfig
from tascade.data.formats import to_example
from tascade.data.load import load_examples
from tascade.errors import ConfigError, DataError
from tascade.testing import byte_tokenizer, tiny_model, toy_examples

ASKED = [{"role": "user", "content": "Where?"}]
CHAT = {"choices": [{"index": 0, "message": {"role": "assistant", "content": "Here."}}]}
TEXT = {"choices": [{"index": 0, "text": "Here.", "finish_reason": "stop"}]}


@pytest.mark.parametrize(
    "record",
    [
        {"messages": ASKED, **CHAT},
        {"messages": ASKED, "response": CHAT},
        {"request": {"model": "m", "messages": ASKED}, "response": CHAT},
        {"body": {"messages": ASKED}, "response": {"status_code": 200, "body": CHAT}},
        {"request": {"body": {"messages": ASKED}}, "response": {"body": CHAT}},
    ],
    ids=["flat", "response", "request and response", "batch", "bodies"],
)
def test_a_logged_chat_is_its_messages_and_its_answer(record: dict[str, Any]) -> None:
    example = to_example({"id": "r1", **record})
    assert example.prompt == tuple(ASKED)
    assert (example.completion, example.id) == ("Here.", "r1")


def test_a_logged_completion_is_its_prompt_and_its_answer() -> None:
    example = to_example({"request": {"prompt": "Where?"}, "response": TEXT})
    assert (example.prompt, example.completion) == ("Where?", "Here.")


def test_choices_of_another_kind_are_no_log() -> None:
    row = {"prompt": "1 or 2?", "completion": "1"}
    for choices in (
        ["1", "2"],
        [{"text": "1", "label": "A"}],
        {"text": ["1"]},
        [],
        TEXT["choices"],
    ):
        assert to_example({**row, "choices": choices}).completion == "1"


def test_an_answer_that_is_no_text_is_refused_by_its_row() -> None:
    call = {"choices": [{"message": {"role": "assistant", "content": None, "tool_calls": [{}]}}]}
    with pytest.raises(DataError, match=r"(?s)log:3.*no text.*null"):
        to_example({"messages": ASKED, **call}, "log:3")


def examples(count: int) -> list[dict[str, Any]]:
    return [{"prompt": e.prompt, "completion": e.completion} for e in toy_examples(count)]


def test_logs_are_own_answers_that_are_not_asked_for_again(tmp_path: Path) -> None:
    logs = tmp_path / "served.jsonl"
    rows = [{"prompt": f"Served {n}", **TEXT} for n in range(5)]
    logs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert len(list(load_examples(logs))) == 5
    model = tiny_model("llama", vocab_size=260), byte_tokenizer()
    given: dict[str, Any] = {"logs": logs, "validation": examples(2)}
    for own in (False, True):
        recipe = tascade.Recipe(
            max_new_tokens=6, spec=SpecConfig(own_answers=own, calibration_rows=1)
        )
        heard: list[tuple[str, int | None]] = []
        made = tascade.adapt(
            model,
            examples(8),
            recipe=recipe,
            progress=lambda stage, done, total, heard=heard: heard.append((stage, total)),
            **given,
        )
        info = made.pack.info
        assert info.own_answers == (13 if own else 5)
        assert [(entry["role"], entry["rows"]) for entry in info.data] == [
            ("train", 8),
            ("validation", 2),
            ("logs", 5),
        ]
        documents = [ids.tolist() for _, ids in made.corpus.documents()]
        assert len(documents) == 13
        assert [made.tokenizer.decode(ids[:-1]) for ids in documents[8:]] == ["Here."] * 5
        asked = {total for stage, total in heard if stage == "answering training prompts"}
        assert asked == ({8} if own else set())


def test_logs_of_the_base_are_not_a_tuned_models(tmp_path: Path) -> None:
    model = tiny_model("llama", vocab_size=260), byte_tokenizer()
    with pytest.raises(ConfigError, match="not the tuned model's"):
        tascade.adapt(model, examples(8), logs=examples(2), tune=True, out=tmp_path / "pack")

"""Rows that the chat template or the model refuses are bad rows like any other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import tascade
from tascade.config import DataConfig, SpecConfig
from tascade.errors import DataError
from tascade.testing import byte_tokenizer, tiny_model

TEMPLATE = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def chat(*roles: str) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": f"as {role}"} for role in roles]}


ROWS = [
    chat("user", "assistant"),
    chat("user", "user", "assistant"),
    chat("system", "user", "assistant"),
    chat("user", "assistant", "user", "assistant"),
]


@pytest.fixture
def loaded() -> tuple[Any, Any]:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tiny_model("llama", 1, vocab_size=len(tokenizer)), tokenizer


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def recipe(on_error: str) -> tascade.Recipe:
    spec = SpecConfig(calibration_rows=1)
    return tascade.Recipe(max_new_tokens=4, data=DataConfig(on_error=on_error), spec=spec)


def test_a_refusal_names_the_row_and_says_the_templates_words(
    loaded: tuple[Any, Any], file: Path
) -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl:2.*roles must alternate"):
        tascade.adapt(loaded, file, recipe=recipe("raise"))


def test_refused_rows_are_skipped_and_counted(loaded: tuple[Any, Any], file: Path) -> None:
    made = tascade.adapt(loaded, file, validation=file, recipe=recipe("skip"))
    for source in made.pack.info.data:
        assert (source["rows"], source["skipped"]) == (2, 2)
        where = [Path(where).name for where, _ in source["skipped_rows"]]
        assert where == ["rows.jsonl:2", "rows.jsonl:3"]
        assert all("alternate" in reason for _, reason in source["skipped_rows"])


def test_a_token_that_the_model_has_no_row_for_is_its_rows_fault(
    loaded: tuple[Any, Any], tmp_path: Path
) -> None:
    model, tokenizer = loaded
    tokenizer.add_tokens(["<tool>"])
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "<tool>"}]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=r"rows\.jsonl:2"):
        tascade.adapt(loaded, file, recipe=recipe("raise"))
    with pytest.warns(UserWarning, match="<tool>"):
        made = tascade.adapt((model, tokenizer), file, recipe=recipe("skip"))
    assert made.pack.info.data[0]["skipped"] == 1

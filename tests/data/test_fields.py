"""Rows whose prompt and answer lie in fields of other names, and what is said of the rest."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from data_rows import as_csv, jsonl, write_parquet, written

import tascade
from tascade.config import DataConfig
from tascade.data.fields import Fields
from tascade.data.load import check_start, load_examples
from tascade.data.report import LoadReport
from tascade.errors import ConfigError, DataError, TascadeError
from tascade.testing import byte_tokenizer, tiny_model

FAQ = [
    {"id": f"r{i}", "question": f"q{i}?", "context": f"c{i}", "answer": f"a{i}", "source": "x"}
    for i in range(3)
]
NAMED = {"prompt_field": "question", "completion_field": "answer"}
TEMPLATE = {"prompt_template": "{question}\nContext: {context}", "completion_field": "answer"}


def read(source: Any, **names: str) -> tuple[list[tuple[Any, str]], LoadReport]:
    report, fields = LoadReport(), Fields.of(DataConfig(**names))
    rows = [(e.prompt, e.completion) for e in load_examples(source, fields=fields, report=report)]
    return rows, report


def sources(folder: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
    write_parquet(folder / "faq.parquet", rows)
    return {
        "jsonl": written(folder, "faq.jsonl", jsonl(rows)),
        "csv": written(folder, "faq.csv", as_csv(rows)),
        "parquet": folder / "faq.parquet",
        "memory": rows,
    }


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "memory"])
def test_named_fields_and_templates_from_every_kind_of_source(tmp_path: Path, kind: str) -> None:
    source = sources(tmp_path, FAQ)[kind]
    rows, report = read(source, **NAMED)
    assert rows == [(f"q{i}?", f"a{i}") for i in range(3)]
    assert report.not_used == ("id", "context", "source")
    rows, report = read(source, **TEMPLATE)
    assert rows == [(f"q{i}?\nContext: c{i}", f"a{i}") for i in range(3)]
    assert report.not_used == ("id", "source")
    for names in ({**NAMED, "prompt_field": "qestion"}, {"prompt_template": "{qestion}"}):
        with pytest.raises(DataError, match="there is no field 'qestion'") as told:
            read(source, **names)
        assert "'question', 'context', 'answer', 'source'" in told.value.got
        assert "'question'" in told.value.fix


CHAT = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("row", "names", "example"),
    [
        # One name alone: the other part has its usual names, Alpaca's among them.
        ({"q": "a", "completion": "b"}, {"prompt_field": "q"}, ("a", "b")),
        ({"q": "a", "output": "b"}, {"prompt_field": "q"}, ("a", "b")),
        ({"text": "a", "output": "b"}, {"prompt_field": "text"}, ("a", "b")),
        ({"prompt": "a", "gold": "b"}, {"completion_field": "gold"}, ("a", "b")),
        ({"instruction": "a", "response": "b"}, {"completion_field": "response"}, ("a", "b")),
        ({"gold": "b"}, {"completion_field": "gold"}, (None, "b")),
        # What is named wins over what has the usual name.
        ({"prompt": "x", "completion": "y", "q": "a", "w": "b"},
         {"prompt_field": "q", "completion_field": "w"}, ("a", "b")),
        ({"messages": CHAT, "q": "a", "w": "b"},
         {"prompt_field": "q", "completion_field": "w"}, ("a", "b")),
        # Chat messages are a prompt under any name, and a system text stands before it.
        ({"chat": CHAT, "w": "b"}, {"prompt_field": "chat", "completion_field": "w"},
         (tuple(CHAT), "b")),
        ({"q": "a", "w": "b", "system": "s"}, {"prompt_field": "q", "completion_field": "w"},
         (({"role": "system", "content": "s"}, {"role": "user", "content": "a"}), "b")),
        # Templates: braces, numbers, odd names, fields twice.
        ({"n": 3, "x": 0.5, "completion": "b"}, {"prompt_template": "{n}/{x} {{n}}"},
         ("3/0.5 {n}", "b")),
        ({"a.b": "dot", "a": {"b": "in"}, "completion": "c"}, {"prompt_template": "{a.b}"},
         ("dot", "c")),
        ({"a": "", "completion": "c"}, {"prompt_template": "<{a}{a}>"}, ("<>", "c")),
        ({"a": "{b}", "b": "no", "completion": "c"}, {"prompt_template": "{a}"}, ("{b}", "c")),
    ],
)  # fmt: skip
def test_what_a_row_is_with_these_names(
    row: dict[str, Any], names: dict[str, str], example: Any
) -> None:
    assert read([row], **names)[0] == [example]


@pytest.mark.parametrize(
    ("row", "names", "where", "said"),
    [
        ({"q": None, "w": "b"}, {"prompt_field": "q"}, "q", "null"),
        ({"q": "a", "w": ""}, {"prompt_field": "q", "completion_field": "w"}, "w", "empty"),
        ({"q": 5, "w": "b"}, {"prompt_field": "q", "completion_field": "w"}, "q", "expected text"),
        ({"q": "a", "w": "b"}, {"prompt_field": "q"}, "", "no field holds the answer"),
        ({"q": "a", "w": "b"}, {"completion_field": "w"}, "w", "its prompt"),
        ({"q": ["a"], "completion": "b"}, {"prompt_template": "{q}"}, "q", "text and numbers"),
        ({"q": True, "completion": "b"}, {"prompt_template": "{q}"}, "q", "text and numbers"),
        ({"q": {"x": "a"}, "completion": "b"}, {"prompt_template": "{q.x}"}, "", "no field 'q.x'"),
        ({"q": ["a"], "completion": "b"}, {"prompt_template": "{q[0]}"}, "", "no field 'q"),
    ],
)
def test_what_cannot_be_used_is_named_by_the_rows_own_field(
    row: dict[str, Any], names: dict[str, str], where: str, said: str
) -> None:
    with pytest.raises(DataError, match=said) as told:
        read([row], **names)
    assert told.value.where == "examples[0]" + (f": {where}" if where else "")


@pytest.mark.parametrize(
    "template", ["{}", "{q!r}", "{q:>9}", "{q", "q}", "no field", "{q:{w}}", '{"a": {q}}']
)
def test_a_template_holds_fields_by_name_alone(template: str) -> None:
    with pytest.raises(ConfigError, match="no template") as told:
        DataConfig(prompt_template=template)
    assert told.value.where == "data.prompt_template"


def test_a_prompt_is_made_in_one_way() -> None:
    with pytest.raises(ConfigError, match="a prompt field and a prompt template"):
        DataConfig(prompt_field="a", prompt_template="{b}")


def test_parquet_conversations_alone_are_read(tmp_path: Path) -> None:
    said = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]
    write_parquet(tmp_path / "s.parquet", [{"conversations": said, "lang": "en"}])
    rows, report = read(tmp_path / "s.parquet")
    assert rows == [(({"role": "user", "content": "hi"},), "ho")]
    assert report.not_used == ("lang",)


def test_a_field_that_some_row_uses_is_used_and_null_is_absent() -> None:
    rows = [{"prompt": "p", "completion": "c", "text": "t", "note": None}, {"text": "only"}]
    assert read(rows)[1].not_used == ()
    assert read(rows[:1])[1].not_used == ("text",)


def test_odd_names_and_many_of_them_are_bounded() -> None:
    row = {"completion": "c", "\ud800" * 500: 1} | {f"f{i}": i for i in range(1000)}
    unused = read([row, ("p", "c")])[1].not_used
    assert len(unused) < 250
    assert all(len(name.encode()) < 600 for name in unused)


def test_a_pack_keeps_the_names_and_says_what_was_not_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_model("llama", vocab_size=260, eos_token_id=256), byte_tokenizer()
    with caplog.at_level(logging.INFO, "tascade.data"):
        made = tascade.adapt(model, FAQ, out=tmp_path / "pack", max_new_tokens=4, **NAMED)
    assert [record.getMessage() for record in caplog.records] == ["not used: id, context, source"]
    raw = json.loads((tmp_path / "pack" / "pack.json").read_text())
    assert raw["data"][0]["not_used"] == ["id", "context", "source"]
    assert made.pack.reading == DataConfig(**NAMED)


def test_the_first_rows_are_looked_at_and_no_more(tmp_path: Path) -> None:
    good = [{"prompt": "p", "completion": "c"}] * 120
    late = written(tmp_path, "late.jsonl", jsonl([*good, {"prompt": "p"}]))
    check_start(str(late), DataConfig())
    early = written(tmp_path, "early.jsonl", jsonl([*good[:9], {"prompt": "p"}]))
    with pytest.raises(DataError, match=r"early\.jsonl:10"):
        check_start(str(early), DataConfig())
    check_start(str(early), DataConfig(max_examples=5))
    check_start(str(early), DataConfig(on_error="skip"))
    check_start("owner/of-the-hub", DataConfig())
    none = written(tmp_path, "none.jsonl", jsonl([{"prompt": "p"}] * 4))
    for source in (none, written(tmp_path, "empty.jsonl", b"")):
        with pytest.raises(TascadeError, match="no examples"):
            check_start(str(source), DataConfig(on_error="skip"))

"""The bundled tasks are what their generator writes, and the bundled model opens and is small."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tascade import bundled
from tascade.errors import ConfigError

GENERATOR = Path(__file__).parents[1] / "examples" / "bundled"


@pytest.fixture(scope="module")
def generator() -> Iterator[ModuleType]:
    sys.path.insert(0, str(GENERATOR))
    try:
        yield importlib.import_module("make_tasks")
    finally:
        sys.path.remove(str(GENERATOR))


def rows(task: str, split: str) -> list[dict[str, Any]]:
    text = bundled.data_path(task, split).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize("task", bundled.tasks())
def test_rows_parse_and_splits_are_disjoint(task: str) -> None:
    seen: set[str] = set()
    for split, count in (("train", 2000), ("validation", 200), ("test", 200)):
        part = rows(task, split)
        assert len(part) == count
        assert all(set(row) == {"id", "prompt", "completion"} for row in part)
        assert all(row["prompt"].strip() and row["completion"].strip() for row in part)
        prompts = {row["prompt"] for row in part}
        assert len(prompts) == count
        assert not prompts & seen
        seen |= prompts


@pytest.mark.parametrize("task", bundled.tasks())
def test_generator_writes_the_committed_bytes(task: str, generator: ModuleType) -> None:
    for split, part in generator.splits(task).items():
        assert generator.lines(part).encode() == bundled.data_path(task, split).read_bytes()


@pytest.mark.parametrize("task", bundled.tasks())
def test_extra_rows_hold_no_committed_prompt(task: str, generator: ModuleType) -> None:
    kept = {row["prompt"] for split in bundled.splits() for row in rows(task, split)}
    extra = [row["prompt"] for row in generator.extra_train(task, 300)]
    assert len(set(extra)) == 300
    assert not kept & set(extra)


def test_a_prompt_has_one_right_completion(generator: ModuleType) -> None:
    for task in bundled.tasks():
        found: dict[str, str] = {}
        for row in (r for split in bundled.splits() for r in rows(task, split)):
            assert found.setdefault(row["prompt"], row["completion"]) == row["completion"]


def test_triage_records_are_json() -> None:
    for row in rows("tickets", "test"):
        record = json.loads(row["completion"])
        assert record["priority"] in {"low", "normal", "high", "urgent"}
        assert record["customer"] in row["prompt"]


@pytest.mark.parametrize(("task", "split"), [("poems", "train"), ("sql", "dev")])
def test_unknown_names_are_refused_with_the_known_ones(task: str, split: str) -> None:
    with pytest.raises(ConfigError, match=r"wanted: one of (tickets|train)"):
        bundled.data_path(task, split)


def test_model_folder_is_small_and_speaks_for_itself() -> None:
    files = [path for path in bundled.model_path().iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 20 * 2**20
    names = {path.name for path in files}
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= names
    assert {"chat_template.jinja", "generation_config.json"} <= names


def test_model_loads_and_answers_in_form() -> None:
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(bundled.model_path())
    tokenizer = transformers.AutoTokenizer.from_pretrained(bundled.model_path())
    assert 4_000_000 <= sum(p.numel() for p in model.parameters()) <= 10_000_000
    row = rows("sql", "test")[0]
    chat = [{"role": "user", "content": row["prompt"]}]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert text == f"<|user|>{row['prompt']}<|assistant|>"
    inputs = tokenizer(text, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])
    assert answer.startswith("SELECT")

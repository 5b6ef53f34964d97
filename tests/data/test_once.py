"""Whatever is streamed is streamed once: from data to a pack, tuned or not, and to a result."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import tascade
from brief import BRIEF
from tascade.bench.pack import BenchOptions, bench_pack
from tascade.config import DataConfig, SpecConfig
from tascade.data.load import source_hash
from tascade.pipeline import adapt, adapt_tuned
from tascade.testing import byte_tokenizer, tiny_model, toy_examples

ROWS = [{"prompt": e.prompt, "completion": e.completion} for e in toy_examples(60)]
RECIPE = tascade.Recipe(max_new_tokens=4, spec=SpecConfig(calibration_rows=1))


@pytest.fixture(autouse=True, scope="module")
def short() -> Iterator[None]:
    """New rows learn alone for no steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tascade.enrich.train.trainer.EMBEDDING_WARMUP_STEPS", 0)
        yield


class Hub:
    """A dataset that counts how often it is opened, and how many rows are taken."""

    def __init__(self, rows: int = len(ROWS)) -> None:
        self.opened: list[str] = []
        self.taken, self.rows = 0, rows

    def __call__(self, name: str, split: str, *how: object) -> Iterator[tuple[str, object]]:
        self.opened.append(split)
        for number in range(self.rows):
            self.taken += 1
            yield f"{name}:row {number + 1}", ROWS[number % len(ROWS)]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Hub:
    made = Hub()
    monkeypatch.setattr("tascade.data.load.read_hub", made)
    monkeypatch.chdir(tmp_path)
    return made


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    model = tiny_model("llama", vocab_size=260)
    model.generation_config.eos_token_id = 256
    return model, byte_tokenizer()


def test_adapting_streams_once_and_says_what_was_read(hub: Hub, loaded: tuple[Any, Any]) -> None:
    made = adapt(loaded, "owner/name", validation=ROWS[:4], recipe=RECIPE)
    assert (hub.opened, hub.taken) == (["train"], 60)
    source = made.pack.info.data[0]
    assert source["path"] == "owner/name"
    assert source["sha256"] == source_hash(ROWS)["sha256"]
    assert source["rows"] == 60


def test_no_more_is_read_than_is_wanted(hub: Hub, loaded: tuple[Any, Any]) -> None:
    hub.rows = 10**9
    recipe = dataclasses.replace(RECIPE, data=DataConfig(max_examples=25))
    made = adapt(loaded, "owner/name", validation=ROWS[:4], recipe=recipe)
    assert (hub.opened, hub.taken) == (["train"], 25)
    assert made.pack.info.data[0]["sha256"] == source_hash(ROWS[:25])["sha256"]


def test_a_file_that_is_read_in_part_is_not_hashed_whole(
    loaded: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    whole = adapt(loaded, file, recipe=RECIPE).pack.info.data[0]
    assert whole["sha256"] == source_hash(file)["sha256"]
    monkeypatch.setattr("tascade.data.load._hash_file", lambda *_: pytest.fail("read again"))
    recipe = dataclasses.replace(RECIPE, data=DataConfig(max_examples=25))
    part = adapt(loaded, file, recipe=recipe).pack.info.data[0]
    assert part["path"] == "rows.jsonl"
    assert part["sha256"] == source_hash(ROWS[:25])["sha256"]


def test_rows_that_can_be_read_once_are_enough(loaded: tuple[Any, Any]) -> None:
    made = adapt(loaded, iter(ROWS), validation=iter(ROWS[:4]), recipe=RECIPE)
    entries = made.pack.info.data
    assert [entry["rows"] for entry in entries] == [60, 4]
    assert entries[0]["sha256"] == source_hash(ROWS)["sha256"]


@pytest.mark.parametrize("kind", ["hub", "iterator"])
def test_tuning_and_adapting_share_one_reading(
    kind: str, hub: Hub, loaded: tuple[Any, Any], tmp_path: Path
) -> None:
    data = "owner/name" if kind == "hub" else iter(ROWS)
    recipe = dataclasses.replace(RECIPE, tune=BRIEF)
    held: Any = {"validation": iter(ROWS[:6]), "out": tmp_path / "pack"}
    made, _ = adapt_tuned(loaded, data, recipe=recipe, **held)
    assert hub.opened == (["train"] if kind == "hub" else [])
    assert made.pack.info.data[0]["path"] == ("owner/name" if kind == "hub" else "memory")
    assert [entry["rows"] for entry in made.pack.info.data] == [60, 6]


def test_a_bench_streams_once(hub: Hub, loaded: tuple[Any, Any], tmp_path: Path) -> None:
    adapt(loaded, ROWS, out=tmp_path / "pack", recipe=RECIPE)
    options = BenchOptions(methods=("plain",), rows=2, repeats=1, memory=False)
    result = bench_pack(tmp_path / "pack", "owner/name", model=loaded, options=options)
    assert (hub.opened, hub.taken) == (["test"], 60)
    assert result["data"]["path"] == "owner/name"
    assert result["data"]["sha256"] == source_hash(ROWS)["sha256"]

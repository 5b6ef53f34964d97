"""The demo with a tuned model, on a few of its rows: here it learns next to nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tascade import bundled
from tascade.bench.schema import validate
from tascade.cli import demo
from tascade.config import GateConfig, Recipe, TuneConfig

LITTLE = TuneConfig(
    tokens=5,
    epochs=1,
    prompts=0.0,
    replay=0.0,
    init="first",
    min_ngram_prob=0.7,
    gate=GateConfig(refuse=False),
)


@pytest.fixture(autouse=True, scope="module")
def short() -> Iterator[None]:
    """New rows learn alone for two steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tascade.enrich.train.trainer.EMBEDDING_WARMUP_STEPS", 2)
        yield


@pytest.fixture
def few_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One bundled task, and sixty rows of each of its files."""
    whole = bundled.data_path

    def cut(task: str, split: str) -> Path:
        path = tmp_path / f"{task}-{split}.jsonl"
        lines = whole(task, split).read_text().splitlines(keepends=True)
        path.write_text("".join(lines[:60]))
        return path

    monkeypatch.setattr(bundled, "data_path", cut)
    monkeypatch.setattr(bundled, "tasks", lambda: (demo.TUNED_TASK,))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_tuned_model_is_shown_beside_the_others(
    few_rows: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(demo, "TUNING", LITTLE)
    results = demo.run(tmp_path / "out", rows=1, repeats=1, tune=True)
    assert len(results) == 2
    for result in results:
        validate(result)
    assert set(results[1]["methods"]) == {"plain", "tasc-ft", "tasc-ft+spec"}
    assert (tmp_path / "out" / "tickets-tuned" / "model" / "tuning.json").is_file()
    assert "tasc-ft" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_model_that_the_gate_refuses_is_not_shown(
    few_rows: None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import dataclasses

    strict = dataclasses.replace(LITTLE, gate=GateConfig(min_agreement=1.0))
    monkeypatch.setattr(demo, "TUNING", strict)
    results = demo.run(tmp_path / "out", rows=1, repeats=1, tune=True)
    assert len(results) == 1
    assert not (tmp_path / "out" / "tickets-tuned").exists()
    assert "the gate refused" in capsys.readouterr().out


@pytest.mark.parametrize("instructions", [False, True])
def test_the_precision_is_one_that_the_cpu_multiplies(
    instructions: bool,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked: list[str] = []

    class Reached(Exception):
        pass

    def adapting(*_: object, recipe: Recipe, **__: object) -> None:
        asked.append(recipe.dtype)
        raise Reached

    monkeypatch.setattr(demo, "multiplies", lambda dtype: instructions)
    monkeypatch.setattr(demo, "adapt", adapting)
    with pytest.raises(Reached):
        demo.run(tmp_path / "out")
    assert asked == ["auto" if instructions else "float32"]
    assert ("in float32" in capsys.readouterr().err) != instructions


def test_a_demo_that_is_stopped_begins_no_other_part(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begun: list[str] = []

    def stopped(task: str, *_: object, **__: object) -> list[dict[str, Any]]:
        begun.append(task)
        return [{"settings": {"stopped": True}}]

    monkeypatch.setattr(demo, "_task", stopped)
    monkeypatch.setattr(demo, "write_report", lambda page, results, title: None)
    results = demo.run(tmp_path / "out", tune=True)
    assert begun == list(bundled.tasks())[:1]
    assert len(results) == 1
    assert "stopped in part 1 of 4" in capsys.readouterr().err

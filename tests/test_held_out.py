"""Held-out rows: which are taken, how many, and that answers called the model's own are its own."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import tascade
from brief import BRIEF
from tascade import bundled
from tascade.builder import answering
from tascade.cli import verbs as cli
from tascade.cli.console import rows_used
from tascade.config import SpecConfig, TuneConfig, VocabConfig
from tascade.core import silent
from tascade.data.encode import encode_prompt, end_tokens
from tascade.data.load import load_examples
from tascade.data.prepare import MOST_HELD_OUT, Prepared, prepare, thin
from tascade.decode.loop import Decoder
from tascade.decode.sampling import SamplingParams
from tascade.decode.target import Target
from tascade.draft.budget import NoDrafter
from tascade.draft.costs import CostTable
from tascade.enrich.choose import enrich
from tascade.enrich.distill_data import DistillData, make_distill_data
from tascade.errors import ConfigError
from tascade.forecast.inspection import inspect
from tascade.load import load_model
from tascade.pack import Pack
from tascade.pipeline import adapt, tailor, tune
from tascade.testing import byte_tokenizer, tiny_model, toy_examples

ENDS = (256,)
NEVER = "never said by this model"


@pytest.fixture(autouse=True)
def known_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring the costs of steps takes seconds, and no test here is about them."""
    for module in ("model", "forecast.inspection"):
        monkeypatch.setattr(
            f"tascade.{module}.measure_cost", lambda target: CostTable((1, 64), (1e-3, 2e-3))
        )


def tiny() -> tuple[Any, Any]:
    model = tiny_model("llama", vocab_size=260, eos_token_id=256)
    model.generation_config.eos_token_id = 256
    return model, byte_tokenizer()


def toy(count: int, completion: str = "") -> list[dict[str, Any]]:
    return [
        {"prompt": f"{number} {e.prompt}", "completion": completion or e.completion}
        for number, e in enumerate(toy_examples(count))
    ]


def prepared(rows: Any, held_out: Any = None, **spec: Any) -> Prepared:
    recipe = tascade.Recipe(max_new_tokens=8, spec=SpecConfig(**spec))
    return prepare(byte_tokenizer(), ENDS, rows, held_out, recipe, silent)


class Clock:
    """Time that passes by a second an answer: what is reached does not depend on the machine."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr("tascade.answers.own.time.monotonic", lambda: self.now)
        generate = Decoder.generate

        def counted(decoder: Decoder, *args: Any, **options: Any) -> Any:
            self.now += 1.0
            return generate(decoder, *args, **options)

        monkeypatch.setattr(Decoder, "generate", counted)


# --- how many rows, and which -------------------------------------------------------------------


@pytest.mark.parametrize("rows", [0, 1, 7, 8, 9, 16, 17, 1000, 4097])
def test_a_stream_is_thinned_evenly_and_counted(rows: int) -> None:
    kept, count = thin(iter(range(rows)), 8)
    assert count == rows
    assert len(kept) == min(rows, 8)
    if rows > 8:
        gaps = np.diff([*kept, rows])
        assert kept[0] == 0
        assert gaps.max() <= 2 * rows / 8
    else:
        assert kept == list(range(rows))


def test_a_long_stream_is_never_held_whole() -> None:
    alive = itertools.count()
    most = 0

    class Counted:
        living = 0

        def __init__(self) -> None:
            Counted.living += 1

        def __del__(self) -> None:
            Counted.living -= 1

    def rows() -> Iterator[Counted]:
        nonlocal most
        for _ in range(10_000):
            most = max(most, Counted.living)
            next(alive)
            yield Counted()

    kept, count = thin(rows(), 10)
    assert (len(kept), count) == (10, 10_000)
    assert most <= 2 * 10 + 2


@pytest.mark.parametrize("calibration_rows", [0, 2, 96])
def test_calibration_bounds_no_other_use_of_held_out_rows(calibration_rows: int) -> None:
    found = prepared(toy(50), toy(1000), calibration_rows=calibration_rows)
    assert len(found.validation) == 1000
    assert found.held_out_of == 1000


def test_more_rows_than_are_held_are_taken_from_the_whole_file() -> None:
    rows = ({"prompt": f"{number:06d}", "completion": "x"} for number in range(MOST_HELD_OUT * 3))
    found = prepared(toy(50), rows)
    assert found.held_out_of == MOST_HELD_OUT * 3
    assert len(found.validation) == MOST_HELD_OUT
    tokenizer = byte_tokenizer()
    numbers = [
        int("".join(filter(str.isdigit, tokenizer.decode(prompt.tolist()))))
        for prompt, _ in found.validation
        if prompt is not None
    ]
    assert numbers[0] == 0
    assert numbers[-1] > 2.9 * MOST_HELD_OUT
    assert max(np.diff(numbers)) <= 6


def test_no_calibration_rows_mean_no_calibration_and_nothing_else(tmp_path: Path) -> None:
    def made(rows: list[dict[str, Any]], name: str, count: int) -> Pack:
        recipe = tascade.Recipe(max_new_tokens=8, spec=SpecConfig(calibration_rows=count))
        return adapt(tiny(), rows, validation=rows[:30], out=tmp_path / name, recipe=recipe).pack

    outputs = [{"completion": row["completion"]} for row in toy(60)]
    for rows, name in ((toy(60), "prompts"), (outputs, "outputs")):
        none = made(rows, f"{name}-0", 0)
        some = made(rows, f"{name}-3", 3)
        assert none.info.rows["calibrated"] == 0
        assert none.calibration.read_bytes() != some.calibration.read_bytes()
        assert none.info.rows["held_out"] == none.info.rows["held_out_of"] == 30
    assert made(toy(60), "again", 3).info.rows["calibrated"] == 3
    assert made(toy(60), "checked", 0).info.rows["checked"] == 4


def test_every_use_says_how_many_rows_it_had(tmp_path: Path, capfd: Any) -> None:
    data, held_out = tmp_path / "train.jsonl", tmp_path / "held_out.jsonl"
    for file, rows in ((data, toy(60)), (held_out, toy(700))):
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = inspect(data, tiny(), held_out=held_out).to_dict()
    assert found["held_out"] == {"rows": 700, "forecast": 200, "new_tokens": 200, "coverage": 700}
    assert enrich(data, tiny(), held_out=held_out).to_json()["held_out_rows"] == 500
    model, tokenizer = tiny()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    words = ["adapt", "-m", tmp_path / "model", "-d", data, "--validation", held_out]
    words += ["-o", tmp_path / "pack", "--max-new-tokens", 4, "--tailor", "exact"]
    ran = CliRunner().invoke(cli.app, [*map(str, words), "--json"], catch_exceptions=False)
    rows = json.loads(ran.stdout)["rows"]
    assert 0 < rows.pop("steps") <= rows.pop("stepped_tokens")
    assert rows == {
        "held_out": 700,
        "held_out_of": 700,
        "calibrated": 96,
        "cut": 96,  # of 4 tokens each
        "checked": 4,
        "differing": 0,
        "near_ties": 0,
    }
    listed = json.loads((tmp_path / "pack" / "vocabulary.json").read_text())
    assert listed["held_out"]["documents"] == 700
    shown = tailor(tmp_path / "pack", data, held_out=held_out).describe()
    assert "700 held-out answers" in shown


# --- whose answers ------------------------------------------------------------------------------


def test_held_out_answers_not_reached_are_left_out_never_references(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loaded = (*tiny(), "tiny")
    recipe = tascade.Recipe(max_new_tokens=8, spec=SpecConfig(own_seconds=24.5))
    found = prepare(loaded[1], ENDS, toy(60, NEVER), toy(50, NEVER), recipe, silent)
    Clock(monkeypatch)
    made = make_distill_data(loaded, found, recipe, silent, answering)
    assert len(made.train) == len(made.held_out) == 25
    assert (made.left_out["train"], made.left_out["held_out"]) == (35, 25)
    references = {answer.tobytes() for _, answer in (*found.train, *found.validation)}
    assert not references & {row[1].tobytes() for row in (*made.train, *made.held_out)}
    for (prompt, _), at in zip(made.held_out, made.places, strict=True):
        assert np.array_equal(prompt, found.validation[at][0])
    # Spread over the file, as the rows that were reached are.
    assert max(np.diff([*made.places, 50])) <= 6


def test_tokens_chosen_from_own_answers_say_what_was_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Clock(monkeypatch)
    timed = partial(tascade.Recipe, max_new_tokens=8, spec=SpecConfig(own_seconds=24.5))
    monkeypatch.setattr("tascade.enrich.choose.Recipe", timed)
    made = enrich(toy(60, NEVER), tiny(), held_out=toy(100, NEVER)[60:], own_answers=answering)
    told = made.to_json()
    assert told["held_out_rows"] == 25
    assert told["left_out"] == {"train": 35, "synthetic": 0, "held_out": 15}


def test_data_to_learn_from_is_read_as_it_was_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    loaded = (*tiny(), "tiny")
    recipe = tascade.Recipe(max_new_tokens=8, spec=SpecConfig(own_seconds=24.5))
    found = prepare(loaded[1], ENDS, toy(60), toy(50), recipe, silent)
    Clock(monkeypatch)
    made = make_distill_data(loaded, found, recipe, silent, answering)
    made.save(tmp_path / "data")
    again = DistillData.load(tmp_path / "data")
    assert (again.places, again.left_out) == (made.places, made.left_out)


@pytest.mark.parametrize("seconds", [0.0, 6.5])
def test_too_few_answers_in_time_are_an_error_that_names_the_time(
    monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    loaded = (*tiny(), "tiny")
    recipe = tascade.Recipe(max_new_tokens=8, spec=SpecConfig(own_seconds=seconds))
    found = prepare(loaded[1], ENDS, toy(60), toy(50), recipe, silent)
    Clock(monkeypatch)
    with pytest.raises(ConfigError, match="own_seconds"):
        make_distill_data(loaded, found, recipe, silent, answering)


@pytest.mark.parametrize(
    ("rows", "usual", "more"),
    [(39, 0, 0), (40, 2, 5), (600, 30, 67), (1300, 65, 65), (9000, 200, 200)],
)
def test_a_forecast_holds_more_of_few_rows_out(rows: int, usual: int, more: int) -> None:
    data = [{"prompt": f"item {at}", "completion": f"number {at % 7}"} for at in range(rows)]
    for least, count in ((0, usual), (64, more)):
        given = byte_tokenizer(), ENDS, data, None, tascade.Recipe(), silent
        found = prepare(*given, least_held_out=least)
        assert len(found.validation) == count
        assert len(found.train) == rows - count


def test_gold_targets_need_no_answers_to_training_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = (*tiny(), "tiny")
    recipe = tascade.Recipe(
        max_new_tokens=8, tune=TuneConfig(targets="gold"), spec=SpecConfig(own_seconds=24.5)
    )
    found = prepare(loaded[1], ENDS, toy(60), toy(80)[60:], recipe, silent)
    asked: list[bytes] = []
    generate = Decoder.generate

    def noted(decoder: Decoder, prompt: Any, *args: Any, **options: Any) -> Any:
        asked.append(np.asarray(prompt, np.int32).tobytes())
        return generate(decoder, prompt, *args, **options)

    monkeypatch.setattr(Decoder, "generate", noted)
    made = make_distill_data(loaded, found, recipe, silent, answering)
    assert made.train == found.train
    assert len(made.held_out) == 20
    assert not {p.tobytes() for p, _ in found.train if p is not None} & set(asked)


def test_a_list_of_own_answers_counts_and_is_judged_by_own_answers_alone(
    ticket_pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Pack.open(ticket_pack).copy_to(tmp_path / "pack")
    rows = list(load_examples(bundled.data_path("tickets", "train")))[:60]
    data = [{"prompt": row.prompt, "completion": "é" * 20} for row in rows]
    Clock(monkeypatch)
    timed = partial(tascade.Recipe, spec=SpecConfig(own_seconds=21.5))
    monkeypatch.setattr("tascade.builder.Recipe", timed)
    made = tailor(tmp_path / "pack", data[:40], held_out=data[40:], own=True)
    profile = made.gain.profile
    assert profile.counted == "own"
    assert profile.documents == 22
    assert profile.held_out is not None
    assert profile.held_out.documents == 20
    assert made.to_json()["left_out"] == {"train": 18, "held_out": 0}


def test_adapt_with_own_answers_and_a_head_lists_and_judges_own_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = list(load_examples(bundled.data_path("tickets", "train")))[:70]
    data = [{"prompt": row.prompt, "completion": "é" * 20} for row in rows]
    recipe = tascade.Recipe(
        dtype="float32",
        max_new_tokens=8,
        spec=SpecConfig(own_answers=True, calibration_rows=1, own_seconds=24.5),
        vocab=VocabConfig(head="exact"),
    )
    Clock(monkeypatch)
    out = tmp_path / "pack"
    made = adapt(bundled.model_path(), data[:40], validation=data[40:], out=out, recipe=recipe)
    assert made.pack.info.own_answers == 25
    assert made.pack.info.rows["references_kept"] == 15
    said = rows_used(made.pack.info.rows, made.pack.info.own_answers)
    assert "25 of 40 own answers, references for the rest" in said
    listed = json.loads(made.pack.vocabulary.read_text())
    assert (listed["counted"], listed["documents"]) == ("own", 25)
    assert listed["held_out"]["documents"] == 25
    late = dataclasses.replace(recipe, spec=dataclasses.replace(recipe.spec, own_seconds=3.0))
    with pytest.raises(ConfigError, match="own_seconds"):
        adapt(bundled.model_path(), data[:40], validation=data[40:], recipe=late)


def test_the_gate_says_how_many_prompts_were_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = itertools.islice(load_examples(bundled.data_path("tickets", "train")), 100)
    rows = [{"prompt": row.prompt, "completion": NEVER} for row in examples]
    brief = dataclasses.replace(BRIEF, targets="own", min_token_prob=0.8)
    recipe = tascade.Recipe(
        max_new_tokens=24, tune=brief, spec=SpecConfig(own_seconds=21.5), dtype="float32"
    )
    monkeypatch.setattr("tascade.enrich.train.trainer.EMBEDDING_WARMUP_STEPS", 1)
    Clock(monkeypatch)
    seen: set[tuple[str, str]] = set()

    def score(text: str, reference: str) -> float:
        seen.add((text, reference))
        return float(text == reference)

    tuned = tune(
        bundled.model_path(),
        rows[:60],
        held_out=[{**row, "completion": f"{number}"} for number, row in enumerate(rows[60:])],
        out=tmp_path / "tuned",
        recipe=recipe,
        score=score,
    )
    assert tuned.verdict.rows == 11
    assert tuned.verdict.left_out == 18
    assert "18 others were not reached" in tuned.verdict.describe()
    assert tuned.to_json()["distill_data"]["left_out"] == {
        "train": 38,
        "synthetic": 0,
        "held_out": 18,
    }
    # Each prompt's answer is scored against its own reference, not its neighbour's.
    model, tokenizer, _ = load_model(bundled.model_path(), dtype="float32")
    plain = Decoder(Target(model), NoDrafter(), None, tokenizer)
    params = SamplingParams(max_new_tokens=24, end_tokens=end_tokens(model, tokenizer))
    references = {reference for _, reference in seen}
    assert len(references) == 11
    for reference in references:
        prompt = encode_prompt(tokenizer, str(rows[60 + int(reference)]["prompt"]))
        assert (plain.generate(prompt, params).text, reference) in seen

"""Adapting, saving, opening and using a pack, on the bundled model and task."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tascade
from tascade import bundled
from tascade.builder import half_precision
from tascade.cli.console import rows_used
from tascade.config import GateConfig, SpecConfig, TuneConfig, VocabConfig
from tascade.core import Source
from tascade.data.encode import fingerprint
from tascade.data.load import load_examples
from tascade.errors import ConfigError, DataError, FingerprintError, PackError
from tascade.forecast.inspection import inspect
from tascade.index.corpus import CorpusIndex
from tascade.index.similar import SimilarIndex
from tascade.model import TaskModel
from tascade.pack import Pack
from tascade.pipeline import adapt_tuned
from tascade.testing import byte_tokenizer, tiny_model, toy_examples


@pytest.fixture(scope="module")
def task_model(ticket_pack: Path) -> TaskModel:
    return TaskModel.from_pretrained(ticket_pack, dtype="float32")


@pytest.fixture(scope="module")
def prompts() -> list[str]:
    rows = list(load_examples(bundled.data_path("tickets", "test")))
    return [str(row.prompt) for row in rows[::20]]


def test_answers_are_the_plain_models_and_take_fewer_steps(
    task_model: TaskModel, prompts: list[str]
) -> None:
    forwards = tokens = 0
    for prompt in prompts:
        fast = task_model.run(prompt)
        plain = task_model.plain.generate(task_model.encode(prompt), task_model.params())
        assert fast.tokens == plain.tokens
        assert fast.text == plain.text
        forwards, tokens = forwards + fast.forwards, tokens + fast.stepped_tokens
    assert tokens / forwards > 3


def test_own_answers_replace_the_references_as_far_as_time_allows(tmp_path: Path) -> None:
    rows = list(load_examples(bundled.data_path("sql", "train")))[:40]
    asked = [{"prompt": r.prompt, "completion": "never said by this model"} for r in rows]
    recipe = tascade.Recipe(
        dtype="float32",
        max_new_tokens=24,
        spec=SpecConfig(own_answers=True, calibration_rows=2),
    )
    some = asked[:2]
    made = tascade.adapt(
        bundled.model_path(), asked, validation=some, out=tmp_path / "own", recipe=recipe
    )
    assert made.pack.info.own_answers == len(rows)
    kept = {tuple(tokens.tolist()) for _, tokens in made.corpus.documents()}
    plain = [made.plain.generate(made.encode(r.prompt), made.params()).tokens for r in rows[::8]]
    assert {tuple(tokens) for tokens in plain} <= kept
    none = replace(recipe, spec=replace(recipe.spec, own_seconds=0.0))
    late = tascade.adapt(
        bundled.model_path(), asked, validation=some, out=tmp_path / "late", recipe=none
    )
    assert late.pack.info.own_answers == 0
    texts = [late.tokenizer.decode(tokens.tolist()) for _, tokens in late.corpus.documents()]
    assert all(text.startswith("never said by this model") for text in texts)


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often the dear steps on the way to a pack are taken."""
    found: Counter[str] = Counter()

    def counted(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            found[name] += name != "pack.json" or Path(args[1]).name == name
            return real(*args, **options)

        return call

    for owner, member in (
        (TaskModel, "__init__"),
        (CorpusIndex, "build"),
        (SimilarIndex, "build"),
    ):
        real = getattr(owner, member)
        monkeypatch.setattr(owner, member, counted(owner.__name__, real))
    monkeypatch.setattr(os, "replace", counted("pack.json", os.replace))
    for module in [m for name, m in sys.modules.items() if name.startswith("tascade.")]:
        if getattr(module, "fingerprint", None) is fingerprint:
            monkeypatch.setattr(module, "fingerprint", counted("fingerprint", fingerprint))
        if getattr(module, "tokenizer_fingerprint", None) is fingerprint:
            monkeypatch.setattr(
                module, "tokenizer_fingerprint", counted("fingerprint", fingerprint)
            )
    return found


@pytest.mark.parametrize("kept", [True, False], ids=["out", "temporary"])
def test_one_task_model_and_one_pack_json_on_the_way_to_a_pack(
    counts: Counter[str], kept: bool, tmp_path: Path
) -> None:
    model = tiny_model("llama", vocab_size=260), byte_tokenizer()
    recipe = tascade.Recipe(
        max_new_tokens=8,
        spec=SpecConfig(own_answers=True, calibration_rows=2),
        vocab=VocabConfig(head="exact"),
    )
    out = tmp_path / "pack" if kept else None
    made = tascade.adapt(model, toy_examples(60), out=out, recipe=recipe)
    once = {"TaskModel": 1, "pack.json": 1, "fingerprint": 1, "SimilarIndex": 1}
    assert counts == {**once, "CorpusIndex": 2}  # the references, then the model's own answers
    info = Pack.open(made.pack.path).info
    assert json.dumps(info.recipe) == json.dumps(made.pack.info.recipe)
    assert info.stages == ["tasc-spec", "vocab-tailor"]
    assert made.tailored is not None
    if kept:
        assert made.pack.path == out
        again = TaskModel.from_pretrained(tmp_path / "pack", model)
        for prompt in ("Ticket 7: the printer", "Ticket 9"):
            said = made.run(prompt).tokens
            assert said == again.run(prompt).tokens
            assert said == made.plain.generate(made.encode(prompt), made.params()).tokens


def test_a_tuned_and_tailored_pack_comes_about_in_the_same_way(
    counts: Counter[str], tmp_path: Path
) -> None:
    model = tiny_model("llama", vocab_size=260, eos_token_id=256), byte_tokenizer()
    model[0].generation_config.eos_token_id = 256
    brief = TuneConfig(
        tokens=4,
        targets="gold",
        init="mean",
        prompts=0.0,
        replay=0.0,
        epochs=0,
        min_token_prob=0.0,
        gate=GateConfig(refuse=False),
    )
    recipe = tascade.Recipe(
        max_new_tokens=8,
        tune=brief,
        spec=SpecConfig(calibration_rows=2),
        vocab=VocabConfig(head="exact"),
    )
    held_out = toy_examples(70)[60:]
    made, _ = adapt_tuned(
        model, toy_examples(60), validation=held_out, out=tmp_path / "pack", recipe=recipe
    )
    assert counts["pack.json"] == 1
    assert counts["TaskModel"] == 2  # the base, whose answers it is tuned by, and the tuned one
    assert made.pack.info.stages == ["tasc-ft", "tasc-spec", "vocab-tailor"]
    assert made.model.name_or_path == made.pack.model == str(tmp_path / "pack" / "model")
    listed = made.tailored
    assert listed is not None
    again = TaskModel.from_pretrained(tmp_path / "pack")
    prompt = "Ticket 7: the printer"
    said = made.run(prompt).tokens
    assert said == again.run(prompt).tokens
    assert said == made.plain.generate(made.encode(prompt), made.params()).tokens
    assert [path.name for path in tmp_path.iterdir()] == ["pack"]


def test_own_answers_need_prompts() -> None:
    recipe = tascade.Recipe(spec=SpecConfig(own_answers=True))
    with pytest.raises(DataError, match="no prompts to answer"):
        tascade.adapt(bundled.model_path(), [{"completion": "abc"}] * 4, recipe=recipe)


def test_sampled_answers_are_the_plain_models_too(
    task_model: TaskModel, prompts: list[str]
) -> None:
    options = {"temperature": 0.8, "top_p": 0.95, "seed": 11}
    for prompt in prompts[:4]:
        fast = task_model.run(prompt, **options)
        params = task_model.params(**options)
        assert fast.tokens == task_model.plain.generate(task_model.encode(prompt), params).tokens


def test_most_tokens_come_from_the_task(task_model: TaskModel, prompts: list[str]) -> None:
    sources = [s for prompt in prompts for s in task_model.run(prompt).sources]
    assert np.mean([s != Source.TARGET for s in sources]) > 0.6


def test_lists_streams_and_messages(task_model: TaskModel, prompts: list[str]) -> None:
    texts = task_model.generate(prompts[:2])
    assert texts == [task_model.generate(p) for p in prompts[:2]]
    assert "".join(task_model.stream(prompts[0])) == texts[0]
    assert task_model.generate([{"role": "user", "content": prompts[0]}]) == texts[0]


def test_a_stop_string_ends_the_text_and_the_stream_before_it(
    task_model: TaskModel, prompts: list[str]
) -> None:
    whole = str(task_model.generate(prompts[0]))
    stop = whole[10:14]
    expected = whole[: whole.index(stop)]
    assert task_model.generate(prompts[0], stop=stop) == expected
    assert "".join(task_model.stream(prompts[0], stop=stop)) == expected


def test_unknown_options_are_refused(task_model: TaskModel) -> None:
    with pytest.raises(ConfigError, match="temprature"):
        task_model.generate("x", temprature=1)
    with pytest.raises(ConfigError, match="empty"):
        task_model.decoder.generate([], task_model.params())


def test_a_pack_moves_and_says_what_it_was_made_from(
    task_model: TaskModel, prompts: list[str], tmp_path: Path
) -> None:
    task_model.save_pretrained(tmp_path / "copy")
    again = TaskModel.from_pretrained(tmp_path / "copy", dtype="float32")
    assert again.generate(prompts[0]) == task_model.generate(prompts[0])
    sources = {entry["role"]: entry for entry in again.pack.info.data}
    assert sources["train"]["rows"] == 2000
    assert len(sources["train"]["sha256"]) == 64
    assert again.pack.info.tascade == tascade.__version__


def test_another_tokenizer_is_refused(ticket_pack: Path) -> None:
    other = tiny_model("llama", vocab_size=260), byte_tokenizer()
    with pytest.raises(FingerprintError, match="made for another tokenizer"):
        TaskModel.from_pretrained(ticket_pack, other)


@pytest.mark.parametrize("name", ["calibration.json", "corpus/manifest.json", "pack.json"])
def test_a_damaged_pack_is_refused(ticket_pack: Path, tmp_path: Path, name: str) -> None:
    copy = tascade.pack.Pack.open(ticket_pack).copy_to(tmp_path / "copy")
    file = copy.path / name
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(PackError):
        TaskModel.from_pretrained(copy.path, dtype="float32")


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_in_memory_rows_and_models_without_files(family: str) -> None:
    model = tiny_model(family, vocab_size=260), byte_tokenizer()
    recipe = tascade.Recipe(max_new_tokens=24)
    made = tascade.adapt(model, toy_examples(60), recipe=recipe)
    prompt = "Ticket 7: the printer"
    plain = made.plain.generate(made.encode(prompt), made.params())
    assert made.run(prompt).tokens == plain.tokens


def test_outputs_alone_are_enough() -> None:
    model = tiny_model("llama", vocab_size=260), byte_tokenizer()
    made = tascade.adapt(model, [e.completion for e in toy_examples(60)])
    assert made.similar is None
    assert made.corpus.n_documents > 50
    assert made.generate("anything", max_new_tokens=8) is not None


def test_bad_rows_stop_the_work_or_are_listed(tmp_path: Path) -> None:
    model = tiny_model("llama", vocab_size=260), byte_tokenizer()
    data = tmp_path / "rows.jsonl"
    good = [json.dumps({"prompt": e.prompt, "completion": e.completion}) for e in toy_examples(50)]
    data.write_text("\n".join([*good[:20], '{"prompt": "x"}', *good[20:]]) + "\n")
    with pytest.raises(DataError, match=r"rows\.jsonl:21"):
        tascade.adapt(model, data, out=tmp_path / "pack")
    assert not (tmp_path / "pack").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["rows.jsonl"]
    recipe = tascade.Recipe(max_new_tokens=8, data=tascade.DataConfig(on_error="skip"))
    made = tascade.adapt(model, data, recipe=recipe)
    assert made.pack.info.data[0]["skipped"] == 1
    assert "rows.jsonl:21" in made.pack.info.data[0]["skipped_rows"][0][0]


def test_no_rows_and_an_existing_pack_are_refused(ticket_pack: Path, tmp_path: Path) -> None:
    model = tiny_model("llama", vocab_size=260), byte_tokenizer()
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(DataError, match="no examples"):
        tascade.adapt(model, tmp_path / "empty.jsonl")
    with pytest.raises(ConfigError, match="exists"):
        tascade.adapt(model, toy_examples(40), out=ticket_pack)


def test_inspect_predicts_before_anything_is_built(task_model: TaskModel) -> None:
    found = inspect(
        bundled.data_path("tickets", "train"),
        (task_model.model, task_model.tokenizer),
        held_out=bundled.data_path("tickets", "validation"),
    )
    assert found.to_dict()["verdict"] == "profits"
    assert "tokens" in found.describe()
    assert "own answers  about" in found.describe()
    assert found.to_dict()["new_tokens"]["fewer_steps"] > 2
    assert "new tokens would take" in found.describe()
    noise = np.random.default_rng(0).integers(97, 122, (124, 40))
    rows = [bytes(row.tolist()).decode() for row in noise]
    loaded = tiny_model("llama", vocab_size=260), byte_tokenizer()
    poor = inspect(rows[:60], loaded, held_out=rows[60:])
    assert poor.to_dict()["verdict"] == "will not profit"
    assert " at a time (`adapt --self`)" in poor.describe()  # drafts do not make up for a batch
    few = inspect(rows[:60], loaded)
    assert few.to_dict()["verdict"] == "cannot tell"
    gain = poor.to_dict()["new_tokens"]
    assert gain is None or gain["fewer_steps"] < 1.2


def test_inspect_can_ask_the_model_itself(task_model: TaskModel) -> None:
    loaded = task_model.model, task_model.tokenizer
    rows = list(load_examples(bundled.data_path("tickets", "train")))[:180]
    found = inspect(rows[:140], loaded, held_out=rows[140:], answers=20)
    told = found.to_dict()
    assert (told["answers"], told["replayed"], told["held_out"]["forecast"]) == (
        "own answers",
        20,
        20,
    )
    assert told["low"] <= told["speedup"] <= told["high"]
    assert told["verdict"] == "profits"
    assert len(told["said"]) == 3
    assert all(len(said) <= 90 for said in told["said"])
    answers = task_model.generate([row.prompt or "" for row in rows[140:]])
    for said in told["said"]:
        assert any(answer.startswith(said.rstrip("…")) for answer in answers)
        assert f"  it says      {json.dumps(said, ensure_ascii=False)}" in found.describe()


def test_half_precision_says_what_holds_and_what_float32_would_take() -> None:
    model = tiny_model("llama", vocab_size=260).to(torch.bfloat16), byte_tokenizer()
    recipe = tascade.Recipe(max_new_tokens=8, spec=SpecConfig(calibration_rows=1))
    made = tascade.adapt(model, toy_examples(40), recipe=recipe)
    if made.target.counts is not None:
        most = made.target.counts.most
        assert made.pack.info.rows["rows_alike"] == most
        for percent, told in ((60, True), (95, False)):
            said = rows_used({**made.pack.info.rows, "float32_percent": percent})
            assert f"up to {most} rows" in said
            assert ("--dtype float32" in said) is told
    made.target.counts = None  # as on a machine where none agree
    rows = made.pack.info.rows | half_precision(made)
    rows.pop("rows_alike", None)
    assert rows["float32_percent"] > 0
    said = rows_used({**rows, "float32_percent": 97})
    assert "up to rounding" in said
    assert "a float32 pass over 16 tokens took 97% of" in said
    assert "a float32 pass" not in rows_used({**rows, "float32_percent": 140})
    whole = tascade.adapt((model[0].float(), model[1]), toy_examples(40), recipe=recipe)
    assert "float32_percent" not in whole.pack.info.rows
    assert "rounding" not in rows_used(whole.pack.info.rows)

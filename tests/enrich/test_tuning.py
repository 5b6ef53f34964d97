"""`tascade tune` from data to an exported checkpoint, on the bundled model and task."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import tascade
from tascade import bundled
from tascade.bench.pack import BenchOptions, bench_pack
from tascade.bench.page import report_pack
from tascade.config import RENAMED, GateConfig, TuneConfig, VocabConfig
from tascade.data.load import load_examples
from tascade.enrich.stage import Tuned, adapt_tuned, tune
from tascade.enrich.tokens.stored import read_tokens
from tascade.errors import ConfigError, DataError, PackError
from tascade.tailor.stage import tailor

# Trained for seconds: what is tested is the way, not how good it gets.
OPEN = GateConfig(
    max_score_drop=1.0, min_agreement=0.0, min_adoption=0.0, max_length_ratio=9.0, max_kl=99
)
BRIEF = TuneConfig(tokens=12, prompts=0.1, epochs=1, batch=16, gate=OPEN)
RECIPE = tascade.Recipe(max_new_tokens=48, tune=BRIEF)


@pytest.fixture(autouse=True, scope="module")
def short() -> Iterator[None]:
    """New rows learn alone for four steps, three in a trial."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tascade.enrich.train.trainer.EMBEDDING_WARMUP_STEPS", 4)
        patch.setattr("tascade.enrich.train.train.PROBE_STEPS", 3)
        yield


def rows(split: str, count: int) -> list[dict[str, Any]]:
    examples = list(load_examples(bundled.data_path("tickets", split)))[:count]
    return [{"prompt": row.prompt, "completion": row.completion} for row in examples]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Tuned:
    out = tmp_path_factory.mktemp("tuned") / "tickets"
    held_out = rows("validation", 24)
    return tune(bundled.model_path(), rows("train", 120), held_out=held_out, out=out, recipe=RECIPE)


def test_the_export_opens_in_transformers_and_says_the_base_text(tuned: Tuned) -> None:
    assert tuned.path is not None
    model = AutoModelForCausalLM.from_pretrained(tuned.path)
    tokenizer = AutoTokenizer.from_pretrained(tuned.path)
    base = AutoTokenizer.from_pretrained(bundled.model_path())
    assert model.dtype == AutoModelForCausalLM.from_pretrained(bundled.model_path()).dtype
    merger = read_tokens(tuned.path)
    assert merger is not None
    assert len(merger) == 12
    assert model.config.vocab_size >= merger.first + 12
    for number, expansion in enumerate(merger.expansions):
        assert tokenizer.decode([merger.first + number]) == base.decode(list(expansion))
    prompt = rows("test", 1)[0]["prompt"]
    messages = [{"role": "user", "content": prompt}]
    options: dict[str, Any] = {"add_generation_prompt": True, "return_tensors": "pt"}
    ids = tokenizer.apply_chat_template(messages, **options)["input_ids"]
    assert torch.equal(ids, base.apply_chat_template(messages, **options)["input_ids"])
    answer = model.generate(ids, max_new_tokens=200, do_sample=False)[0, ids.shape[1] :]
    assert int(answer[-1]) == model.generation_config.eos_token_id or len(answer) == 200


def test_the_way_is_written_down_with_it(tuned: Tuned) -> None:
    assert tuned.path is not None
    about = json.loads((tuned.path / "tuning.json").read_text())
    assert about["gate"]["passed"] is True
    assert about["gate"]["rows"] == 12
    assert about["recipe"]["tokens"] == 12
    assert set(about["probe"]) == {"mean", "weighted", "first"}
    assert about["init"] == min(about["probe"], key=about["probe"].__getitem__)
    assert not list(tuned.path.parent.glob(".*")), "something was left behind"


def test_a_pack_of_a_tuned_model_drafts_in_its_tokens(tuned: Tuned, tmp_path: Path) -> None:
    assert tuned.path is not None
    recipe = tascade.Recipe(dtype="float32", max_new_tokens=48)
    spec = dataclasses.replace(recipe.spec, calibration_rows=4)
    recipe = dataclasses.replace(recipe, spec=spec)
    pack = tmp_path / "pack"
    made = tascade.adapt(
        tuned.path, rows("train", 60), validation=rows("validation", 8), out=pack, recipe=recipe
    )
    merger = read_tokens(tuned.path)
    assert merger is not None
    documents = [ids for _, ids in made.corpus.documents()]
    assert any((ids >= merger.first).any() for ids in documents)
    for ids in documents:
        assert len(merger.merge(merger.unmerge(ids))) == len(ids)
    for row in rows("test", 4):
        prompt = made.encode(row["prompt"])
        fast = made.decoder.generate(prompt, made.params()).tokens
        assert fast == made.plain.generate(prompt, made.params()).tokens


def test_a_tuned_model_takes_a_tailored_head_of_its_own_tokens(
    tuned: Tuned, tmp_path: Path
) -> None:
    assert tuned.path is not None
    recipe = tascade.Recipe(dtype="float32", max_new_tokens=48)
    recipe = dataclasses.replace(recipe, spec=tascade.SpecConfig(calibration_rows=2))
    data, held_out = rows("train", 60), rows("validation", 8)
    tascade.adapt(tuned.path, data, validation=held_out, out=tmp_path / "pack", recipe=recipe)
    made = tailor(tmp_path / "pack", data, held_out=held_out, config=VocabConfig(head="exact"))
    merger = read_tokens(tuned.path)
    assert merger is not None
    # Counted in the tokens that this model says: the new ones, not those they stand for.
    listed = set(made.gain.profile.ids.tolist())
    assert listed & set(range(merger.first, merger.first + 12))
    task_model = tascade.TaskModel.from_pretrained(tmp_path / "pack", dtype="float32")
    assert task_model.tailored is not None
    for row in rows("test", 4):
        said = task_model.run(row["prompt"])
        plain = task_model.plain.generate(task_model.encode(row["prompt"]), task_model.params())
        assert said.tokens == plain.tokens


def test_adapt_tuned_makes_one_pack_of_model_and_drafts(tmp_path: Path) -> None:
    recipe = dataclasses.replace(
        RECIPE,
        dtype="float32",
        tune=dataclasses.replace(BRIEF, init="mean", epochs=0),
        spec=dataclasses.replace(RECIPE.spec, calibration_rows=2),
    )
    pack = tmp_path / "pack"
    held_out = rows("validation", 8)
    made, tuned = adapt_tuned(
        bundled.model_path(), rows("train", 40), out=pack, validation=held_out, recipe=recipe
    )
    assert [p.name for p in tmp_path.iterdir()] == ["pack"]
    assert tuned.path == pack / "model"
    assert made.pack.info.stages == ["tasc-ft", "tasc-spec"]
    assert made.pack.info.model == str(bundled.model_path())
    assert made.pack.model == str(pack / "model")
    assert made.pack.info.own_answers == 40
    test = tmp_path / "test.jsonl"
    test.write_text("".join(json.dumps(row) + "\n" for row in rows("test", 4)))
    result = bench_pack(pack, test, dtype="float32", options=BenchOptions(repeats=1))
    assert list(result["methods"]) == ["plain", "tasc-ft", "tasc-ft+spec"]
    alone, drafted = result["methods"]["tasc-ft"], result["methods"]["tasc-ft+spec"]
    assert alone["guarantee"] == drafted["guarantee"] == "retrained"
    assert alone["tokens"] == drafted["tokens"]
    assert drafted["steps"] < alone["steps"] < alone["tokens"]
    assert drafted["quality"] == alone["quality"]
    page = report_pack(pack).read_text()
    gate = json.loads((pack / "model" / "tuning.json").read_text())["gate"]
    for text in (
        '<span class="badge retrained">',
        f"{gate['fewer_steps']:.2f}×",
        "12 new tokens",
        f"{gate['adoption']:.1%}",
        "new tokens 12,",  # a point of the curve
        "passed the gate",
    ):
        assert text in page, text
    about = json.loads((pack / "model" / "tuning.json").read_text())
    was = {name.rpartition(".")[2]: about["recipe"]["gate"][new]
           for name, new in RENAMED.items() if name.startswith("tune.gate.")}  # fmt: skip
    about["recipe"]["gate"] = {**was, "refuse": True}  # as 0.1.0 wrote it
    (pack / "model" / "tuning.json").write_text(json.dumps(about))
    assert report_pack(pack).read_text() == page
    (pack / "model" / "tuning.json").write_text('{"gate": {}}')
    with pytest.raises(PackError, match="how the pack's model was tuned"):
        report_pack(pack)


def test_the_gate_refuses_and_nothing_is_exported(tmp_path: Path) -> None:
    strict = dataclasses.replace(BRIEF, epochs=0, init="mean", gate=GateConfig())
    recipe = dataclasses.replace(RECIPE, tune=strict)
    out = tmp_path / "tuned"
    held_out = rows("validation", 12)
    made = tune(bundled.model_path(), rows("train", 40), held_out=held_out, out=out, recipe=recipe)
    assert made.path is None
    assert made.verdict.failures
    assert not out.exists()
    assert [p.name for p in tmp_path.iterdir()] == [".tuned.tuning"]


def test_a_stopped_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tascade.enrich.train.trainer import Trainer

    options: dict[str, Any] = {"held_out": rows("validation", 8), "recipe": RECIPE}
    model, data, out = bundled.model_path(), rows("train", 60), tmp_path / "tuned"

    def stop(stage: str, done: int, total: int | None) -> None:
        if stage == "tuning" and done == 6:
            raise KeyboardInterrupt

    saving = Trainer.run_saving
    monkeypatch.setattr(Trainer, "run_saving", lambda *a: saving(*a, seconds=0.0))
    with pytest.raises(KeyboardInterrupt):
        tune(model, data, out=out, progress=stop, **options)
    assert not out.exists()
    stages: list[tuple[str, int]] = []
    tune(
        model, data, out=out, resume=True, progress=lambda s, d, t: stages.append((s, d)), **options
    )
    assert ("tuning", 7) in stages
    assert ("tuning", 5) not in stages
    assert not [s for s, _ in stages if s == "answering training prompts"]


def test_what_cannot_be_done_is_said_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(ConfigError, match="exists already"):
        tune(bundled.model_path(), rows("train", 4), out=tmp_path / "there")
    outputs = [{"completion": row["completion"]} for row in rows("train", 50)]
    with pytest.raises(DataError, match="too few examples with prompts"):
        tune(bundled.model_path(), outputs, out=tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_missing_library_is_named_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"pip install 'tascade\[tune\]'"):
        tune("no-such-model", rows("train", 4), out=tmp_path / "new")


def test_several_processes_are_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="without torchrun"):
        tune("no-such-model", rows("train", 4), out=tmp_path / "new")


def test_answers_without_repetition_are_not_worth_a_token(tmp_path: Path) -> None:
    few = [{"prompt": f"say {i}", "completion": "abcdefghijkl"[i:]} for i in range(4)]
    brief = dataclasses.replace(RECIPE, max_new_tokens=2)
    with pytest.raises(DataError, match="nothing in these answers is worth a token"):
        tune(bundled.model_path(), few, held_out=few, out=tmp_path / "new", recipe=brief)
    assert not (tmp_path / "new").exists()

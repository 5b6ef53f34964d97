"""A pack with a tailored head, from examples to answers, on the bundled model."""

from __future__ import annotations

import dataclasses
import json
from functools import wraps
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import tascade
from tascade import bundled
from tascade.bench import pack as bench_module
from tascade.bench.memory import can_measure, measure_here
from tascade.bench.schema import validate
from tascade.cli import verbs as cli
from tascade.config import VocabConfig
from tascade.data.load import load_examples
from tascade.errors import ConfigError, FingerprintError, PackError
from tascade.forecast.inspection import inspect
from tascade.load import load_model
from tascade.model import TaskModel
from tascade.pack import Pack
from tascade.pipeline import tailor
from tascade.tailor.schedule import CheckSchedule
from tascade.testing import byte_tokenizer, tiny_model, toy_examples

run = CliRunner()
TRAIN, TEST = bundled.data_path("tickets", "train"), bundled.data_path("tickets", "test")


@pytest.fixture(scope="module")
def pack(ticket_pack: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model's pack, with a list that lacks a good deal."""
    out = tmp_path_factory.mktemp("tailored") / "tickets"
    Pack.open(ticket_pack).copy_to(out)
    made = tailor(out, TRAIN, config=VocabConfig(head="exact", tolerance=1.0))
    assert made.to_json()["vocabulary_bytes"]["saved"] > 0.5
    said = made.describe()
    assert "answers on average" in said or "an answer on average" in said
    assert "in time" in said
    found = made.to_json()["time"]
    assert 0 < found["small"] <= found["full"] <= found["step"]
    assert found["best"] >= 1
    return out


@pytest.fixture(scope="module")
def prompts() -> list[str]:
    return [str(row.prompt) for row in list(load_examples(TEST))[::40]]


@pytest.fixture(scope="module")
def wanted(ticket_pack: Path, prompts: list[str]) -> list[str]:
    task_model = TaskModel.from_pretrained(ticket_pack, dtype="float32")
    return [task_model.generate(prompt) for prompt in prompts]  # type: ignore[misc]


def test_exact_answers_are_the_plain_models(
    pack: Path, prompts: list[str], wanted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # As it would where a full head is slow; on this small model it may well not pay.
    monkeypatch.setattr(CheckSchedule, "plan", lambda self: 6)
    task_model = TaskModel.from_pretrained(pack, dtype="float32")
    assert task_model.tailored is not None
    results = [task_model.run(prompt) for prompt in prompts]
    assert [result.text for result in results] == wanted
    assert sum(result.extra["misses"] for result in results) > 0
    assert sum(result.forwards for result in results) < sum(len(r.tokens) for r in results) / 2
    plain = [task_model.plain.generate(task_model.encode(p), task_model.params()) for p in prompts]
    assert [result.text for result in plain] == wanted
    sampled = [
        way.generate(task_model.encode(prompts[0]), task_model.params(temperature=1.0, seed=4))
        for way in (task_model.decoder, task_model.plain)
    ]
    assert sampled[0].tokens == sampled[1].tokens


def test_the_tables_stay_in_the_file(pack: Path) -> None:
    task_model = TaskModel.from_pretrained(pack, dtype="float32")
    held = {name for name, _ in task_model.model.named_parameters()}
    assert not any("embed_tokens" in name or "lm_head" in name for name in held)
    full = TaskModel.from_pretrained(pack, dtype="float32", head="full")
    assert full.tailored is None
    assert any("embed_tokens" in name for name, _ in full.model.named_parameters())


def test_tables_stay_on_the_device_where_a_pack_wants_them_there(
    pack: Path, tmp_path: Path, prompts: list[str], wanted: list[str]
) -> None:
    copy = tmp_path / "pack"
    Pack.open(pack).copy_to(copy)
    words = ["tailor", str(copy), "--data", str(TRAIN), "--tolerance", "1.0", "--tables"]
    told = run.invoke(cli.app, [*words, "device"], catch_exceptions=False)
    assert "no memory is saved" in told.stdout
    task_model = TaskModel.from_pretrained(copy, dtype="float32")
    held = dict(task_model.model.named_parameters())
    assert any("embed_tokens" in name for name in held)
    assert task_model.generate(prompts) == wanted
    assert task_model.tailored is not None
    assert task_model.tailored.head.union.static < len(held["model.embed_tokens.weight"]) / 2
    refused = run.invoke(cli.app, [*words, "disk"])
    assert refused.exit_code != 0
    assert "vocab.tables" in refused.output + str(refused.exception)


def test_masked_answers_hold_nothing_that_is_not_listed(pack: Path, prompts: list[str]) -> None:
    task_model = TaskModel.from_pretrained(pack, dtype="float32", head="masked")
    assert task_model.tailored is not None
    listed = set(json_of(pack)["ids"])
    for prompt in prompts:
        said = task_model.run(prompt)
        assert set(said.tokens) <= listed | set(task_model.encode(prompt).tolist())


def json_of(pack: Path) -> dict[str, list[int]]:
    raw = json.loads((pack / "vocabulary.json").read_text())
    return {"ids": [token for token, _, _ in raw["tokens"]]}


def test_a_model_in_memory_lends_its_tables(
    pack: Path, prompts: list[str], wanted: list[str]
) -> None:
    model, tokenizer, _ = load_model(bundled.model_path(), dtype="float32")
    task_model = TaskModel.from_pretrained(pack, (model, tokenizer))
    assert task_model.generate(prompts) == wanted
    assert type(model.get_output_embeddings()) is torch.nn.Linear


@pytest.mark.parametrize("head", ["full", "exact"])
def test_a_list_of_prompts_is_decoded_together(
    pack: Path, prompts: list[str], wanted: list[str], head: str
) -> None:
    task_model = TaskModel.from_pretrained(pack, dtype="float32", head=head)
    assert task_model.generate(prompts, batch_size=3) == wanted
    with pytest.raises(ConfigError, match="batch_size is out of range"):
        task_model.generate(prompts, batch_size=0)
    streamed = dict.fromkeys(range(len(prompts)), 0)
    ids = [task_model.encode(prompt) for prompt in prompts]
    for which, new, _ in task_model.batches(2).stream(ids, task_model.params()):
        streamed[which] += len(new)
    assert all(streamed.values())


def test_adapt_with_a_head_keeps_the_list_and_checks_answers(tmp_path: Path) -> None:
    pair = (
        tiny_model("llama", vocab_size=260, eos_token_id=256, initializer_range=0.5),
        byte_tokenizer(),
    )
    recipe = tascade.Recipe(max_new_tokens=24, vocab=VocabConfig(head="exact", deferred=4))
    recipe = dataclasses.replace(recipe, spec=tascade.SpecConfig(calibration_rows=4))
    rows = [{"prompt": e.prompt, "completion": e.completion} for e in toy_examples(60)]
    made = tascade.adapt(pair, rows, out=tmp_path / "pack", recipe=recipe)
    assert made.tailored is not None
    assert made.pack.info.stages == ["tasc-spec", "vocab-tailor"]
    prompt = str(rows[3]["prompt"])
    plain = made.plain.generate(made.encode(prompt), made.params())
    assert made.run(prompt).tokens == plain.tokens


def test_inspect_predicts_what_tailor_gives(ticket_pack: Path, tmp_path: Path) -> None:
    data = {"held_out": bundled.data_path("tickets", "validation")}
    train = list(load_examples(TRAIN))[:200]
    copy = tmp_path / "pack"
    Pack.open(ticket_pack).copy_to(copy)
    found = inspect(train, bundled.model_path(), dtype="float32", **data)  # as the pack is
    predicted = found.to_dict()["tailored_vocabulary"]
    made = tailor(copy, train, **data, config=VocabConfig(head="exact"))
    given = made.to_json()
    assert [given.pop(key) for key in ("pack", "head", "tables")] == [str(copy), "exact", "file"]
    times = predicted.pop("time"), given.pop("time")
    assert set(times[0]) == set(times[1])  # measured twice
    assert predicted == given
    counted = dataclasses.replace(made.gain, time=None).brief()
    for part in counted.split("; "):
        assert part in found.describe()
    task_model = TaskModel.from_pretrained(copy)
    assert task_model.tailored is not None
    sizes = predicted["vocabulary_bytes"]
    assert sizes["tailored"] == task_model.tailored.head.union.nbytes
    whole, _, _ = load_model(bundled.model_path(), dtype="float32")
    assert sizes["full"] == whole.get_input_embeddings().weight.nbytes  # tied: once
    left = sum(p.nbytes for p in task_model.model.parameters()) + sizes["tailored"]
    weights = sum(p.nbytes for p in whole.parameters())
    assert predicted["model_saved"] == pytest.approx(1 - left / weights)


def test_inspect_promises_no_head_that_cannot_be_had() -> None:
    model = tiny_model("llama", vocab_size=260)
    head = model.get_output_embeddings()
    rows = [{"prompt": e.prompt, "completion": e.completion} for e in toy_examples(60)]
    assert inspect(rows, (model, byte_tokenizer())).vocabulary is not None
    plain = type(model).forward

    @wraps(plain)
    def shifted(self: Any, *args: Any, **options: Any) -> Any:
        out = plain(self, *args, **options)
        out.logits = out.logits + 1.0
        return out

    model.forward = MethodType(shifted, model)
    found = inspect(rows, (model, byte_tokenizer()))
    assert found.vocabulary is None
    assert found.to_dict()["tailored_vocabulary"] is None
    assert "tascade tailor" not in found.describe()
    assert model.get_output_embeddings() is head


def listed_texts(pack: Path) -> set[str]:
    raw = json.loads((pack / "vocabulary.json").read_text())
    return {text for _, _, text in raw["tokens"]}


def test_scripts_reach_the_list_from_flags_and_recipes(pack: Path, tmp_path: Path) -> None:
    # Of two tokens that all answers have, only one has letters: Greek alone leaves it out first.
    letters, marks = "tags", '"],'
    copy = tmp_path / "pack"
    Pack.open(pack).copy_to(copy)
    words = ["tailor", str(copy), "--data", str(TRAIN), "--tolerance", "20", "--head", "masked"]
    for scripts, kept, left_out in (
        ("code, greek", letters, marks),
        ("greek", marks, letters),
    ):
        result = run.invoke(cli.app, [*words, "--scripts", scripts], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        assert kept in listed_texts(copy)
        assert left_out not in listed_texts(copy)
    assert Pack.open(copy).info.recipe["vocab"]["scripts"] == ["greek"]
    tailored = TaskModel.from_pretrained(copy, dtype="float32").tailored
    assert tailored is not None
    assert tailored.config.scripts == ("greek",)
    rows = [{"prompt": e.prompt, "completion": e.completion} for e in load_examples(TRAIN)][:60]
    recipe = tascade.Recipe(
        max_new_tokens=8,
        spec=tascade.SpecConfig(calibration_rows=1),
        vocab=VocabConfig(head="masked", tolerance=20.0, scripts=("greek",)),
    )
    made = tascade.adapt(bundled.model_path(), rows, out=tmp_path / "made", recipe=recipe)
    assert marks in listed_texts(made.pack.path)
    assert letters not in listed_texts(made.pack.path)


@pytest.mark.slow
def test_the_verb_and_the_bench(
    pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Not in processes of their own, which take long to start.
    monkeypatch.setattr(
        bench_module, "measure_memory", lambda job, prompts, _: measure_here(job, prompts).to_json()
    )
    copy = tmp_path / "pack"
    Pack.open(pack).copy_to(copy)
    words = ["tailor", str(copy), "--data", str(TRAIN), "--tolerance", "1.0", "--json"]
    result = run.invoke(cli.app, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["tokens"] == len(json_of(copy)["ids"]) < found["of_tokens"] / 2
    assert found["held_out_low"] <= found["held_out_missing_per_answer"] <= found["held_out_high"]
    names = ("tailored-masked", "tailored-exact", "tasc-spec+tailored-exact")
    words = ["bench", str(copy), "-d", str(TEST), "--rows", "4", "--repeats", "1", "--json"]
    words += ["--dtype", "float32", "--max-new-tokens", "40", "--methods"]
    words += [",".join(("tasc-spec", *names))]
    result = run.invoke(cli.app, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    measured = json.loads(result.stdout)
    validate(measured)
    methods = measured["methods"]
    for name in names[1:]:
        assert methods[name]["identical"] == 4
        assert methods[name]["guarantee"] == "lossless"
        counts = methods[name]["settings"]["counts"]
        assert counts["checks"] + counts["full_steps"] > 0
    sizes = {name: m["memory"]["vocabulary_bytes"] for name, m in methods.items() if "memory" in m}
    assert set(sizes) == ({"plain", "tasc-spec", *names} if can_measure() else set())
    head = methods["tailored-masked"]["settings"]["head"]
    for name, size in sizes.items():
        assert size == head["bytes" if name in names else "of_bytes"]
    masked = methods["tailored-masked"]
    assert masked["guarantee"] == "approximate"
    # An answer without a miss is plain decoding's.
    assert masked["settings"]["counts"]["misses"] >= masked["differing"] > 0
    assert masked["settings"]["head"]["rows"] == found["tokens"]


def test_what_cannot_be_used_is_refused(pack: Path, ticket_pack: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no tailored vocabulary"):
        TaskModel.from_pretrained(ticket_pack, head="exact")
    with pytest.raises(ConfigError, match=r"vocab\.head"):
        TaskModel.from_pretrained(pack, head="tiny")
    copy = tmp_path / "pack"
    Pack.open(pack).copy_to(copy)
    text = (copy / "vocabulary.json").read_text()
    (copy / "vocabulary.json").write_text(text.replace('"vocab_size": 2048', '"vocab_size": 4096'))
    with pytest.raises(FingerprintError, match="another tokenizer"):
        TaskModel.from_pretrained(copy)
    (copy / "vocabulary.json").write_text(text[:-10])
    with pytest.raises(PackError, match="tailored vocabulary"):
        TaskModel.from_pretrained(copy)

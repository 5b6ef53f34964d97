"""`tascade drafter`, from examples to answers, on the bundled model."""

from __future__ import annotations

import json
import random
import string
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from tascade import bundled
from tascade.bench.schema import validate
from tascade.cli import verbs as cli
from tascade.config import VocabConfig
from tascade.data.load import load_examples
from tascade.draft.neural.merged import MergedDrafter
from tascade.draft.neural.stored import load_drafter
from tascade.errors import ConfigError, PackError
from tascade.load import load_model
from tascade.model import TaskModel
from tascade.pack import Pack
from tascade.pipeline import adapt, tailor
from tascade.train_drafter import train_drafter

run = CliRunner()
LEARNS = "training the drafter"
TRAIN, TEST = bundled.data_path("tickets", "train"), bundled.data_path("tickets", "test")


@pytest.fixture(scope="module")
def pack(ticket_pack: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("drafter") / "tickets"
    Pack.open(ticket_pack).copy_to(out)
    few = out.with_name("few.jsonl")
    lines = Path(TRAIN).read_text().splitlines()
    few.write_text("\n".join(lines[:160]))
    few.with_name("held-out.jsonl").write_text("\n".join(lines[160:180]))
    words = [
        "drafter",
        str(out),
        "--data",
        str(few),
        "--references",
        "--rounds",
        "2",
        "--json",
        "--force",
    ]
    words += ["--held-out", str(few.with_name("held-out.jsonl"))]
    result = run.invoke(cli.app, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    made = json.loads(result.stdout)
    assert made["rows"] == 160
    assert made["own_answers"] == 0
    assert made["acceptance"][0] > 0.2
    assert made["coverage"] > 0.9
    return out


@pytest.fixture(scope="module")
def prompts() -> list[str]:
    return [str(row.prompt) for row in list(load_examples(TEST))[::40]]


def test_answers_are_the_plain_models(pack: Path, ticket_pack: Path, prompts: list[str]) -> None:
    bare = TaskModel.from_pretrained(ticket_pack, dtype="float32")
    wanted = [bare.generate(prompt) for prompt in prompts]
    task = TaskModel.from_pretrained(pack, dtype="float32")
    assert isinstance(task.decoder.drafter, MergedDrafter)
    assert [task.generate(prompt) for prompt in prompts] == wanted
    drawn = task.params(temperature=1.0, seed=4)
    ids = task.encode(prompts[0])
    ways = [way.generate(ids, drawn).tokens for way in (task.decoder, task.plain)]
    assert ways[0] == ways[1]
    assert task.generate(prompts, batch_size=3) == wanted


def test_a_tailored_head_and_a_trained_drafter_go_together(
    pack: Path, prompts: list[str], tmp_path: Path
) -> None:
    both = tmp_path / "both"
    Pack.open(pack).copy_to(both)
    assert Pack.open(both).drafter.is_file()  # published with the rest
    tailor(both, TRAIN, config=VocabConfig(head="exact", tolerance=1.0))
    task = TaskModel.from_pretrained(both, dtype="float32")
    assert task.tailored is not None
    for prompt in prompts[:4]:
        plain = task.plain.generate(task.encode(prompt), task.params())
        assert task.run(prompt).tokens == plain.tokens


def test_the_bench_measures_it_alone_and_beside(pack: Path) -> None:
    words = ["bench", str(pack), "-d", str(TEST), "--rows", "4", "--repeats", "1", "--json"]
    words += ["--dtype", "float32", "--max-new-tokens", "40", "--no-memory", "--methods"]
    result = run.invoke(cli.app, [*words, "tasc-spec,taps,tasc-spec+taps"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    measured = json.loads(result.stdout)
    validate(measured)
    for name in ("tasc-spec", "taps", "tasc-spec+taps"):
        assert measured["methods"][name]["identical"] == 4
    assert measured["methods"]["taps"]["tokens_per_step"] > 1.05
    assert measured["methods"]["taps"]["by_source"]["other"] > 0


def test_own_answers_are_learned_from_by_default(ticket_pack: Path, tmp_path: Path) -> None:
    out = tmp_path / "own"
    Pack.open(ticket_pack).copy_to(out)
    rows = list(load_examples(TRAIN))[:30]
    data = [{"prompt": row.prompt, "completion": "never said"} for row in rows]
    told: list[str] = []
    made = train_drafter(
        out,
        data,
        held_out=data[:3],
        rounds=1,
        force=True,
        progress=lambda stage, *_: told.append(stage),
    )
    assert made.info.own_answers == made.info.rows == 30
    assert "30 the model's own" in made.describe()
    assert list(dict.fromkeys(told))[-2:] == ["reading the model's states", "training the drafter"]
    assert "drafter" in Pack.open(out).info.stages
    Pack.open(out).drafter.write_bytes(b"of another model")
    train_drafter(out, data, held_out=data[:3], rounds=1, force=True)  # is replaced, and not asked
    assert TaskModel.from_pretrained(out, dtype="float32").generate(str(rows[0].prompt))


def test_a_run_that_was_stopped_goes_on_with_its_answers_and_its_training(
    ticket_pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = list(load_examples(TRAIN))[:40]
    data = [{"prompt": row.prompt, "completion": "never said"} for row in rows]
    given: dict[str, Any] = {"held_out": data[:3], "rounds": 4, "force": True}
    monkeypatch.setattr("tascade.draft.neural.training._KEPT_SECONDS", 0.0)
    monkeypatch.setattr("tascade.draft.neural.training._BATCH_TOKENS", 600)

    class Stop(Exception):
        pass

    def until(stage: str, least: int) -> Any:
        def tell(now: str, done: int, total: int | None) -> None:
            told.append((now, done))
            if now == stage and done >= least:
                raise Stop

        return tell

    weights = []
    for name, stops in (("straight", ()), ("stopped", ("answering training prompts", LEARNS))):
        out = tmp_path / name
        Pack.open(ticket_pack).copy_to(out)
        for at, stage in enumerate(stops):
            told: list[tuple[str, int]] = []
            with pytest.raises(Stop):
                train_drafter(out, data, progress=until(stage, 9), resume=at > 0, **given)
            assert {p.name for p in tmp_path.iterdir()} == {"straight", name, f".{name}.drafter"}
        told = []
        train_drafter(out, data, progress=until("", 0), resume=bool(stops), **given)
        if stops:
            assert min(done for stage, done in told if stage == LEARNS) >= 8
            assert min(done for stage, done in told if stage.startswith("answering")) >= 3
        assert not (tmp_path / f".{name}.drafter").exists()
        weights.append(load_file(Pack.open(out).drafter))
    assert weights[0].keys() == weights[1].keys()
    assert all((part == weights[1][name]).all() for name, part in weights[0].items())
    with pytest.raises(Stop):
        train_drafter(out, data, progress=until(LEARNS, 1), **given)
    with pytest.raises(ConfigError, match="another"):  # of other rows
        train_drafter(out, data[:30], resume=True, **given)


@pytest.mark.parametrize("planted", ["taps", "weights"])
def test_a_drafter_that_reads_other_states_is_told_of(
    planted: str, pack: Path, prompts: list[str], tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    Pack.open(pack).copy_to(copy)
    model, tokenizer, _ = load_model(bundled.model_path(), dtype="float32")
    if planted == "taps":
        file = Pack.open(copy).drafter
        with safe_open(file, "pt") as opened:
            about = dict(opened.metadata())
        shape = json.loads(about["shape"])
        assert shape["taps"] == [2, 3]
        shape["taps"] = [0, 1]
        save_file(load_file(file), file, about | {"shape": json.dumps(shape)})
    else:
        with torch.no_grad():  # but for those that mark the weights
            model.model.layers[0].mlp.down_proj.weight.view(-1)[64:] *= 0.0
    task = TaskModel.from_pretrained(copy, (model, tokenizer))
    with pytest.warns(UserWarning, match="reads other states than it learned"):
        made = task.run(prompts[0])
    assert made.tokens == task.plain.generate(task.encode(prompts[0]), task.params()).tokens


def test_what_cannot_be_learned_from_is_refused(pack: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="rounds"):
        train_drafter(pack, TRAIN, rounds=0)
    alone = [{"completion": f"answer {n}"} for n in range(60)]
    with pytest.raises(ConfigError, match="nothing to train a drafter on"):
        train_drafter(pack, alone, own=False, rounds=1, force=True)
    draws = random.Random(0)
    noise = ["".join(draws.choices(string.ascii_letters + string.digits, k=40)) for _ in range(80)]
    chance = [{"prompt": f"ask {n}", "completion": text} for n, text in enumerate(noise)]
    with pytest.raises(ConfigError, match="would not pay") as raised:
        train_drafter(pack, chance, own=False, rounds=1)
    assert "--force" in str(raised.value)
    broken = tmp_path / "broken"
    Pack.open(pack).copy_to(broken)
    Pack.open(broken).drafter.write_bytes(b"none")
    with pytest.raises(PackError, match="trained drafter"):
        TaskModel.from_pretrained(broken).generate("x")


def test_adapt_trains_one_where_the_forecast_says_that_it_pays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = list(load_examples(TRAIN))[:60]
    given: dict[str, Any] = {"validation": list(load_examples(TEST))[:24], "dtype": "float32"}
    given |= {"max_new_tokens": 40, "drafter": True, "own_answers": True, "tailor": "exact"}
    given |= {"recipe": {"spec": {"calibration_rows": 2}, "vocab": {"tolerance": 1.0}}}
    monkeypatch.setattr("tascade.train_drafter.WORTH", 100.0)
    with pytest.warns(UserWarning, match="no drafter was trained, it would not pay"):
        without = adapt(bundled.model_path(), data, out=tmp_path / "without", **given)
    assert not without.pack.drafter.exists()
    assert without.pack.info.stages == ["tasc-spec", "vocab-tailor"]
    assert 0.0 < without.pack.info.drafter["most_gain"] < 100.0  # by the clock
    monkeypatch.setattr("tascade.train_drafter.WORTH", 0.0)
    both = adapt(bundled.model_path(), data, out=tmp_path / "with", **given)
    assert isinstance(both.decoder.drafter, MergedDrafter)
    assert both.pack.info.stages == ["tasc-spec", "drafter", "vocab-tailor"]
    stored = load_drafter(both.pack.drafter, both.model, both.pack.info.fingerprint)[2]
    assert stored.own_answers == stored.rows == len({str(row.prompt) for row in data})
    opened = TaskModel.from_pretrained(tmp_path / "with", dtype="float32")
    assert isinstance(opened.decoder.drafter, MergedDrafter)
    for row in given["validation"][:4]:
        ids = opened.encode(row.prompt)
        assert opened.decoder.generate(ids, opened.params()).tokens == (
            opened.plain.generate(ids, opened.params()).tokens
        )

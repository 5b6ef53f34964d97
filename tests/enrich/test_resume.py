"""`--resume` goes on with the run that was stopped, and with no other."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import tascade
from brief import BRIEF, OPEN
from tascade import pipeline
from tascade.errors import ConfigError, TascadeError
from tascade.pipeline import adapt_tuned, tune
from tascade.testing import byte_tokenizer, tiny_model, toy_examples

TUNING = dataclasses.replace(BRIEF, tokens=2, prompts=1.0, batch=8)
RECIPE = tascade.Recipe(max_new_tokens=4, tune=TUNING)


@pytest.fixture(autouse=True, scope="module")
def short() -> Iterator[None]:
    """New rows learn alone for two steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tascade.enrich.train.trainer.EMBEDDING_WARMUP_STEPS", 2)
        yield


def tiny(seed: int = 0) -> tuple[Any, Any]:
    model = tiny_model("llama", seed, vocab_size=260, eos_token_id=256)
    model.generation_config.eos_token_id = 256
    return model, byte_tokenizer()


def rows(count: int, start: int = 0) -> list[dict[str, Any]]:
    examples = toy_examples(start + count)[start:]
    return [{"prompt": e.prompt, "completion": e.completion} for e in examples]


@pytest.fixture
def stopped(tmp_path: Path) -> tuple[Path, tuple[Any, Any], dict[str, Any]]:
    """A run that was stopped once its data were made: where to, its model, its options."""
    model = tiny()
    options: dict[str, Any] = {"held_out": rows(8, 60), "recipe": RECIPE}
    out = tmp_path / "tuned"

    def stop(stage: str, done: int, total: int | None) -> None:
        if stage == "choosing tokens":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(model, rows(60), out=out, progress=stop, **options)
    return out, model, options


Stopped = tuple[Path, tuple[Any, Any], dict[str, Any]]


def test_the_same_run_goes_on(stopped: Stopped) -> None:
    out, (model, tokenizer), options = stopped
    stages: list[str] = []
    made = tune(
        # A copy of model and data is the same model and data.
        (copy.deepcopy(model), tokenizer),
        rows(60),
        out=out,
        resume=True,
        progress=lambda stage, done, total: stages.append(stage),
        **options,
    )
    assert made.path == out
    assert "answering training prompts" not in stages
    assert not list(out.parent.glob(".*"))


def other_weight(model: Any) -> Any:
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] += 1e-3
    return model


CHANGES: dict[str, tuple[str, Any]] = {
    "model": ("model", lambda m: ((other_weight(m[0]), m[1]), rows(60), {})),
    "config": ("model", lambda m: ((_other_config(m[0]), m[1]), rows(60), {})),
    "half": ("model", lambda m: ((m[0].to(torch.bfloat16), m[1]), rows(60), {})),
    "data": ("training rows", lambda m: (m, [*rows(59), rows(1, 99)[0]], {})),
    "order": ("training rows", lambda m: (m, rows(60)[::-1], {})),
    "held_out": ("held-out rows", lambda m: (m, rows(60), {"held_out": rows(8, 61)})),
    "tokens": ("tune.tokens 2 (now 3)", lambda m: (m, rows(60), _recipe(tokens=3))),
    "targets": ("tune.targets 'gold'", lambda m: (m, rows(60), _recipe(targets="own"))),
    "limit": (
        "max_new_tokens 4 (now 5)",
        lambda m: (m, rows(60), {"recipe": dataclasses.replace(RECIPE, max_new_tokens=5)}),
    ),
}


def _other_config(model: Any) -> Any:
    model.config.rope_parameters = {**model.config.rope_parameters, "rope_theta": 5000.0}
    return model


def _recipe(**tuning: Any) -> dict[str, Any]:
    return {"recipe": dataclasses.replace(RECIPE, tune=dataclasses.replace(TUNING, **tuning))}


@pytest.mark.parametrize("change", list(CHANGES))
def test_another_run_is_refused_and_told_what_differs(stopped: Stopped, change: str) -> None:
    out, model, options = stopped
    told, made = CHANGES[change]
    other, data, given = made(model)
    with pytest.raises(ConfigError) as refused:
        tune(other, data, out=out, resume=True, **{**options, **given})
    assert told in str(refused.value)
    assert not out.exists()


def test_what_comes_after_training_may_change(stopped: Stopped) -> None:
    out, model, options = stopped
    gate = dataclasses.replace(OPEN, max_kl=98)
    assert tune(model, rows(60), out=out, resume=True, **{**options, **_recipe(gate=gate)}).path


def test_a_run_like_it_is_not_begun_anew_unasked(stopped: Stopped) -> None:
    out, model, options = stopped
    work = out.with_name(".tuned.tuning")
    there = sorted(path.name for path in work.rglob("*"))
    with pytest.raises(ConfigError, match="would be lost"):
        tune(model, rows(60), out=out, **options)
    assert sorted(path.name for path in work.rglob("*")) == there


def test_a_run_that_does_not_say_what_it_is_of_is_refused(stopped: Stopped) -> None:
    out, model, options = stopped
    (out.with_name(".tuned.tuning") / "run.json").unlink()
    with pytest.raises(ConfigError, match="without resume to begin anew"):
        tune(model, rows(60), out=out, resume=True, **options)
    assert tune(model, rows(60), out=out, **options).path == out


def test_a_pack_that_was_refused_costs_no_second_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = dataclasses.replace(RECIPE, spec=tascade.SpecConfig(calibration_rows=1))
    options: dict[str, Any] = {"validation": rows(8, 60), "recipe": recipe}
    model = tmp_path / "base"
    for part in tiny():
        part.save_pretrained(model)

    def refuse(*given: Any) -> None:
        raise TascadeError("planted")

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "prove", refuse)
        with pytest.raises(TascadeError, match="planted"):
            adapt_tuned(str(model), rows(60), out=tmp_path / "pack", **options)
    stages: list[tuple[str, int]] = []
    made, _ = adapt_tuned(
        str(model),
        rows(60),
        out=tmp_path / "pack",
        resume=True,
        progress=lambda stage, done, total: stages.append((stage, done)),
        **options,
    )
    assert not [stage for stage, _ in stages if stage == "tuning"]
    assert made.pack.info.stages == ["tasc-ft", "tasc-spec"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "pack"]

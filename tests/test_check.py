"""The comparison with plain decoding that a new pack goes through."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import tascade
from tascade.builder import answering, foretell
from tascade.config import SpecConfig
from tascade.core import silent
from tascade.data.prepare import Prepared, prepare
from tascade.decode import loop
from tascade.draft.budget import Budget
from tascade.draft.costs import CostTable
from tascade.enrich.distill_data import make_distill_data
from tascade.errors import TascadeError
from tascade.pipeline import adapt
from tascade.testing import byte_tokenizer, tiny_model, toy_examples
from tascade.util.progress import duration

RECIPE = tascade.Recipe(max_new_tokens=24, spec=SpecConfig(calibration_rows=2))
ROWS = [{"prompt": e.prompt, "completion": e.completion} for e in toy_examples(60)]
OWN = dataclasses.replace(RECIPE, spec=dataclasses.replace(RECIPE.spec, own_answers=True))


@pytest.fixture(autouse=True)
def known_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring the costs of steps takes seconds, and no test here is about them."""
    table = CostTable((1, 64), (1e-3, 2e-3))
    monkeypatch.setattr("tascade.model.measure_cost", lambda target: table)


def tiny(dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    model = tiny_model("llama", vocab_size=260, eos_token_id=256)
    model.generation_config.eos_token_id = 256
    return model.to(dtype), byte_tokenizer()


def plant(monkeypatch: pytest.MonkeyPatch, spoil: Any) -> None:
    """Have verification take other tokens, wherever a draft is verified."""
    walk = loop.walk

    def spoilt(tree: Any, logits: Any, *given: Any, **named: Any) -> Any:
        return walk(tree, spoil(logits) if len(tree) else logits, *given, **named)

    monkeypatch.setattr(loop, "walk", spoilt)


def second_best(logits: torch.Tensor) -> torch.Tensor:
    out = logits.clone()
    out[torch.arange(len(out)), logits.argmax(1)] = -1e9
    return out


def twins(pair: tuple[Any, Any], apart: float) -> tuple[Any, Any]:
    """A model that can hardly decide between each even id and the next."""
    with torch.no_grad():
        head = pair[0].get_output_embeddings().weight
        head[1::2] = head[0::2] * (1 - apart)
    return pair


def swap_twins(logits: torch.Tensor) -> torch.Tensor:
    return logits.view(len(logits), -1, 2).flip(2).flatten(1)


def test_a_verification_that_is_broken_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plant(monkeypatch, second_best)
    with pytest.raises(TascadeError, match="changed an answer"):
        adapt(tiny(), ROWS, out=tmp_path / "pack", recipe=RECIPE)
    assert not list(tmp_path.iterdir())


def test_drafts_are_compared_where_none_would_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Budget, "plan", lambda self: (0, 0.0))
    plant(monkeypatch, second_best)
    with pytest.raises(TascadeError, match="changed an answer"):
        adapt(tiny(), ROWS, recipe=RECIPE)


@pytest.mark.parametrize("held_out", [None, [{"completion": "no prompt"}] * 3])
def test_without_held_out_prompts_training_prompts_are_compared(
    monkeypatch: pytest.MonkeyPatch, held_out: Any
) -> None:
    made = adapt(tiny(), ROWS[:20], validation=held_out, recipe=RECIPE)
    assert made.pack.info.rows["checked"] == 4
    plant(monkeypatch, second_best)
    with pytest.raises(TascadeError, match="changed an answer"):
        adapt(tiny(), ROWS[:20], validation=held_out, recipe=RECIPE)


def test_what_is_broken_is_refused_before_the_long_work(monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, second_best)
    stages: list[str] = []

    def tell(stage: str, done: int, total: int | None) -> None:
        stages.append(stage)

    with pytest.raises(TascadeError, match="changed an answer"):
        adapt(tiny(), ROWS, recipe=OWN, progress=tell)
    loaded = (*tiny(), "tiny")
    prepared = prepare(loaded[1], (256,), ROWS, None, RECIPE, silent)
    with pytest.raises(TascadeError, match="changed an answer"):
        make_distill_data(loaded, prepared, RECIPE, tell, answering)
    assert "indexing outputs" in stages
    assert "answering training prompts" not in stages


def test_near_ties_are_counted_and_let_pass(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plant(monkeypatch, swap_twins)
    made = adapt(twins(tiny(), 1e-6), ROWS, out=tmp_path / "pack", recipe=OWN)
    rows = made.pack.info.rows
    assert rows["checked"] == 3  # all that are held out of 60
    assert rows["differing"] == rows["near_ties"] > 0
    with pytest.raises(TascadeError, match="changed an answer"):
        adapt(twins(tiny(), 1e-2), ROWS, recipe=RECIPE)


def test_the_time_that_is_foretold_is_that_of_the_training_prompts(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A second a token, 8 tokens an answer, 8 s of calibration and 17 s a comparison at most."""
    task = SimpleNamespace(task_model=SimpleNamespace(cost=CostTable([1, 64], [1.0, 1.125])))
    row = np.zeros(2, np.int32), np.zeros(2, np.int32)
    spec = SpecConfig(own_answers=True, own_seconds=600, calibration_seconds=8)
    recipe = tascade.Recipe(max_new_tokens=8, spec=spec)
    for train, seconds in ((50, 400), (100, 600)):
        caplog.clear()
        with caplog.at_level(logging.INFO, "tascade.data"):
            foretell(task, Prepared(train=[row] * train, validation=[row]), recipe, silent)
        assert f"own answers (--own-seconds) {duration(seconds)}, calibration 8 s" in caplog.text


def test_a_sound_pack_has_no_differences() -> None:
    rows = adapt(tiny(), ROWS, recipe=RECIPE).pack.info.rows
    assert (rows["checked"], rows["differing"], rows["near_ties"]) == (3, 0, 0)


def test_half_precision_is_compared_too_and_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, swap_twins)
    # The closest there is: a step of the significand's last place.
    close = adapt(twins(tiny(torch.bfloat16), 2**-8), ROWS, recipe=RECIPE).pack.info.rows
    assert close["checked"] == 3
    assert close["differing"] == close["near_ties"] > 0
    monkeypatch.undo()
    plant(monkeypatch, second_best)
    with pytest.warns(UserWarning, match="by more than a tie up to rounding"):
        far = adapt(tiny(torch.bfloat16), ROWS, recipe=RECIPE).pack.info.rows
    assert far["differing"] > far["near_ties"]


def test_what_is_compared_is_not_learned_from(tmp_path: Path) -> None:
    none = dataclasses.replace(RECIPE, spec=SpecConfig(calibration_rows=0))
    few = dataclasses.replace(none, max_new_tokens=2)
    kept = [adapt(tiny(), ROWS, recipe=recipe) for recipe in (none, few)]
    saved = [made.pack.calibration.read_bytes() for made in kept]
    assert saved[0] == saved[1]
    own = dataclasses.replace(OWN, spec=dataclasses.replace(OWN.spec, own_seconds=0.0))
    made = adapt(
        tiny(),
        ROWS,
        recipe=dataclasses.replace(own, spec=dataclasses.replace(own.spec, calibration_rows=0)),
    )
    assert made.pack.calibration.read_bytes() == saved[0]

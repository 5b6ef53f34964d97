"""The gate: what it lets pass, what it refuses, and by how much."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tascade.config import GateConfig
from tascade.enrich.gate import Answer, GateResult, evaluate, paired_bootstrap
from tascade.enrich.tokens.merger import TokenMerger
from tascade.errors import TascadeError

MERGER = TokenMerger([(1, 2, 3), (4, 5)], 100)
LOOSE = GateConfig(min_agreement=0.0)


def equal(text: str, reference: str) -> float:
    return float(text == reference)


def said(texts: list[str], ids: list[int] | None = None) -> list[Answer]:
    return [Answer(np.array([100, 101, 9] if ids is None else ids, np.int32), t) for t in texts]


def verdict(
    tuned: list[Answer], base: list[Answer], wanted: list[str], **options: object
) -> GateResult:
    config = options.pop("config", LOOSE)
    return evaluate(tuned, base, wanted, MERGER, config, equal, **options)  # type: ignore[arg-type]


def test_the_base_models_own_answers_in_fewer_steps_pass() -> None:
    texts = ["a", "b", "c", "d"]
    found = verdict(said(texts), said(texts), ["a", "b", "x", "y"], config=GateConfig())
    assert found.passed
    assert found.fewer_steps == pytest.approx(6 / 3)
    assert (found.adoption, found.agreement, found.bytes_ratio) == (1.0, 1.0, 1.0)
    assert (found.score, found.base_score, found.against_base.value) == (0.5, 0.5, 0.0)


def test_a_model_that_ignores_its_new_tokens_is_refused() -> None:
    texts = ["a", "b"]
    found = verdict(said(texts, [1, 2, 3, 4, 5, 9]), said(texts), texts)
    assert found.adoption == 0.0
    assert found.fewer_steps == 1.0
    assert "the share of possible steps saved is 0.000, 0.950 below 0.950" in found.failures


def test_worse_answers_are_refused_saying_by_how_much() -> None:
    texts = [str(i) for i in range(100)]
    worse = ["wrong", "wrong", *texts[2:]]
    found = verdict(said(worse), said(texts), texts)
    assert not found.passed
    assert "the task score less the base model's is -0.020, 0.010 below -0.010" in found.failures
    assert "refused: the task score" in found.describe()
    assert verdict(said(["wrong", *texts[1:]]), said(texts), texts).passed


def test_worse_than_the_control_is_refused_too() -> None:
    texts = [str(i) for i in range(100)]
    base = ["wrong"] * 4 + texts[4:]
    found = verdict(said(base), said(base), texts, control=said(texts))
    assert found.against_control is not None
    assert found.against_control.value == pytest.approx(-0.04)
    assert [f for f in found.failures if "the control's" in f]
    assert found.control_agreement == pytest.approx(0.96)


def test_broken_json_other_lengths_and_drift_are_refused() -> None:
    wanted = ['{"a": 1}'] * 10
    base = said(wanted)
    broken = verdict(said(['{"a": 1'] * 2 + wanted[2:]), base, wanted, config=LOOSE)
    assert broken.valid == 0.8
    assert [f for f in broken.failures if "valid JSON" in f]
    longer = verdict(said(['{"a": 1, "b": 2}'] * 10), base, wanted)
    assert [f for f in longer.failures if "2.000 times as long" in f]
    assert [f for f in verdict(base, base, wanted, drift=0.6).failures if "KL divergence" in f]
    plain = verdict(said(["x"]), said(["x"]), ["x"])
    assert plain.valid is None


def test_agreement_can_be_asked_for() -> None:
    texts = [str(i) for i in range(10)]
    other = ["x"] * 3 + texts[3:]
    wanted = ["y"] * 10
    assert verdict(said(other), said(texts), wanted).passed
    strict = replace(LOOSE, min_agreement=0.8)
    found = verdict(said(other), said(texts), wanted, config=strict)
    assert found.failures == ["agreement with the base model is 0.700, 0.100 below 0.800"]


def test_the_interval_covers_the_difference_and_shrinks() -> None:
    rng = np.random.default_rng(0)
    theirs = rng.random(4000) < 0.5
    ours = np.where(rng.random(4000) < 0.1, ~theirs, theirs)
    few, many = paired_bootstrap(ours[:100], theirs[:100]), paired_bootstrap(ours, theirs)
    assert many.low < 0.0 < many.high
    assert many.high - many.low < (few.high - few.low) / 3
    assert paired_bootstrap([1, 1, 1], [0, 0, 0]).low == 1.0


@pytest.mark.parametrize(("tuned", "base", "wanted"), [([], [], []), (["a"], ["a", "b"], ["a"])])
def test_nothing_to_judge_is_an_error(tuned: list[str], base: list[str], wanted: list[str]) -> None:
    with pytest.raises(TascadeError, match="nothing to judge"):
        verdict(said(tuned), said(base), wanted)

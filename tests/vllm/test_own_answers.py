"""`adapt --self` has vLLM answer: the same words as one by one, in the real engine."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import tascade
from tascade import bundled
from tascade.answers import own
from tascade.config import SpecConfig
from tascade.core import Source
from tascade.data.load import load_examples


def test_own_answers_in_vllm_are_those_of_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own, "ENGINE_SECONDS", -1.0)  # so few answers are not worth it
    rows = list(load_examples(bundled.data_path("sql", "train")))[:36]
    asked = [{"prompt": row.prompt, "completion": row.completion} for row in rows]
    # A reference that the model never says: what is in the pack is what it said.
    asked += [{"prompt": row.prompt, "completion": "never said"} for row in rows[:4]]
    recipe = tascade.Recipe(
        dtype="float32", max_new_tokens=24, spec=SpecConfig(own_answers=True, calibration_rows=2)
    )
    events: list[tuple[str, int, int | None]] = []
    made = tascade.adapt(
        bundled.model_path(),
        asked,
        validation=asked[:2],
        out=tmp_path / "pack",
        recipe=recipe,
        progress=lambda *event: events.append(event),
    )
    told = [(done, total) for stage, done, total in events if stage.endswith("in vLLM")]
    assert told[-1] == (40, 40)
    assert {done for done, _ in told} > {40}
    assert made.pack.info.own_answers == 40
    assert (
        "references_kept" not in made.pack.info.rows or not made.pack.info.rows["references_kept"]
    )
    documents = dict(made.corpus.documents())
    params = made.params(temperature=0, max_new_tokens=24)
    for at, row in enumerate(asked):
        plain = made.plain.generate(made.encode(str(row["prompt"])), params)
        assert set(plain.sources) == {int(Source.TARGET)}
        assert documents[at].tolist() == plain.tokens, at
    assert os.listdir(tmp_path) == ["pack"]

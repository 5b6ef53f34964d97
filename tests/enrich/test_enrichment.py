"""`tascade enrich` on a bundled task: tokens that save steps on rows they were not chosen from."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer
from typer.testing import CliRunner

from tascade import bundled
from tascade.cli import app
from tascade.data.encode import fingerprint
from tascade.data.load import load_examples
from tascade.enrich.boundaries import boundary_free_shares
from tascade.enrich.choose import TOKENS_FILE, Enrichment, choose_tokens, enrich
from tascade.enrich.tokens.curve import StepCurve, stop_at
from tascade.enrich.tokens.extend import check_extension
from tascade.enrich.tokens.merger import TokenMerger, split_at
from tascade.enrich.tokens.mine import MiningRules
from tascade.errors import ConfigError, DataError
from tascade.load import load_model

TASK = "tickets"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Enrichment, Path]:
    out = tmp_path_factory.mktemp("enrich") / "tokens"
    found = enrich(bundled.data_path(TASK), str(bundled.model_path()), out=out)
    return found, out


def test_steps_fall_on_held_out_answers(made: tuple[Enrichment, Path]) -> None:
    found, _ = made
    steps = found.curve.steps
    assert list(steps) == sorted(steps, reverse=True)
    assert found.fewer_steps > 1.5
    assert 0 < len(found.expansions) <= found.chosen
    assert str(len(found.expansions)) in found.describe()


def test_the_written_tokenizer_says_and_reads_the_same(made: tuple[Enrichment, Path]) -> None:
    _, out = made
    base = AutoTokenizer.from_pretrained(bundled.model_path())
    written = json.loads((out / TOKENS_FILE).read_text())
    assert written["fingerprint"] == fingerprint(base)
    merger = TokenMerger(written["expansions"], written["first"])
    rows = list(load_examples(bundled.data_path(TASK, "test")))
    report = check_extension(
        base,
        AutoTokenizer.from_pretrained(out),
        merger,
        [str(row.prompt) for row in rows],
        [str(row.completion) for row in rows],
    )
    assert report.passed, report.failures


def test_as_many_as_asked_for() -> None:
    rows = list(load_examples(bundled.data_path(TASK)))[:300]
    data = [{"prompt": row.prompt, "completion": row.completion} for row in rows]
    found = enrich(data, str(bundled.model_path()), tokens=30)
    assert len(found.expansions) == 30
    assert found.stopped == "as many as asked for"
    far = enrich(data, str(bundled.model_path()), tokens=5000)
    assert len(far.expansions) < 5000
    assert "frequent enough" in far.stopped


def test_no_token_holds_the_end_of_an_answer(made: tuple[Enrichment, Path]) -> None:
    found, _ = made
    base = AutoTokenizer.from_pretrained(bundled.model_path())
    ends = {*base.all_special_ids}
    assert all(not ends & set(expansion) for expansion in found.expansions)


def test_tokens_that_often_stand_over_a_boundary_are_not_chosen() -> None:
    loaded = load_model(bundled.model_path())
    a, b, c, d, e = (np.array(x, np.int32) for x in ([10, 11], [12, 13], [14], [15], [16, 17]))
    # Behind a, b always comes, and mostly as a matter of course; behind c it may be b or d.
    said = [[a, b, e]] * 60 + [[c, b, e]] * 60 + [[c, d, e]] * 60
    rows = [(None, np.concatenate(parts)) for parts in said]
    places = [[]] * 60 + [[1]] * 120
    cuts = [np.array(at, np.int32) for at in places]
    rules = MiningRules(tokens=20, least=5)
    free = choose_tokens((rows, rows), loaded, rules, wanted=20)
    within = choose_tokens((rows, rows), loaded, rules, wanted=20, boundaries=(cuts, cuts))
    assert any(14 in token for token in free.expansions)
    assert not any(14 in token for token in within.expansions)
    merger = TokenMerger(within.expansions, within.first)
    assert boundary_free_shares(merger, [row[1] for row in rows], cuts).min() >= 0.7
    steps = sum(len(merger.merge(piece)) for row, at in zip(rows, cuts, strict=True)
                for piece in split_at(row[1], at))  # fmt: skip
    assert within.curve.steps[-1] == steps + len(rows)  # and the end of each answer
    assert free.curve.steps[-1] < within.curve.steps[-1] < within.curve.steps[0]


def test_own_answers_are_what_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = list(load_examples(bundled.data_path(TASK)))[:60]
    data = [{"prompt": row.prompt, "completion": "zzz qqq zzz qqq zzz"} for row in rows]
    options: dict[str, Any] = {"tokens": 20, "rules": None}
    wrong = enrich(data, str(bundled.model_path()), **options)
    own = enrich(data, str(bundled.model_path()), own_answers=True, **options)
    base = AutoTokenizer.from_pretrained(bundled.model_path())
    assert "zzz" in "".join(base.decode(e) for e in wrong.expansions)
    assert "zzz" not in "".join(base.decode(e) for e in own.expansions)
    assert len(own.expansions) > 3


def test_bad_calls(made: tuple[Enrichment, Path]) -> None:
    _, out = made
    with pytest.raises(ConfigError, match="exists already"):
        enrich(bundled.data_path(TASK), str(bundled.model_path()), out=out)
    with pytest.raises(DataError, match="too few"):
        enrich([{"prompt": "a", "completion": "b"}], str(bundled.model_path()))
    assert os.listdir(out.parent) == [out.name]


def test_stops_where_little_is_saved() -> None:
    curve = StepCurve((0, 25, 50, 75), (1000, 500, 490, 489), 10)
    assert stop_at(curve)[0] == 50
    assert stop_at(curve, row_share=0.001)[0] == 25
    # Fewer tokens at a time need to save less.
    assert stop_at(StepCurve((0, 5, 10), (10_000, 9_980, 9_000), 10))[0] == 10
    assert stop_at(StepCurve((0, 5, 10), (10_000, 9_995, 9_000), 10))[0] == 0
    assert stop_at(StepCurve((0,), (10,), 1)) == (0, "no more tokens were chosen")


def test_the_command(tmp_path: Path) -> None:
    arguments = ["enrich", str(bundled.data_path(TASK)), "-m", str(bundled.model_path())]
    result = CliRunner().invoke(
        app, [*arguments, "--tokens", "10", "--json", "--out", str(tmp_path / "t")]
    )
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["tokens"] == 10
    assert (tmp_path / "t" / "tokenizer.json").exists()

"""What long work shows of itself is true: what is said when, and how long it says it will take."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

import tascade
from tascade.answers import own as answers
from tascade.core import Generation
from tascade.decode.sampling import SamplingParams
from tascade.testing import byte_tokenizer, tiny_model
from tascade.util import progress
from tascade.util.progress import Lines, shown, spelt

ROWS = [{"prompt": f"p{i}", "completion": f"answer {i % 3}"} for i in range(30)]


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def told(*events: tuple[float, str, int, int | None]) -> list[str]:
    """The lines that come of (second, stage, done, total)."""
    clock, lines = Clock(), []
    tell = Lines(lines.append, clock)
    for clock.now, *event in events:
        tell(*event)  # type: ignore[arg-type]
    return lines


def test_a_stage_is_named_when_it_begins() -> None:
    assert told((0, "reading", 0, None), (50, "answering", 0, 600)) == [
        "reading ...",
        "answering (600) ...",
    ]


def test_now_and_then_the_time_that_is_left_is_told() -> None:
    lines = told(*((second, "answering", second * 2, 600) for second in range(0, 100, 5)))
    assert lines[1] == "  answering: 20 of 600, about 5 min left"
    assert len(lines) == 1 + 9
    assert told((0, "a", 0, None), (30, "a", 7, None))[1] == "  a: 7"


@given(st.floats(0, 1e6))
def test_a_duration_is_near_what_it_is(seconds: float) -> None:
    number, unit = spelt(seconds).removeprefix("about ").split()
    size = {"s": 1, "min": 60, "h": 3600}[unit]
    assert abs(float(number) * size - seconds) <= max(1, 0.51 * size)


def test_where_nobody_looks_nothing_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    for asked in (None, False):
        with shown(asked) as tell:
            tell("working", 0, 3)
    assert capsys.readouterr() == ("", "")
    with shown(True) as tell:
        tell("working [b]", 0, 3)
    assert capsys.readouterr() == ("", "working [b] (3) ...\n")
    heard: list[Any] = []
    with shown(lambda *event: heard.append(event)) as tell:
        tell("working", 0, 3)
    assert heard == [("working", 0, 3)]


def test_bars_on_a_terminal() -> None:
    drawn = io.StringIO()
    console = Console(file=drawn, force_terminal=True, width=100)
    with progress.bars(console) as tell:
        tell("loading the model", 0, None)
        tell("answering [1]", 0, 600)
        tell("answering [1]", 300, 600)
    text = drawn.getvalue()
    assert "answering [1]" in text
    assert "300/600" in text
    assert "0/?" not in text


def test_what_adapt_tells_is_what_it_does() -> None:
    heard: list[tuple[str, int, int | None]] = []
    loaded = tiny_model("llama", 3, vocab_size=260), byte_tokenizer()
    recipe = tascade.Recipe(
        max_new_tokens=8, spec=tascade.SpecConfig(own_answers=True, calibration_rows=4)
    )
    tascade.adapt(loaded, ROWS, recipe=recipe, progress=lambda *event: heard.append(event))
    stages = list(dict.fromkeys(stage for stage, _, _ in heard))
    wanted = [
        "loading the model",
        "reading train",
        "indexing outputs",
        "indexing prompts",
        "measuring the model's steps",
        "comparing with plain decoding",
        "answering training prompts",
        "calibrating",
    ]
    assert [stage for stage in stages if stage in wanted] == wanted
    for stage, done, total in heard:
        assert total is None or 0 <= done <= total, stage
    begun = {stage: done for stage, done, _ in reversed(heard)}
    assert begun["answering training prompts"] == 0


def test_own_answers_say_how_many_there_is_time_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "tascade.data")
    clock, heard = Clock(), []
    monkeypatch.setattr(answers.time, "monotonic", clock)

    class Slow:
        def generate(self, prompt: Any, params: Any) -> Generation:
            clock.now += 2.0
            return Generation([1, 2])

    rows = [(np.asarray([i], np.int32), np.asarray([1], np.int32)) for i in range(600)]
    found, _ = answers.own_answers(
        Slow(),  # type: ignore[arg-type]
        rows,
        SamplingParams(),
        seconds=100.0,
        tell=lambda *event: heard.append(event),
    )
    assert {stage for stage, _, _ in heard} == {"answering training prompts"}
    assert [record.getMessage() for record in caplog.records] == [
        "there is time for about 50 of 600 own answers in 2 min (--own-seconds); all would take "
        "about 20 min"
    ]
    assert len(found) == 51  # the one under way when time was up
    assert heard[-1][1:] == (51, 51)

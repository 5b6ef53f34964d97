"""A benchmark that is stopped shows what it has, goes on where it was, and fits into its time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tascade import bundled
from tascade.bench import unfinished
from tascade.bench.methods import DecoderMethod, Request
from tascade.bench.remarks import remarks
from tascade.bench.run import run_bench
from tascade.bench.schema import validate
from tascade.bench.timing import About, BenchSettings
from tascade.core import Generation
from tascade.decode.loop import Decoder
from tascade.decode.sampling import SamplingParams
from tascade.decode.target import Target
from tascade.draft.budget import NoDrafter
from tascade.errors import ConfigError
from tascade.testing import RandomTreeDrafter, byte_tokenizer, tiny_model

ABOUT = About("tiny", "float32", "test.jsonl", "0" * 64, command="pytest")
PARAMS = SamplingParams(max_new_tokens=4)
ROWS = [Request([70, 71, first], "wanted", str(first)) for first in range(10)]


class Counted(DecoderMethod):
    """A method that is interrupted at one of its runs."""

    runs, stop_at = 0, 0

    def run(self, request: Request) -> Generation:
        type(self).runs += 1
        if type(self).runs == self.stop_at:
            raise KeyboardInterrupt
        return super().run(request)


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return Decoder(Target(tiny_model("llama", vocab_size=260)), NoDrafter(), None, byte_tokenizer())


def bench(decoder: Decoder, stop_at: int = 0, **options: Any) -> dict[str, Any]:
    Counted.runs, Counted.stop_at = 0, stop_at
    given = {name: options.pop(name) for name in ("minutes", "optional") if name in options}
    settings = BenchSettings(PARAMS, options.pop("repeats", 3), chunk=2, **given)
    methods = [DecoderMethod("plain", decoder, PARAMS), Counted("other", decoder, PARAMS)]
    methods += [DecoderMethod(name, decoder, PARAMS) for name in settings.optional]
    found = run_bench(methods, ROWS, settings, about=ABOUT, **options)
    validate(found)
    return found


@pytest.mark.parametrize(
    ("stop_at", "repeats", "rows"), [(4, 1, 2), (10, 1, 9), (11, 1, 10), (25, 2, 10)]
)
def test_what_was_measured_is_shown(
    decoder: Decoder, stop_at: int, repeats: int, rows: int
) -> None:
    found = bench(decoder, stop_at)
    said = found["settings"]
    assert (said["repeats"], found["data"]["examples"]) == (repeats, rows)
    assert (said["asked_repeats"], said["asked_rows"]) == (3, 10)
    assert found["methods"]["other"]["identical"] == rows
    assert len(found["methods"]["other"]["seconds"]) == repeats


def test_what_was_timed_is_whole_where_the_untimed_pass_is_stopped(decoder: Decoder) -> None:
    drafting = Decoder(decoder.target, RandomTreeDrafter(256, 1), None, byte_tokenizer())
    found = bench(drafting, 30 + 4)
    assert Counted.runs == 30 + 4
    assert found["settings"]["repeats"] == 3
    assert found["methods"]["other"]["identical"] == 10


def test_with_nothing_measured_there_is_nothing(decoder: Decoder) -> None:
    with pytest.raises(KeyboardInterrupt):
        bench(decoder, 1)


def test_it_goes_on_where_it_was(decoder: Decoder, tmp_path: Path) -> None:
    kept, whole = tmp_path / "kept.json", bench(decoder)
    bench(decoder, 25, kept=kept)
    assert kept.is_file()
    found = bench(decoder, kept=kept, resume=True)
    assert Counted.runs == 10 + 10  # one round, and the pass that is not timed
    assert not kept.exists()
    for name, method in whole["methods"].items():
        for key in ("tokens", "steps", "tokens_per_step", "quality", "identical"):
            assert found["methods"][name].get(key) == method.get(key)
        assert len(found["methods"][name]["seconds"]) == 3
    assert "asked_rows" not in found["settings"]


def test_another_benchmark_is_not_gone_on_with(decoder: Decoder, tmp_path: Path) -> None:
    kept = tmp_path / "kept.json"
    with pytest.raises(ConfigError, match="no benchmark to go on with"):
        bench(decoder, kept=kept, resume=True)
    bench(decoder, 25, kept=kept)
    with pytest.raises(ConfigError, match="was another"):
        bench(decoder, kept=kept, resume=True, repeats=4)
    raw = json.loads(kept.read_text())
    for damage in (
        {**raw, "rows": raw["rows"][:-1]},
        {**raw, "methods": {"plain": [[[1.0], [{}]]]}},
        {**raw, "methods": 3},
        [],
    ):
        kept.write_text(json.dumps(damage))
        with pytest.raises(ConfigError, match="no benchmark to go on with"):
            unfinished.load(kept, raw["key"])


def test_rounds_and_then_rows_are_left_out_where_time_is_short(decoder: Decoder) -> None:
    found = bench(decoder, minutes=1e-9)
    assert found["settings"]["repeats"] == 1
    assert found["data"]["examples"] == 1  # the first row, which told how long all would take
    assert bench(decoder, minutes=60.0)["settings"] | {"repeats": 3} == bench(decoder)["settings"]


def test_few_rows_are_told_of_with_what_others_may_give(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock is that of the answers: drafts help with every second row."""
    now = [0.0]
    run = DecoderMethod.run

    def slow(method: DecoderMethod, request: Request) -> Generation:
        now[0] += 1.0 if method.name == "tasc-spec" and request.prompt[-1] % 2 else 3.0
        return run(method, request)

    monkeypatch.setattr(DecoderMethod, "run", slow)
    monkeypatch.setattr("tascade.bench.timing.time.perf_counter", lambda: now[0])
    methods = [DecoderMethod(name, decoder, PARAMS) for name in ("plain", "tasc-spec")]
    settings = BenchSettings(PARAMS, 2, chunk=2)
    found = run_bench(methods, ROWS, settings, about=ABOUT)
    ratio, ends = (found["methods"]["tasc-spec"][name] for name in ("speedup", "by_rows"))
    assert ratio["low"] == ratio["high"] == pytest.approx(1.5)  # each round alike
    assert ends["low"] < 1.4
    assert 1.6 < ends["high"] < 3.0
    assert any("10 rows say little of others" in said for said in remarks(found))
    many = run_bench(methods, 3 * ROWS, settings, about=ABOUT)
    assert not any("say little" in said for said in remarks(many))


def clock_of_answers(
    monkeypatch: pytest.MonkeyPatch, seconds: Callable[[Request], float]
) -> list[float]:
    """A time in a list, which only answers take: so many ``seconds`` each."""
    now, run = [0.0], DecoderMethod.run

    def slow(method: DecoderMethod, request: Request) -> Generation:
        now[0] += seconds(request)
        return run(method, request)

    monkeypatch.setattr(DecoderMethod, "run", slow)
    return now


def test_rows_that_turn_out_long_are_fewer(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock is that of the answers: the first chunk's take a second, the others' ten."""
    now = clock_of_answers(monkeypatch, lambda request: 1.0 if request.prompt[-1] < 2 else 10.0)
    monkeypatch.setattr("tascade.bench.timing.time.perf_counter", lambda: now[0])
    found = bench(decoder, minutes=2.0)
    seconds = sum(sum(method["seconds"]) for method in found["methods"].values())
    assert 60 < seconds <= 1.4 * 120
    assert 2 <= found["data"]["examples"] < 8
    assert found["settings"]["repeats"] == 2
    assert bench(decoder, minutes=20.0)["data"]["examples"] == 10


def test_where_a_row_takes_long_a_few_are_measured_once_and_in_time(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock is that of the answers, ten seconds each: two methods, and one pass not timed."""
    now = clock_of_answers(monkeypatch, lambda request: 10.0)
    monkeypatch.setattr("tascade.bench.timing.time.perf_counter", lambda: now[0])
    for minutes, rows in ((1.0, 2), (2.0, 2), (0.4, 1)):
        now[0] = 0.0
        found = bench(decoder, minutes=minutes)
        assert found["data"]["examples"] == rows, minutes
        assert now[0] <= max(60 * minutes, 30.0), minutes
        assert found["settings"]["repeats"] == (2 if minutes == 2.0 else 1)


def test_time_that_is_left_goes_to_more_rows_and_then_to_another_round(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock is that of the answers: the first row's takes fifteen seconds, the others' one."""
    now = clock_of_answers(monkeypatch, lambda request: 1.0 if request.prompt[-1] else 15.0)
    monkeypatch.setattr("tascade.bench.timing.time.perf_counter", lambda: now[0])
    found = bench(decoder, minutes=2.0)
    assert (found["data"]["examples"], found["settings"]["repeats"]) == (4, 2)
    assert 60 < now[0] <= 120


def test_methods_that_leave_no_time_for_rows_are_left_out_where_nobody_named_them(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The clock is that of the answers, ten seconds each, of three methods or of two."""
    now = clock_of_answers(monkeypatch, lambda request: 10.0)
    monkeypatch.setattr("tascade.bench.timing.time.perf_counter", lambda: now[0])
    found = bench(decoder, minutes=2.0, optional=("slow",))
    assert found["methods"]["slow"] == {"skipped": "no time for it in 2 min", "settings": {}}
    assert (found["data"]["examples"], found["settings"]["repeats"]) == (2, 2)
    assert len(found["methods"]["other"]["seconds"]) == 2
    assert now[0] <= 120
    now[0] = 0.0
    assert "tokens" in bench(decoder, minutes=20.0, optional=("slow",))["methods"]["slow"]
    # What was left out before a stop is left out behind it.
    now[0], kept = 0.0, tmp_path / "kept.json"
    options: dict[str, Any] = {"minutes": 2.0, "optional": ("slow",), "kept": kept}
    assert bench(decoder, stop_at=4, **options)["settings"]["stopped"]
    assert set(json.loads(kept.read_text())["methods"]) == {"plain", "other"}
    now[0] = 0.0
    again = bench(decoder, resume=True, **options)
    assert "skipped" in again["methods"]["slow"]
    assert again["methods"]["other"]["identical"] == 2


@pytest.mark.parametrize("minutes", [0.9, 1.1, 1.3, 1.5, 1.7, 1.9, 2.3, 2.7, 3.1, 4.0])
def test_all_methods_do_all_rows_however_many_were_added(
    minutes: float, decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock is that of the answers, the first two of them long; rows come by ones and twos."""
    now = clock_of_answers(monkeypatch, lambda request: 15.0 if request.prompt[-1] < 1 else 4.0)
    monkeypatch.setattr("tascade.bench.timing.time.perf_counter", lambda: now[0])
    found = bench(decoder, minutes=minutes)
    for method in found["methods"].values():
        assert method["tokens"] == PARAMS.max_new_tokens * found["data"]["examples"]
        assert len(method["seconds"]) == found["settings"]["repeats"]


def test_the_warm_up_and_the_untimed_pass_count_as_time(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock is that of the answers: a second each, the warm-up's too."""
    now = clock_of_answers(monkeypatch, lambda request: 1.0)
    monkeypatch.setattr("tascade.bench.timing.time.perf_counter", lambda: now[0])
    rows = len(ROWS)
    assert bench(decoder, minutes=7.1 * rows / 60)["settings"]["repeats"] == 3  # 3 * 2 and 1
    assert bench(decoder, minutes=6.1 * rows / 60)["settings"]["repeats"] == 2
    warmed = bench(decoder, minutes=7.1 * rows / 60, warmup=ROWS)
    assert (warmed["settings"]["repeats"], warmed["data"]["examples"]) == (2, rows)


def test_a_slow_warm_up_keeps_to_its_part_of_the_time(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock is that of the answers, ten seconds each: a minute of ten is a row for each."""
    warmed: list[Request] = []

    def ten(request: Request) -> float:
        if request.id == "warm":
            warmed.append(request)
        return 10.0

    now = clock_of_answers(monkeypatch, ten)
    monkeypatch.setattr("tascade.bench.run.time.monotonic", lambda: now[0])
    rows = [Request([70, 71, first], "wanted", "warm") for first in range(6)]
    for minutes, runs in ((1.0, 2), (5.0, 5), (0.0, 12)):
        now[0] = 0.0
        warmed.clear()
        bench(decoder, minutes=minutes, warmup=rows)
        assert len(warmed) == runs, minutes


def test_the_last_round_is_shown_once_with_the_rest(decoder: Decoder) -> None:
    shown: list[dict[str, Any]] = []
    bench(decoder, on_repeat=shown.append)
    assert len(shown) == 2


def test_the_command_writes_what_it_has_when_it_is_told_to_end(
    ticket_pack: Path, tmp_path: Path
) -> None:
    out = tmp_path / "bench.json"
    command = [sys.executable, "-m", "tascade.cli", "bench", str(ticket_pack), "--out", str(out)]
    command += ["--data", str(bundled.data_path("tickets", "test")), "--no-memory"]
    command += [
        "--methods",
        "plain,tasc-spec",
        "--rows",
        "4",
        "--repeats",
        "1000",
        "--minutes",
        "0",
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env) as running:
        assert running.stderr is not None
        for line in running.stderr:  # the table of the first round
            if "tasc-spec" in line:
                running.send_signal(signal.SIGTERM)
                break
        running.stderr.read()
        assert running.wait() == 0
    found = json.loads(out.read_text())
    assert found["settings"]["repeats"] >= 1
    assert found["settings"]["asked_repeats"] == 1000

"""Own answers in bulk are those that are given one by one, in whatever way, stopped or not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Generator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import tascade
from tascade.answers import engine as engines
from tascade.answers import own
from tascade.answers.engine import EngineError, VllmEngine, why_not_vllm
from tascade.answers.kept import KeptAnswers
from tascade.answers.own import Bulk, own_answers
from tascade.config import SpecConfig
from tascade.core import IntArray, Progress, Row, silent
from tascade.decode.batch import BatchDecoder
from tascade.decode.loop import Decoder
from tascade.decode.sampling import SamplingParams
from tascade.errors import ConfigError
from tascade.model import TaskModel
from tascade.own_answers import answers_folder
from tascade.testing import byte_tokenizer, tiny_model, toy_examples

RECIPE = tascade.Recipe(max_new_tokens=12, spec=SpecConfig(own_answers=True, calibration_rows=2))


def loaded() -> tuple[Any, Any]:
    return tiny_model("llama", vocab_size=260), byte_tokenizer()


def examples(count: int = 40) -> list[dict[str, Any]]:
    """The prompts of some rows occur twice."""
    toys = list(toy_examples(30))
    some = [toys[number % 30] for number in range(count)]
    return [{"prompt": e.prompt, "completion": e.completion} for e in some]


@pytest.fixture(scope="module")
def task_model() -> TaskModel:
    plain = tascade.Recipe(max_new_tokens=12, spec=SpecConfig(calibration_rows=2))
    return tascade.adapt(loaded(), examples(), recipe=plain)


@pytest.fixture
def rows(task_model: TaskModel) -> list[Row]:
    answer = np.asarray([1], np.int32)
    return [(task_model.encode(e["prompt"]), answer) for e in examples()]


@pytest.fixture
def params(task_model: TaskModel) -> SamplingParams:
    return task_model.params(temperature=0)


@pytest.fixture
def plain(task_model: TaskModel, rows: list[Row], params: SamplingParams) -> list[list[int]]:
    return [task_model.plain.generate(p, params).tokens for p, _ in rows if p is not None]


def said(found: tuple[list[Row], list[int]]) -> list[list[int]]:
    answers, places = found
    assert places == list(range(len(answers)))
    return [answer.tolist() for _, answer in answers]


def heard() -> tuple[list[tuple[str, int, int | None]], Progress]:
    events: list[tuple[str, int, int | None]] = []
    return events, lambda *event: events.append(event)


class Stub:
    """An engine that says what it is given, some prompts at a time."""

    name = "stub"

    def __init__(self, says: dict[bytes, list[int]], ends_after: int = 1000) -> None:
        self.says, self.ends_after, self.asked = says, ends_after, 0
        self.slow, self.closed = 0.0, False

    def answers(
        self, prompts: Sequence[IntArray], params: SamplingParams, seconds: float, first: int
    ) -> Generator[list[tuple[int, list[int]]]]:
        try:
            for at in range(0, len(prompts), 3):
                yield []
                if at >= self.ends_after:
                    raise EngineError("the stub is done")
                time.sleep(self.slow)
                some = range(at, min(at + 3, len(prompts)))
                self.asked += len(some)
                yield [(i, self.says[prompts[i].tobytes()]) for i in some]
        finally:
            self.closed = True


def says(rows: list[Row], answers: list[list[int]]) -> dict[bytes, list[int]]:
    return {p.tobytes(): a for (p, _), a in zip(rows, answers, strict=True) if p is not None}


def test_one_by_one_and_in_batches_answers_are_plain_decodings(
    task_model: TaskModel,
    rows: list[Row],
    params: SamplingParams,
    plain: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given: dict[str, Any] = {"seconds": 600.0, "tell": silent}
    assert said(own_answers(task_model.decoder, rows, params, **given)) == plain
    monkeypatch.setattr(own, "TRIAL_SECONDS", -1.0)
    monkeypatch.setattr(own, "_BATCH_TRIALS", 0)
    for clearly, together in ((1e9, True), (0.0, False)):
        monkeypatch.setattr(own, "_CLEARLY", clearly)
        made: list[BatchDecoder] = []
        alone = 0
        generate = Decoder.generate

        def counted(decoder: Decoder, *args: Any) -> Any:
            nonlocal alone
            alone += 1
            return generate(decoder, *args)  # noqa: B023

        monkeypatch.setattr(Decoder, "generate", counted)

        def batches(made: list[BatchDecoder] = made) -> BatchDecoder:
            made.append(task_model.batches(4))
            return made[-1]

        events, tell = heard()
        given = {"seconds": 600.0, "tell": tell, "bulk": Bulk(batches=batches)}
        assert said(own_answers(task_model.decoder, rows, params, **given)) == plain
        monkeypatch.setattr(Decoder, "generate", generate)
        assert len(made) == 1
        assert alone == (4 if together else 30)  # as many as there are different prompts
        assert [done for _, done, _ in events] == sorted(done for _, done, _ in events)
        assert events[-1] == ("answering training prompts", 40, 40)


def test_an_engine_answers_as_long_as_it_says_the_models_words(
    task_model: TaskModel,
    rows: list[Row],
    params: SamplingParams,
    plain: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(own, "ENGINE_SECONDS", -1.0)
    stub = Stub(says(rows, plain))
    monkeypatch.setattr(stub, "slow", 0.0)
    events, tell = heard()
    given: dict[str, Any] = {"seconds": 600.0, "tell": tell, "bulk": Bulk(engine=stub)}
    assert said(own_answers(task_model.decoder, rows, params, **given)) == plain
    assert stub.asked == 30
    stages = list(dict.fromkeys(stage for stage, _, _ in events))
    assert stages[:2] == ["answering training prompts", "answering training prompts in stub"]
    assert events[-1][1:] == (40, 40)


ENGINE = """
import sys, time
from pathlib import Path
from tascade.integrations import vllm_answers
vllm_answers._distribution = lambda: "numpy"
vllm_answers.check_version = print
vllm_answers._engine = lambda job: time.sleep(600)
vllm_answers.run(Path(sys.argv[1]))
"""
STARTER = """
import subprocess, sys, time
child = subprocess.Popen(sys.argv[1:], start_new_session=True, stdout=subprocess.PIPE)
print(child.stdout.readline())
"""


def test_an_engine_whose_starter_was_killed_ends_while_it_loads(tmp_path: Path) -> None:
    (tmp_path / "job.json").write_text("{}")
    np.savez(tmp_path / "prompts.npz", ids=[1], ends=[1], limits=[1])
    # The engine holds standard error, so the end of that is the end of it.
    starter = [sys.executable, "-c", STARTER, sys.executable, "-u", "-c", ENGINE, str(tmp_path)]
    ended = subprocess.run(starter, capture_output=True, text=True, timeout=120, check=True)
    assert ended.stderr == ""
    assert ended.stdout.startswith("b'")


@pytest.mark.parametrize("fault", ["other words", "fails", "slow"])
def test_what_an_engine_does_not_do_is_done_one_by_one(
    fault: str,
    task_model: TaskModel,
    rows: list[Row],
    params: SamplingParams,
    plain: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(own, "ENGINE_SECONDS", -1.0)
    wrong = [[token ^ 1 for token in answer] for answer in plain]
    stub = Stub(says(rows, wrong if fault == "other words" else plain))
    if fault == "fails":
        stub.ends_after = 12
    if fault == "slow":
        stub.slow = 0.5
    given: dict[str, Any] = {"seconds": 600.0, "tell": silent, "bulk": Bulk(engine=stub)}
    if fault == "slow":
        found = own_answers(task_model.decoder, rows, params, **given)
    else:
        with pytest.warns(UserWarning, match="answering goes on without it"):
            found = own_answers(task_model.decoder, rows, params, **given)
    assert said(found) == plain
    assert stub.closed
    assert stub.asked < 30


# --- stopped, and gone on with --------------------------------------------------------------------


def stopped_at(count: int) -> Progress:
    def tell(stage: str, done: int, total: int | None) -> None:
        if stage.startswith("answering training prompts") and done >= count:
            raise KeyboardInterrupt

    return tell


def test_a_run_that_was_stopped_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tascade.adapt(loaded(), examples(), recipe=RECIPE, out=tmp_path / "whole")
    out = tmp_path / "pack"
    with pytest.raises(KeyboardInterrupt):
        tascade.adapt(loaded(), examples(), recipe=RECIPE, out=out, progress=stopped_at(15))
    work = answers_folder(out)
    kept = len((work / "answers.jsonl").read_text().splitlines())
    assert 5 <= kept <= 15
    assert sorted(os.listdir(tmp_path)) == [".pack.answers", "whole"]
    with pytest.raises(ConfigError, match="would be lost") as forgotten:  # without resume
        tascade.adapt(loaded(), examples(), recipe=RECIPE, out=out)
    assert "--resume" in forgotten.value.fix
    assert len((work / "answers.jsonl").read_text().splitlines()) == kept
    events, tell = heard()
    made = tascade.adapt(loaded(), examples(), recipe=RECIPE, out=out, progress=tell, resume=True)
    first = next(done for stage, done, _ in events if stage == "answering training prompts")
    assert first >= 15
    assert made.pack.info.own_answers == whole.pack.info.own_answers == 38
    documents = [dict(m.corpus.documents()) for m in (made, whole)]
    assert {k: v.tolist() for k, v in documents[0].items()} == {
        k: v.tolist() for k, v in documents[1].items()
    }
    assert sorted(os.listdir(tmp_path)) == ["pack", "whole"]


def test_answers_to_something_else_are_not_gone_on_with(tmp_path: Path) -> None:
    out = tmp_path / "pack"
    with pytest.raises(KeyboardInterrupt):
        tascade.adapt(loaded(), examples(), recipe=RECIPE, out=out, progress=stopped_at(15))
    with pytest.raises(ConfigError, match="the run that was stopped here was another"):
        tascade.adapt(loaded(), examples(50), recipe=RECIPE, out=out, resume=True)
    with pytest.raises(ConfigError, match="max_new_tokens 12"):
        tascade.adapt(loaded(), examples(), recipe=RECIPE, out=out, resume=True, max_new_tokens=13)
    begun = tascade.adapt(loaded(), examples(50), recipe=RECIPE, out=out)
    assert not answers_folder(out).exists()
    assert begun.pack.info.own_answers == 47


def test_a_line_cut_short_is_dropped_and_a_damaged_one_named(tmp_path: Path) -> None:
    file = tmp_path / "answers.jsonl"
    for text in ("", "[4, [1, 2", "[4, [1, 2]"):
        file.write_text("[3, [7, 8]]\n" + text)
        kept = KeptAnswers(file)
        assert [(at, ids.tolist()) for at, ids in kept.read()] == [(3, [7, 8])]
        kept.add(5, np.asarray([9], np.int32))
        kept.close()
        assert file.read_text() == "[3, [7, 8]]\n[5, [9]]\n"
    for text in ("{}", "[1, 2]", "[true, [1]]", "[1, [-1]]", "[1, [99999999999]]", "[1, []]", "x"):
        file.write_text(f"[3, [7, 8]]\n{text}\n")
        kept = KeptAnswers(file)
        with pytest.raises(ConfigError, match=r"answers\.jsonl:2"):
            list(kept.read())
        kept.close()


# --- the other process ----------------------------------------------------------------------------

PROGRAM = """
import json, sys, time
from pathlib import Path
import numpy as np
folder = Path(sys.argv[1])
job = json.loads((folder / "job.json").read_text())
assert (folder / "pack" / "pack.json").is_file() and job["tascade"]["learn"]
arrays = np.load(folder / "prompts.npz")
prompts = np.split(arrays["ids"], arrays["ends"][:-1])
with open(folder / "answers.jsonl", "a") as file:
    for at, ids in enumerate(prompts):
        file.write(json.dumps([at, [len(ids), int(arrays["limits"][at])]]) + "\\n")
        file.flush()
        {then}
"""


def program(task_model: TaskModel, then: str = "pass") -> VllmEngine:
    command = (sys.executable, "-c", PROGRAM.replace("{then}", then))
    return VllmEngine(task_model.model, "stored", task_model.pack, command)


def test_the_job_goes_over_and_its_answers_come_back(
    task_model: TaskModel, params: SamplingParams
) -> None:
    prompts = [np.arange(1, 2 + n, dtype=np.int32) for n in range(5)]
    some = program(task_model).answers(prompts, params, 60.0, 8)
    found = [pair for said in some for pair in said]
    assert found == [(n, [n + 1, 12]) for n in range(5)]
    assert list(task_model.pack.path.parent.glob(f"{task_model.pack.path.name}.*")) == []


def test_a_program_that_fails_is_an_error_with_its_last_words(
    task_model: TaskModel, params: SamplingParams
) -> None:
    prompts = [np.arange(1, 4, dtype=np.int32)] * 2
    failing = program(task_model, "raise ValueError('no such thing')")
    with pytest.raises(EngineError, match="ValueError: no such thing"):
        list(failing.answers(prompts, params, 60.0, 8))


def test_a_program_that_is_not_wanted_any_more_is_ended(
    task_model: TaskModel, params: SamplingParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Any] = []
    popen = engines.subprocess.Popen

    def start(*args: Any, **options: Any) -> Any:
        started.append(popen(*args, **options))
        return started[-1]

    monkeypatch.setattr(engines.subprocess, "Popen", start)
    prompts = [np.arange(1, 4, dtype=np.int32)] * 2
    stream = program(task_model, "time.sleep(600)").answers(prompts, params, 600.0, 8)
    assert any(said for said in stream)
    stream.close()
    assert started[0].poll() is not None


def test_what_vllm_would_not_do_the_same_is_not_asked_of_it(
    task_model: TaskModel, params: SamplingParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    def found(name: str) -> Any:
        return SimpleNamespace(origin="somewhere") if name == "vllm" else None

    monkeypatch.setattr(engines.importlib.util, "find_spec", found)
    model = task_model.model
    assert why_not_vllm(model, "folder", params) == ""
    assert "in memory" in why_not_vllm(model, "", params)
    for options, reason in (
        ({"temperature": 1.0}, "drawn"),
        ({"repetition_penalty": 1.1}, "penalty"),
        ({"stop": "x"}, "stop strings"),
        ({"suppress_tokens": [3]}, "processors"),
    ):
        asked = task_model.params(**{"temperature": 0, **options})
        assert reason in why_not_vllm(model, "folder", asked)
    monkeypatch.setattr(engines.importlib.util, "find_spec", lambda name: None)
    assert "not installed" in why_not_vllm(model, "folder", params)
    assert model.dtype == torch.float32
    assert json.dumps(engines._memory(model.config, model, 64))

"""The vLLM proposer's options and refusals, which need no vLLM. Its engine: tests/vllm."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tascade.draft.appended import AppendedWatch
from tascade.draft.batch import BatchDrafter
from tascade.draft.corpus import CorpusIndex
from tascade.draft.task import Task
from tascade.errors import ConfigError
from tascade.integrations.vllm import (
    TascadeProposer,
    WorkerExtension,
    check_parallel,
    check_version,
    read_options,
)


def test_a_pack_is_named_by_the_config_or_the_environment() -> None:
    assert str(read_options({"tascade": {"pack": "a"}}, {}).packs["default"]) == "a"
    assert str(read_options({}, {"TASCADE_PACK": "b"}).packs["default"]) == "b"
    both = read_options({"tascade": {"pack": "a"}}, {"TASCADE_PACK": "b"})
    assert str(both.packs["default"]) == "a"


@pytest.mark.parametrize(
    "additional",
    [
        {},
        {"tascade": {"pak": "a"}},
        {"tascade": "a"},
        {"tascade": {"pack": 5}},
        {"tascade": {"packs": {"x": 1}}},
        {"tascade": {"packs": {"x": "a"}, "adapters": {"lora": "y"}}},
    ],
)
def test_wrong_options_are_refused(additional: Any) -> None:
    with pytest.raises(ConfigError):
        read_options(additional, {})


@pytest.mark.parametrize(("found", "fits"), [("0.32.0", True), ("0.33.1", True), ("0.31.9", False)])
def test_the_version_is_checked(found: str, fits: bool) -> None:
    if fits:
        check_version(found)
    else:
        with pytest.raises(ConfigError, match=r"0\.32"):
            check_version(found)


@pytest.mark.parametrize("found", ["0.34.0", "1.0", "dev"])
def test_an_untried_version_is_refused(found: str) -> None:
    with pytest.raises(ConfigError):
        check_version(found)


def test_pipeline_stages_are_refused_where_vllm_fails_on_them() -> None:
    check_parallel("0.32.0", 1)
    check_parallel("0.33.0", 2)
    with pytest.raises(ConfigError, match="tensor parallelism works"):
        check_parallel("0.32.0", 2)


def proposer(*names: str) -> TascadeProposer:
    made = TascadeProposer.__new__(TascadeProposer)
    made._names, made._adapters = list(names), {"lora-b": "b"}
    made._input_batch = made._requests = None
    return made


def request(extra: Any = None, lora: str = "") -> SimpleNamespace:
    adapter = SimpleNamespace(lora_name=lora) if lora else None
    return SimpleNamespace(sampling_params=SimpleNamespace(extra_args=extra), lora_request=adapter)


def test_several_packs_need_the_worker_extension() -> None:
    with pytest.raises(ConfigError, match="WorkerExtension"):
        proposer("a", "b")._task_of(0)


def test_a_request_names_its_pack_or_its_adapter_does() -> None:
    extension = WorkerExtension()
    requests = {"r0": request(), "r1": request({"tascade_pack": "b"}), "r2": request(lora="lora-b")}
    runner = SimpleNamespace(
        input_batch=SimpleNamespace(req_ids=["r2", "r1", "r0"]),
        requests=requests,
        drafter=proposer("a", "b"),
    )
    extension.model_runner = runner
    assert extension.tascade_bind()
    assert [runner.drafter._task_of(row) for row in range(3)] == [1, 1, 0]


def test_an_engine_without_a_pack_has_nothing_to_bind() -> None:
    extension = WorkerExtension()
    extension.model_runner = SimpleNamespace(drafter=object())
    assert not extension.tascade_bind()
    assert extension.tascade_stats() == {}


def test_documents_appended_to_packs_in_use_are_drafted(tmp_path: Path) -> None:
    corpora = [
        CorpusIndex.build(tmp_path / name, [[90, 91]], vocab_size=96, fingerprint="t")
        for name in ("a", "b")
    ]
    made = proposer("a", "b")
    made._learner, made._appended = None, AppendedWatch(corpora, every=0.0)
    tasks = [Task(corpus) for corpus in corpora]
    made.drafter = BatchDrafter(tasks, end_tokens=[1], requests=4, length=32, most=4)
    requests = {"r0": request(), "r1": request({"tascade_pack": "b"})}
    made.bind(lambda: SimpleNamespace(req_ids=["r0", "r1"]), lambda: requests)
    ids, lengths = np.zeros((4, 32), np.int32), np.array([2, 2, 0, 0], np.int32)
    ids[:, :2] = [40, 5]
    assert made.propose([[5], [5]], lengths, ids) == [[], []]
    for name, token in (("a", 6), ("b", 16)):
        with CorpusIndex.open(tmp_path / name, writable=True) as writer:
            writer.append([[5, token, 1]] * 9)
    ids[:, 0] = 41
    assert made.propose([[5], [5]], lengths, ids) == [[6, 1], [16, 1]]

"""The vLLM proposer's options and refusals, which need no vLLM. Its engine: tests/vllm."""

from __future__ import annotations

import logging
import sys
import types
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tascade.draft.ngram.batch import BatchDrafter
from tascade.draft.ngram.sources import Task
from tascade.errors import ConfigError
from tascade.index.corpus import CorpusIndex
from tascade.index.learned import AppendedWatch
from tascade.integrations import vllm
from tascade.integrations.vllm import (
    Options,
    TascadeProposer,
    WorkerExtension,
    check_parallel,
    check_requests,
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


def engine(extension: str = "", embeds: bool = False) -> tuple[SimpleNamespace, SimpleNamespace]:
    return (
        SimpleNamespace(worker_extension_cls=extension),
        SimpleNamespace(enable_prompt_embeds=embeds),
    )


class OwnExtension(WorkerExtension):
    """A user's own."""


@pytest.mark.parametrize("extension", ["", "json.JSONDecoder", "json.nothing"])
def test_several_packs_without_the_extension_are_refused_at_the_start(extension: str) -> None:
    several = Options({"a": Path("a"), "b": Path("b")})
    with pytest.raises(ConfigError, match="worker-extension-cls"):
        check_requests(several, *engine(extension))
    check_requests(Options({"a": Path("a")}), *engine(extension))


def test_several_packs_go_with_the_extension_or_one_that_inherits_from_it() -> None:
    several = Options({"a": Path("a"), "b": Path("b")})
    check_requests(several, *engine("tascade.integrations.vllm.WorkerExtension"))
    check_requests(several, *engine(f"{__name__}.OwnExtension"))


def test_prompts_of_embeddings_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="enable_prompt_embeds"):
        check_requests(Options({"a": Path("a")}), *engine(embeds=True))


def test_drafted_tokens_get_what_their_request_has() -> None:
    ends = torch.tensor([2, 2, 5, 6], dtype=torch.int32)
    for dtype in (torch.float32, torch.int32, torch.int64):
        found = vllm._expand(torch.tensor([5, 9, 0, 7], dtype=dtype), ends, 6, 0, 1)
        assert (found.dtype, found.tolist()) == (dtype, [5, 5, 1, 1, 1, 7])
        assert (
            vllm._expand(torch.tensor([5, 9, 0, 7], dtype=dtype), ends, 6)[2:5].tolist() == [0] * 3
        )


@pytest.mark.parametrize("fault", ["none", "drops", "raises", "stays"])
def test_an_engine_that_expands_wrongly_is_mended_or_refused(
    fault: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def drops(x: torch.Tensor, ends: torch.Tensor, n: int, *_: int) -> torch.Tensor:
        return x.new_full((n,), 8192)

    def raises(*_: Any) -> torch.Tensor:
        raise RuntimeError("no kernel")

    kinds = {"none": vllm._expand, "drops": drops, "raises": raises, "stays": drops}
    sampler = types.ModuleType("vllm.v1.sample.rejection_sampler")
    sampler.expand_batch_to_tokens = kinds[fault]
    parent = types.ModuleType("vllm.v1.sample")
    parent.rejection_sampler = sampler
    for name in ("vllm", "vllm.v1"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "vllm.v1.sample", parent)
    monkeypatch.setattr(vllm, "_expand", drops if fault == "stays" else vllm._expand)
    if fault == "stays":
        with pytest.raises(ConfigError, match="55005"):
            vllm.mend_expansion()
    else:
        vllm.mend_expansion()
        assert sampler.expand_batch_to_tokens is vllm._expand
    assert ("55005" in caplog.text) == (fault != "none")


def proposer(*names: str) -> TascadeProposer:
    made = TascadeProposer.__new__(TascadeProposer)
    made.failures = made.unknown_packs = 0
    made._learner, made._appended = None, AppendedWatch([], every=0.0)
    made._names, made._adapters = list(names), {"lora-b": "b"}
    made._prompts = made._request = None
    return made


def request(extra: Any = None, lora: str = "") -> SimpleNamespace:
    adapter = SimpleNamespace(lora_name=lora) if lora else None
    return SimpleNamespace(sampling_params=SimpleNamespace(extra_args=extra), lora_request=adapter)


def test_several_packs_need_the_worker_extension() -> None:
    with pytest.raises(ConfigError, match="WorkerExtension"):
        proposer("a", "b")._task_of(0)


def bound(*names: str) -> tuple[WorkerExtension, TascadeProposer]:
    extension = WorkerExtension()
    requests = {
        "r0": request(),
        "r1": request({"tascade_pack": "b"}),
        "r2": request(lora="lora-b"),
        "r3": request({"tascade_pack": "nosuch"}),
        "r4": request({"tascade_pack": ["b"]}),
    }
    # As in vLLM: the worker gets its runner, which has made the proposer; nothing else is called.
    extension.model_runner = SimpleNamespace(
        input_batch=SimpleNamespace(
            req_ids=["r2", "r1", "r0", "r3", "r4"], num_prompt_tokens=np.array([3, 2, 2, 2, 2])
        ),
        requests=requests,
        drafter=proposer(*names),
    )
    return extension, extension.model_runner.drafter


def test_a_request_names_its_pack_or_its_adapter_does() -> None:
    extension, made = bound("a", "b")
    assert [made._task_of(row) for row in range(3)] == [1, 1, 0]
    assert extension.tascade_bind()


def test_a_request_that_names_an_unknown_pack_gets_none(caplog: pytest.LogCaptureFixture) -> None:
    _, made = bound("a", "b")
    assert [made._task_of(row) for row in (3, 4, 3)] == [-1, -1, -1]
    assert made.unknown_packs == 3
    assert len(caplog.records) == 1
    assert "nosuch" in caplog.text


class Broken:
    """Raises what is planted, or drafts where nothing is."""

    def __init__(self) -> None:
        self.planted: list[Exception | None] = [
            ZeroDivisionError("planted"),
            IndexError("planted"),
            None,
            MemoryError(),
        ]

    def propose(self, *_: Any) -> list[list[int]]:
        error = self.planted.pop(0)
        if error is not None:
            raise error
        return [[5], [6]]


def test_nothing_that_is_raised_while_drafting_reaches_the_engine(
    caplog: pytest.LogCaptureFixture,
) -> None:
    made = proposer("a")
    made.drafter = Broken()
    rows = ([[1], [2]], np.array([3, 3], np.int32), np.zeros((2, 8), np.int32))
    assert [made.propose(*rows) for _ in range(4)] == [[[], []], [[], []], [[5], [6]], [[], []]]
    assert made.failures == 3
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    assert "ZeroDivisionError: planted" in caplog.text


def test_a_proposer_that_sees_no_request_of_several_packs_drafts_nothing() -> None:
    made = proposer("a", "b")
    made.drafter = SimpleNamespace(propose=lambda sampled, n, ids, task_of, _: [[task_of(0)]])
    assert made.propose([[1]], np.array([3], np.int32), np.zeros((1, 8), np.int32)) == [[]]
    assert made.failures == 1


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
    batch = SimpleNamespace(req_ids=["r0", "r1"], num_prompt_tokens=np.array([1, 1]))
    made.bind(lambda: batch.num_prompt_tokens, lambda row: requests[batch.req_ids[row]])
    ids, lengths = np.zeros((4, 32), np.int32), np.array([2, 2, 0, 0], np.int32)
    ids[:, :2] = [40, 5]
    assert made.propose([[5], [5]], lengths, ids) == [[], []]
    for name, token in (("a", 6), ("b", 16)):
        with CorpusIndex.open(tmp_path / name, writable=True) as writer:
            writer.append([[5, token, 1]] * 9)
    ids[:, 0] = 41
    assert made.propose([[5], [5]], lengths, ids) == [[6, 1], [16, 1]]

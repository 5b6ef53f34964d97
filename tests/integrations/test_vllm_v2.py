"""The second runner's seam, without vLLM: what is refused, replaced, handed over and told."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tascade.errors import ConfigError
from tascade.integrations import vllm_v2
from tascade.integrations.vllm import WorkerExtension
from tascade.integrations.vllm_v2 import CutDrafts, HostSpeculator, check_second_runner, install

RUNNER = "vllm.v1.worker.gpu.model_runner"


def config(second: bool = True, ahead: bool = False, workers: int = 1, **speculative: Any) -> Any:
    return SimpleNamespace(
        use_v2_model_runner=second,
        speculative_config=SimpleNamespace(
            **{"method": "ngram_gpu", "num_speculative_tokens": 3} | speculative
        ),
        scheduler_config=SimpleNamespace(async_scheduling=ahead, max_num_seqs=4),
        parallel_config=SimpleNamespace(world_size=workers),
        additional_config={"tascade": {"pack": "p"}},
    )


@pytest.mark.parametrize(
    ("made", "packs", "match"),
    [
        (config(), ["a", "b"], "whose pack"),
        (config(method="eagle3"), ["a"], "network"),
        (config(enable_adaptive_verification=True), ["a"], "adaptive verification"),
        (config(workers=2), ["a"], "2 workers"),
    ],
)
def test_what_works_in_the_first_runner_alone_is_refused_by_name(
    made: Any, packs: list[str], match: str
) -> None:
    with pytest.raises(ConfigError, match=match):
        check_second_runner(made, packs)
    made.use_v2_model_runner = False
    check_second_runner(made, packs)


def test_what_is_scheduled_ahead_may_have_several_workers_and_adaptive_verification() -> None:
    check_second_runner(config(ahead=True, workers=2, enable_adaptive_verification=True), ["a"])


def test_the_first_runner_does_not_draft_by_ngrams_where_a_pack_is_named() -> None:
    with pytest.raises(ConfigError, match="VLLM_USE_V2_MODEL_RUNNER=1"):
        install(config(second=False))
    alone = config(second=False)
    alone.additional_config = {}
    install(alone)
    install(config(second=False, method="custom_class"))


def runner_module(monkeypatch: pytest.MonkeyPatch, **functions: Callable[..., Any]) -> Any:
    made = types.ModuleType(RUNNER)
    vars(made).update(functions)
    parts = RUNNER.split(".")
    for end in range(1, len(parts)):
        name = ".".join(parts[:end])
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, RUNNER, made)
    return made


def test_one_function_is_replaced_once_and_others_engines_keep_theirs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runner = runner_module(monkeypatch, init_speculator=lambda *_: "theirs")
    worker = WorkerExtension()
    for name in ("model_runner", "vllm_config", "vllm_config"):
        setattr(worker, name, config() if name == "vllm_config" else None)
    replaced = runner.init_speculator
    install(config())
    assert runner.init_speculator is replaced
    unnamed = config()
    unnamed.additional_config = {}
    assert replaced(unnamed, None, None) == "theirs"
    assert replaced(config(method="eagle"), None, None) == "theirs"


def test_a_runner_that_makes_speculators_otherwise_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runner_module(monkeypatch)
    with pytest.raises(ConfigError, match="init_speculator"):
        install(config())


class Proposer:
    """Drafts what is planned, and notes what it was given."""

    def __init__(self, *drafts: list[list[int]]) -> None:
        self.drafts, self.given = list(drafts), list[Any]()
        self.prompts: Callable[[], Any] = list

    def bind(self, prompts: Callable[[], Any]) -> None:
        self.prompts = prompts

    def propose(self, sampled: Any, lengths: Any, ids: Any) -> list[list[int]]:
        self.given.append((sampled, lengths.tolist(), ids.copy(), self.prompts().tolist()))
        return self.drafts.pop(0)


def gpu(values: Any, dtype: torch.dtype = torch.int32) -> Any:
    tensor = torch.tensor(values, dtype=dtype)
    return SimpleNamespace(gpu=tensor, np=tensor.numpy())


def batch(rows: list[int], upper: list[int]) -> Any:
    return SimpleNamespace(
        num_reqs=len(rows),
        idx_mapping=torch.tensor(rows),
        idx_mapping_np=np.array(rows),
        seq_lens_cpu_upper_bound=torch.tensor(upper),
    )


@dataclass
class Told:
    """As vLLM's ``DraftTokenIds``."""

    req_ids: list[str]
    draft_token_ids: list[list[int]]


class Handler:
    """As vLLM's: as many places for every request."""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def get_draft_tokens(self) -> Told:
        return Told([str(row) for row in range(self.rows)], [[-1] * 3] * self.rows)


def test_rows_go_to_the_proposer_and_drafts_back_each_of_its_length() -> None:
    # Three requests in places 2, 0 and 1; that in 0 is still being read: 5 of 9 tokens.
    ids = [[10, 11, 12, 13, 14, 15, 16, 17, 18], [20, 21, 22] + [0] * 6, [30, 31] + [0] * 7]
    states = SimpleNamespace(
        all_token_ids=gpu(ids), total_len=gpu([9, 3, 2]), prompt_len=gpu([9, 1, 1])
    )
    proposer = Proposer([[7, 8], [], []], [[], [], []])
    speculator = HostSpeculator(proposer, config(), torch.device("cpu"), states)
    found = speculator.propose(
        batch([2, 0, 1], [1, 5, 2]), None, None, None, None, torch.tensor([1, 0, 2])
    )
    assert found.tolist() == [[7, 8, 31], [15, 15, 15], [22, 22, 22]]
    sampled, lengths, rows, prompts = proposer.given[0]
    assert (sampled, lengths, prompts) == ([[31], [], [21, 22]], [2, 9, 3], [1, 9, 1])
    assert rows[2, :3].tolist() == [20, 21, 22]
    told = CutDrafts(Handler(3), speculator).get_draft_tokens()
    assert told.draft_token_ids == [[-1, -1], [], []]
    assert told.req_ids == ["0", "1", "2"]
    dummy = speculator.propose(batch([0], [1]), None, None, None, None, None, dummy_run=True)
    assert dummy.shape == (1, 3)
    assert len(proposer.given) == 1


def test_the_scheduler_is_told_of_true_drafts_once() -> None:
    states = SimpleNamespace()
    speculator = HostSpeculator(Proposer(), config(), torch.device("cpu"), states)
    runner = SimpleNamespace(speculator=speculator, draft_tokens_handler=Handler(0))
    assert vllm_v2.bind_second_runner(runner)
    handler = runner.draft_tokens_handler
    assert isinstance(handler, CutDrafts)
    assert vllm_v2.bind_second_runner(runner)
    assert runner.draft_tokens_handler is handler
    assert not vllm_v2.bind_second_runner(SimpleNamespace(drafter=None))

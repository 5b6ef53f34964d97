"""tascade drafting inside the real vLLM: the same answers, nobody else's drafts."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.sample import rejection_sampler
from vllm_engine import engine, limits, said, stats, watched
from watch import spoken

import tascade
from tascade import bundled
from tascade.data.load import load_examples
from tascade.errors import ConfigError
from tascade.index.corpus import CorpusIndex
from tascade.integrations import vllm as vllm_integration
from tascade.integrations.vllm import TascadeProposer
from tascade.pack import Pack
from vllm import SamplingParams

VLLMS_OWN = rejection_sampler.expand_batch_to_tokens
VLLMS_TOP_K = rejection_sampler.apply_top_k_top_p
SCHEMA = {
    "type": "object",
    "properties": {
        "category": {"type": "string", "enum": ["billing", "technical", "account", "other"]},
        "priority": {"type": "string", "enum": ["low", "medium", "high", "urgent"]},
    },
    "required": ["category", "priority"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def llm(ticket_pack: Path) -> Any:
    # Every draft is verified, whether it pays or not: the more there is to go wrong.
    return engine(ticket_pack, budget=False, enable_prefix_caching=True)


def test_answers_equal_plain_vllm(
    llm: Any, prompts: list[dict[str, list[int]]], plain_answers: list[list[int]]
) -> None:
    before = stats(llm)["accepted"]
    for _ in range(2):  # the second time over a warm prefix cache
        assert said(llm, prompts) == plain_answers
    assert stats(llm)["accepted"] > before + 500


def test_tensor_parallel_workers_agree(
    monkeypatch: pytest.MonkeyPatch,
    ticket_pack: Path,
    prompts: list[dict[str, list[int]]],
    plain_answers: list[list[int]],
) -> None:
    # Each worker drafts for itself, by its own clock; the scheduler takes one worker's drafts.
    if (os.cpu_count() or 1) < 2:
        pytest.skip("vLLM wants a core for each worker")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    two = engine(ticket_pack, tensor_parallel_size=2, distributed_executor_backend="mp")
    assert said(two, prompts) == plain_answers
    assert stats(two)["accepted"] > 100


def test_greedy_answers_equal_plain_beside_sampled_ones(
    llm: Any, prompts: list[dict[str, list[int]]], plain_answers: list[list[int]]
) -> None:
    # Sampled requests of all kinds come and go beside greedy ones; top_k=1 says what greedy says.
    kinds = [{"temperature": 0.7}, {"top_p": 0.9}, {"top_k": 5}, {"top_k": 5, "min_tokens": 3}]
    mixed, params, wanted = [], [], []
    for i, limit in enumerate(limits(len(prompts))):
        only = SamplingParams(temperature=1.0, top_k=1, seed=i, max_tokens=limit.max_tokens)
        mixed.append(prompts[i])
        params.append(only if i % 3 == 0 else limit)
        wanted.append(plain_answers[i])
        if i % 2:
            mixed.append(prompts[i])
            params.append(SamplingParams(seed=i, max_tokens=5 + i % 9, **kinds[i % len(kinds)]))
            wanted.append([])
    before = stats(llm)
    found = said(llm, mixed, params)
    assert [a for a, b in zip(found, wanted, strict=True) if b] == plain_answers
    after = stats(llm)
    assert after["accepted"] > before["accepted"] + 500
    assert after["failures"] == 0


def test_an_engine_goes_on_when_drafting_fails(
    llm: Any, prompts: list[dict[str, list[int]]], plain_answers: list[list[int]]
) -> None:
    before = stats(llm)
    llm.collective_rpc("tascade_break", args=(9,))
    assert said(llm, prompts[:24], limits(24)) == plain_answers[:24]
    after = stats(llm)
    assert after["failures"] == before["failures"] + 9
    assert after["accepted"] > before["accepted"]


def test_no_request_drafts_from_anothers_context(llm: Any, ticket_pack: Path) -> None:
    # Every prompt repeats a secret of its own behind words that all share: a draft that held
    # another's would have been made from another's context.
    common = list(range(400, 420))
    corpus = CorpusIndex.open(Pack.open(ticket_pack).corpus)
    unspoken = sorted(set(range(420, corpus.vocab_size)) - spoken(corpus))
    secrets = [unspoken[5 * i : 5 * i + 5] for i in range(48)]
    assert all(len(secret) == 5 for secret in secrets)
    requests = [{"prompt_token_ids": (common + s) * (2 + i % 5)} for i, s in enumerate(secrets)]
    params = [
        SamplingParams(
            temperature=1.0,
            seed=i,
            max_tokens=5 + (31 * i) % 50,
            ignore_eos=True,
            allowed_token_ids=[*common, *secret],
        )
        for i, secret in enumerate(secrets)
    ]
    before = watched(llm)
    llm.generate(requests, params, use_tqdm=False)
    after = watched(llm)
    assert after["calls"] > before["calls"] + 50
    assert after["secrets"] > before["secrets"] + 50  # else this could not have failed
    assert after["leaks"] == 0


def test_grammars_hold(llm: Any, prompts: list[dict[str, list[int]]]) -> None:
    grammar = StructuredOutputsParams(json=SCHEMA)
    params = SamplingParams(temperature=0.0, max_tokens=80, structured_outputs=grammar)
    before = stats(llm)["drafted"]
    for output in llm.generate(prompts[:24], params, use_tqdm=False):
        answer = json.loads(output.outputs[0].text)
        assert answer["category"] in SCHEMA["properties"]["category"]["enum"]
        assert answer["priority"] in SCHEMA["properties"]["priority"]["enum"]
    assert stats(llm)["drafted"] > before


def test_answers_survive_preemption(
    ticket_pack: Path, prompts: list[dict[str, list[int]]], plain_answers: list[list[int]]
) -> None:
    # 1024 tokens need 8 blocks of 128; 10 blocks hold one long request and a little more.
    llm = engine(
        ticket_pack,
        num_gpu_blocks_override=10,
        enable_prefix_caching=False,
        disable_log_stats=False,
    )
    assert said(llm, prompts) == plain_answers
    counted = {
        metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")
    }
    assert counted["vllm:num_preemptions"] > 0


def config(**additional: Any) -> Any:
    model = SimpleNamespace(
        model=str(bundled.model_path()),
        tokenizer=str(bundled.model_path()),
        tokenizer_revision=None,
        trust_remote_code=False,
    )
    parallel = SimpleNamespace(pipeline_parallel_size=1)
    return SimpleNamespace(
        additional_config=additional, model_config=model, parallel_config=parallel
    )


def test_each_request_drafts_from_the_pack_it_names(
    ticket_pack: Path,
    tmp_path: Path,
    prompts: list[dict[str, list[int]]],
    plain_answers: list[list[int]],
) -> None:
    # The second pack knows another task: requests that name it have less of theirs accepted.
    other = tmp_path / "notes"
    recipe = dataclasses.replace(tascade.Recipe(dtype="float32"), max_new_tokens=32)
    tascade.adapt(
        bundled.model_path(),
        [
            {"prompt": row.prompt, "completion": row.completion}
            for row in list(load_examples(bundled.data_path("notes")))[:200]
        ],
        out=other,
        recipe=recipe,
    )
    several = engine(None, budget=False, packs={"tickets": str(ticket_pack), "notes": str(other)})
    tickets = range(0, 72, 3)
    accepted = {}
    for name in ("tickets", "notes", "nosuch"):
        params = limits(len(prompts))
        for each in params:
            each.extra_args = {"tascade_pack": name}
        before = stats(several)["accepted"]
        found = said(several, [prompts[i] for i in tickets], [params[i] for i in tickets])
        assert found == [plain_answers[i] for i in tickets]
        accepted[name] = stats(several)["accepted"] - before
    assert accepted["tickets"] > 1.1 * accepted["notes"]
    assert accepted["nosuch"] == 0
    assert stats(several)["unknown_packs"] > 24
    assert stats(several)["failures"] == 0


def test_what_the_engine_cannot_do_is_refused_at_the_start_and_in_the_log(
    ticket_pack: Path, caplog: pytest.LogCaptureFixture
) -> None:
    several = {"a": str(ticket_pack), "b": str(ticket_pack)}
    with pytest.raises(ConfigError, match="worker-extension-cls"):
        TascadeProposer(config(tascade={"packs": several}))
    embeds = config(tascade={"pack": str(ticket_pack)})
    embeds.model_config.enable_prompt_embeds = True
    with pytest.raises(ConfigError, match="embeddings"):
        TascadeProposer(embeds)
    assert "several packs" in caplog.records[0].message
    assert "enable_prompt_embeds" in caplog.records[1].message


def test_what_tells_drafted_tokens_their_temperature_is_right_afterwards(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rejection_sampler, "expand_batch_to_tokens", VLLMS_OWN)
    vllm_integration.mend_expansion()
    ends = torch.tensor([3, 3, 40], dtype=torch.int32)
    for dtype in (torch.float32, torch.int32, torch.int64):
        given = torch.tensor([0, 9, 8192], dtype=dtype)
        found = rejection_sampler.expand_batch_to_tokens(given, ends, 40, 0, 1)
        assert found.tolist() == [1] * 3 + [8192] * 37


def test_a_step_without_drafts_bears_a_top_k(
    llm: Any, monkeypatch: pytest.MonkeyPatch, prompts: list[dict[str, list[int]]]
) -> None:
    # The first step of a lone request has no drafts: vLLM's own dies here.
    params = SamplingParams(temperature=1.0, top_k=1, max_tokens=1)
    assert len(said(llm, prompts[:1], [params])[0]) == 1
    monkeypatch.setattr(rejection_sampler, "apply_top_k_top_p", VLLMS_TOP_K)
    vllm_integration.mend_empty_top_k()
    k = torch.tensor([1, 2], dtype=torch.int32)
    logits = torch.tensor([[1.0, 3.0, 2.0], [1.0, 3.0, 2.0]])
    assert rejection_sampler.apply_top_k_top_p(logits[:0], k[:0], None).shape == (0, 3)
    kept = rejection_sampler.apply_top_k_top_p(logits.clone(), k, None).isfinite()
    assert kept.tolist() == [[False, True, False], [False, True, True]]

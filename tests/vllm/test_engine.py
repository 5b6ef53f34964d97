"""tascade drafting inside the real vLLM: the same answers, nobody else's drafts."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from vllm.sampling_params import StructuredOutputsParams

from conftest import engine, said, stats
from vllm import SamplingParams

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
    return engine(ticket_pack, enable_prefix_caching=True)


def test_answers_equal_plain_vllm(
    llm: Any, prompts: list[dict[str, list[int]]], plain_answers: list[list[int]]
) -> None:
    before = stats(llm)["accepted"]
    for _ in range(2):  # the second time over a warm prefix cache
        assert said(llm, prompts) == plain_answers
    assert stats(llm)["accepted"] > before + 500


def test_no_request_drafts_from_anothers_context(llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # Every prompt repeats a secret of its own, behind the same words: a draft that held another's
    # would have been made from another's context.
    from tascade.integrations.vllm import TascadeProposer

    whole, seen = TascadeProposer.propose, []

    def watched(self: Any, sampled: Any, lengths: Any, ids: Any, **rest: Any) -> Any:
        drafts = whole(self, sampled, lengths, ids, **rest)
        for row, draft in enumerate(drafts):
            seen.append((ids[row, : lengths[row]].tolist(), draft))
        return drafts

    monkeypatch.setattr(TascadeProposer, "propose", watched)
    secrets = [[3000 + 5 * i + j for j in range(5)] for i in range(48)]
    common = list(range(400, 420))
    requests = [{"prompt_token_ids": (common + s) * (2 + i % 5)} for i, s in enumerate(secrets)]
    params = [
        SamplingParams(temperature=1.0, seed=i, max_tokens=5 + (31 * i) % 50, ignore_eos=True)
        for i in range(len(secrets))
    ]
    llm.generate(requests, params, use_tqdm=False)
    owner = {token: i for i, secret in enumerate(secrets) for token in secret}
    drafted = 0
    for tokens, draft in seen:
        for token in draft:
            drafted += token in owner
            assert token not in owner or token in tokens
    assert len(seen) > 400
    assert drafted > 0  # else this test could not have failed


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
    llm = engine(ticket_pack, num_gpu_blocks_override=10, enable_prefix_caching=False)
    preempted = 0
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    whole = scheduler._preempt_request

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal preempted
        preempted += 1
        return whole(*args, **kwargs)

    scheduler._preempt_request = counted
    assert said(llm, prompts) == plain_answers
    assert preempted > 0


def test_the_environment_may_name_the_pack_and_a_wrong_one_is_refused(tmp_path: Path) -> None:
    os.environ["TASCADE_PACK"] = str(tmp_path)
    try:
        with pytest.raises(RuntimeError, match="no pack in this folder"):
            engine(
                None,
                speculative_config={
                    "method": "custom_class",
                    "model": "tascade.integrations.vllm.TascadeProposer",
                    "num_speculative_tokens": 4,
                },
            )
    finally:
        del os.environ["TASCADE_PACK"]

"""Tests on the real vLLM: `make test` runs them in an environment of their own, .venv-vllm.

They are collected only where TASCADE_TEST_VLLM is set; there, a missing vLLM is a failure.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

collect_ignore_glob = [] if os.environ.get("TASCADE_TEST_VLLM") else ["test_*.py"]
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

PROPOSER = "tascade.integrations.vllm.TascadeProposer"
EXTENSION = "tascade.integrations.vllm.WorkerExtension"


def engine(pack: Path | None, **options: Any) -> Any:
    """An engine of the bundled model in this process; with a pack, tascade drafts in it."""
    from tascade import bundled
    from vllm import LLM

    if pack is not None:
        config = {"method": "custom_class", "model": PROPOSER, "num_speculative_tokens": 12}
        options |= {
            "speculative_config": config,
            "additional_config": {"tascade": {"pack": str(pack)}},
            "worker_extension_cls": EXTENSION,
        }
    sizes = {"max_model_len": 1024, "max_num_seqs": 8, "seed": 0} | options
    return LLM(model=str(bundled.model_path()), dtype="float32", **sizes)


def stats(llm: Any) -> dict[str, Any]:
    found: dict[str, Any] = llm.collective_rpc("tascade_stats")[0]
    return found


@pytest.fixture(scope="session")
def prompts() -> list[dict[str, list[int]]]:
    """Test prompts of the three bundled tasks as token ids, long and short ones mixed."""
    from transformers import AutoTokenizer

    from tascade import bundled
    from tascade.data.load import load_examples
    from tascade.encode import encode_prompt

    tokenizer = AutoTokenizer.from_pretrained(bundled.model_path())
    found = []
    for task in ("tickets", "sql", "notes"):
        rows = list(load_examples(bundled.data_path(task, "test")))[:24]
        found += [encode_prompt(tokenizer, row.prompt or "").tolist() for row in rows]
    longer = [a + b for a, b in zip(found[:8], found[24:32], strict=True)]
    mixed = [prompt for group in zip(found[::3], found[1::3], found[2::3]) for prompt in group]
    return [{"prompt_token_ids": ids} for ids in (*mixed, *longer)]


@pytest.fixture(scope="session")
def plain_answers(prompts: list[dict[str, list[int]]]) -> list[list[int]]:
    """What plain vLLM says, greedy, each request with a limit of its own."""
    llm = engine(None)
    answers = said(llm, prompts)
    del llm
    return answers


def limits(count: int) -> list[Any]:
    """Sampling parameters under which requests end at different steps."""
    from vllm import SamplingParams

    return [SamplingParams(temperature=0.0, max_tokens=8 + (29 * i) % 60) for i in range(count)]


def said(llm: Any, prompts: list[dict[str, list[int]]]) -> list[list[int]]:
    outputs = llm.generate(prompts, limits(len(prompts)), use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]

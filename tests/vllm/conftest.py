"""Tests on the real vLLM: `make test` runs them in an environment of their own, .venv-vllm.

They are collected only where TASCADE_TEST_VLLM is set; there, a missing vLLM is a failure.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

collect_ignore_glob = [] if os.environ.get("TASCADE_TEST_VLLM") else ["test_*.py"]
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
if "PYTEST_XDIST_WORKER" in os.environ:
    # An engine beside another: a thread each, where it finds a core. Bound to the same cores, the
    # threads of two would wait for each other.
    os.environ |= {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
# The engine's process finds the watching proposer here.
_HERE = str(Path(__file__).parent)
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [_HERE, os.environ.get("PYTHONPATH")]))


@pytest.fixture(scope="session")
def prompts() -> list[dict[str, list[int]]]:
    """Test prompts of the three bundled tasks as token ids, long and short ones mixed."""
    from transformers import AutoTokenizer

    from tascade import bundled
    from tascade.data.encode import encode_prompt
    from tascade.data.load import load_examples

    tokenizer = AutoTokenizer.from_pretrained(bundled.model_path())
    found = []
    for task in ("tickets", "sql", "notes"):
        rows = list(load_examples(bundled.data_path(task, "test")))[:24]
        found += [encode_prompt(tokenizer, row.prompt or "").tolist() for row in rows]
    longer = [a + b for a, b in zip(found[:8], found[24:32], strict=True)]
    mixed = [
        prompt
        for group in zip(found[::3], found[1::3], found[2::3], strict=True)
        for prompt in group
    ]
    return [{"prompt_token_ids": ids} for ids in (*mixed, *longer)]


@pytest.fixture(scope="session")
def plain_answers(prompts: list[dict[str, list[int]]]) -> list[list[int]]:
    """What plain vLLM says, greedy, each request with a limit of its own."""
    from vllm_engine import engine, said

    llm = engine(None)
    answers = said(llm, prompts)
    del llm
    return answers

"""tascade drafting in vLLM's second model runner, the real one, interpreted: the same answers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parent / "second_runner.py"
SCHEMA = {
    "type": "object",
    "properties": {"category": {"type": "string", "enum": ["billing", "technical", "account"]}},
    "required": ["category"],
    "additionalProperties": False,
}
ABORTED = [1, 18]
"""One that is under way by then, and one that waits."""


def _answer(
    folder: Path, requests: list[dict[str, Any]], pack: Path | None, **options: Any
) -> dict[str, Any]:
    job = {
        "pack": str(pack) if pack else None,
        "requests": requests,
        "options": options,
        "abort_at": 3,
        "abort": ABORTED,
    }
    given, out = folder / "job.json", folder / "out.json"
    given.write_text(json.dumps(job))
    out.unlink(missing_ok=True)
    ended = subprocess.run(
        [sys.executable, str(SCRIPT), str(given), str(out)], capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr[-4000:]
    found: dict[str, Any] = json.loads(out.read_text())
    return found


@pytest.fixture(scope="module")
def requests(prompts: list[dict[str, list[int]]]) -> list[dict[str, Any]]:
    """40 rows of two tasks, greedy, seeded, stopped by strings, bound by a grammar."""
    made: list[dict[str, Any]] = []
    for i, prompt in enumerate([p for n, p in enumerate(prompts[:60]) if n % 3 < 2]):
        params: dict[str, Any] = {"temperature": 0.0, "max_tokens": 8 + (29 * i) % 32}
        if i % 8 == 3:  # so cold that it says what greedy says, by another way
            params |= {"temperature": 0.01, "seed": i}
        elif i % 8 == 5:
            params |= {"stop": ["e", "1"]}
        elif i % 8 == 6:
            params |= {"json": SCHEMA}
        made.append({"prompt": prompt["prompt_token_ids"], "params": params})
    return made


def test_answers_equal_those_of_the_second_runner_without_tascade(
    tmp_path: Path, ticket_pack: Path, requests: list[dict[str, Any]]
) -> None:
    # Prompts are read in chunks of at most 192 tokens, beginnings that are known are not read, and
    # 17 blocks of 32 tokens hold one long request and a little more.
    options: dict[str, Any] = {"max_num_batched_tokens": 192, "enable_prefix_caching": True}
    options |= {"max_model_len": 512, "block_size": 32, "num_gpu_blocks_override": 17}
    plain = _answer(tmp_path, requests, None, **options)
    ours = _answer(tmp_path, requests, ticket_pack, budget=False, async_scheduling=False, **options)
    whole = {str(i) for i in range(len(requests)) if i not in ABORTED}
    assert set(plain["said"]) == set(ours["said"]) == whole
    assert ours["said"] == plain["said"]
    assert ours["steps"] < 0.8 * plain["steps"]  # many of them read prompts, some anew
    assert ours["stats"]["failures"] == 0
    counted = ours["counted"]
    assert counted["vllm:spec_decode_num_accepted_tokens"] > 200
    assert counted["vllm:spec_decode_num_draft_tokens"] <= ours["stats"]["drafted"]
    assert counted["vllm:num_preemptions"] > 0


def test_drafts_made_on_the_device_are_scheduled_ahead_and_change_nothing(
    tmp_path: Path, ticket_pack: Path, requests: list[dict[str, Any]]
) -> None:
    few = [{**r, "params": {"temperature": 0.0, "max_tokens": 14}} for r in requests[:6]]
    plain = _answer(tmp_path, few, None)
    ours = _answer(tmp_path, few, ticket_pack, drafted=4, async_scheduling=True)
    kept = {str(i) for i in range(len(few)) if i not in ABORTED}
    assert set(ours["said"]) == kept
    assert ours["said"] == plain["said"]
    assert ours["steps"] < 0.7 * plain["steps"]
    assert ours["ahead"]
    assert ours["stats"]["accepted"] > 15
    assert ours["stats"]["device_bytes"] > 10_000


@pytest.mark.parametrize(("shards", "tokens"), [(1, 2000), (3, 4000)])
def test_the_device_drafts_what_the_numba_kernels_draft(shards: int, tokens: int) -> None:
    # benchmarks/device_draft.py has 20,000 contexts and a large index; here is one of each kind.
    script = SCRIPT.with_name("device_rows.py")
    words = [str(script), str(shards), str(tokens), "16", "8", str(shards)]
    ended = subprocess.run([sys.executable, *words], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-4000:]
    found = json.loads(ended.stdout)
    assert found["differ"] == []
    assert found["worst"] < 1e-6
    assert found["drafted"] > 40


def test_the_kernel_compiles_for_gpus() -> None:
    script = SCRIPT.with_name("device_compile.py")
    ended = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-4000:]
    assert min(json.loads(ended.stdout).values()) > 10_000

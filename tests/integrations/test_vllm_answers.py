"""The program that answers in vLLM, its engine left out: files, chunks, time. Needs no vLLM."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tascade.integrations import vllm_answers

COUNT = 50


@pytest.fixture
def job(tmp_path: Path) -> Callable[..., Path]:
    def make(seconds: float) -> Path:
        about = {"requests": 16, "first": 8, "seconds": seconds, "ends": [9]}
        (tmp_path / "job.json").write_text(json.dumps(about))
        sizes = np.arange(1, COUNT + 1)
        np.savez(
            tmp_path / "prompts.npz",
            ids=np.concatenate([np.full(n, n, np.int32) for n in sizes]),
            ends=np.cumsum(sizes),
            limits=sizes + 100,
        )
        return tmp_path

    return make


@pytest.fixture
def chunks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many prompts the engine was given at a time; it says their length and their limit."""
    found: list[int] = []

    def said(engine: Any, prompts: Any, limits: Any, ends: Any) -> list[list[int]]:
        found.append(len(prompts))
        assert ends == [9]
        return [[len(ids), most] for ids, most in zip(prompts, limits, strict=True)]

    monkeypatch.setattr(vllm_answers, "_said", said)
    monkeypatch.setattr(vllm_answers, "_engine", lambda job: None)
    monkeypatch.setattr(vllm_answers, "_distribution", lambda: "vllm")
    monkeypatch.setattr(vllm_answers.importlib.metadata, "version", lambda name: "0.32.0")
    return found


def answers(folder: Path) -> list[Any]:
    return [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]


def test_all_prompts_are_answered_in_their_order(
    job: Callable[..., Path], chunks: list[int]
) -> None:
    folder = job(600.0)
    vllm_answers.main(folder)
    assert answers(folder) == [[n - 1, [n, n + 100]] for n in range(1, COUNT + 1)]
    assert chunks[0] == 8
    assert sum(chunks) == COUNT


def test_chunks_grow_to_the_batch_and_fit_the_time() -> None:
    grow = vllm_answers._next_chunk
    assert grow(8, 0.1, 900.0, 32) == 16  # slow: more at once all the same
    assert grow(32, 0.1, 900.0, 32) == 32
    assert grow(32, 10.0, 900.0, 32) == 150  # what takes a quarter of a minute
    assert grow(32, 1e4, 900.0, 32) == 2048
    assert grow(32, 1.0, 20.0, 32) == 20  # what there is time for
    assert grow(32, 1.0, -5.0, 32) == 8


def test_no_chunk_is_begun_when_time_is_up(job: Callable[..., Path], chunks: list[int]) -> None:
    vllm_answers.main(job(-1.0))
    assert chunks == []

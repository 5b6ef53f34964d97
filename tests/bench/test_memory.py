"""What a method needs of memory, in a process of its own, for a model that is mostly tables."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tascade import bundled
from tascade.bench import memory
from tascade.bench import pack as bench
from tascade.bench.memory import MemoryJob, can_measure, measure_here, measure_memory
from tascade.bench.pack import BenchOptions
from tascade.bench.tailored import HEADS
from tascade.config import VocabConfig
from tascade.data.encode import fingerprint
from tascade.load import load_model
from tascade.pack import Pack, PackInfo
from tascade.pipeline import tailor
from tascade.tailor.counts import count_documents
from tascade.tailor.profile import build_profile
from tascade.tailor.tailored import keep_vocabulary
from tascade.testing import byte_tokenizer, tiny_model

VOCAB, WIDTH = 60_000, 256
TABLE = VOCAB * WIDTH * 4  # in float32, which it is loaded in
SLACK = 8 << 20

needs_account = pytest.mark.skipif(not can_measure(), reason="needs Linux's account of memory")


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pack with a short list, for a model with two large tables."""
    folder = tmp_path_factory.mktemp("memory")
    sizes = {"hidden_size": WIDTH, "head_dim": 64, "intermediate_size": 512}
    model = tiny_model("llama", vocab_size=VOCAB, eos_token_id=256, **sizes).to(torch.float16)
    tokenizer = byte_tokenizer()
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    info = PackInfo(str(folder / "model"), fingerprint(tokenizer), VOCAB)
    made = Pack(folder / "pack", info).save()
    row = np.asarray([65], np.int32), np.asarray([66, 5000, 256], np.int32)
    profile = build_profile(count_documents([row]), tokenizer, (256,), vocab_size=VOCAB)
    keep_vocabulary(made, tokenizer, profile, VocabConfig(head="masked"))
    return made.path


@pytest.mark.slow
@needs_account
def test_a_process_counts_tables_and_a_small_head_has_none(pack: Path, tmp_path: Path) -> None:
    job = MemoryJob(str(pack), dtype="float32", device="cpu", max_new_tokens=4)
    plain = measure_memory(job, ["a prompt", "another"])
    small = measure_memory(dataclasses.replace(job, head="masked"), ["a prompt", "another"])
    body = plain["model_bytes"] - 2 * TABLE
    assert plain["vocabulary_bytes"] == 2 * TABLE
    assert 0 < body < TABLE / 8
    assert small["model_bytes"] == body + small["vocabulary_bytes"]
    assert 257 * WIDTH * 4 < small["vocabulary_bytes"] < 1024 * WIDTH * 4  # the bytes, and room
    for found in (plain, small):
        assert found["anonymous_bytes"] <= found["peak_bytes"]
        assert found["start_anonymous_bytes"] < found["start_bytes"] < found["peak_bytes"]
        assert "device_peak_bytes" not in found
    kept = tmp_path / "kept"
    shutil.copytree(pack, kept)
    info = Pack.open(kept).info
    recipe = {**info.recipe, "vocab": {**info.recipe["vocab"], "tables": "device"}}
    Pack(kept, dataclasses.replace(info, recipe=recipe)).save()
    whole = measure_here(dataclasses.replace(job, pack=str(kept), head="masked"), ["a prompt"])
    assert whole.vocabulary_bytes == small["vocabulary_bytes"] + 2 * TABLE
    assert whole.model_bytes == body + whole.vocabulary_bytes
    # This much is in both tables. Besides, the logits of passes that were timed for the whole head,
    # 64 rows of them and more than once, stay with the process as room for the next ones.
    saved = plain["anonymous_bytes"] - small["anonymous_bytes"]
    assert 2 * TABLE - SLACK < saved < 3 * TABLE
    assert plain["peak_bytes"] - small["peak_bytes"] > 2 * TABLE - SLACK


@pytest.mark.slow
@needs_account
def test_what_cannot_be_measured_is_said_and_stops_nothing(pack: Path, tmp_path: Path) -> None:
    gone = measure_memory(MemoryJob(str(tmp_path / "nowhere")), [])
    assert gone == {"skipped": "no pack in this folder"}
    late = measure_memory(MemoryJob(str(pack)), ["a prompt"], 0.01)
    assert late == {"skipped": "its process took longer than 0 s"}
    crashed = measure_memory(MemoryJob(str(pack), dtype="float31"), [])
    assert "process ended with 1. AttributeError" in crashed["skipped"]


def test_the_bench_measures_plain_and_what_a_tailored_head_is_held_against(
    ticket_pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs: list[MemoryJob] = []
    asked: list[Any] = []

    def measured(job: MemoryJob, prompts: Sequence[Any], seconds: float) -> dict[str, Any]:
        jobs.append(job)
        assert seconds == 60 * 7
        asked.append(list(prompts))
        return {"skipped": f"{job.head}, {'with' if job.drafts else 'no'} drafts"}

    monkeypatch.setattr(bench, "measure_memory", measured)
    monkeypatch.setattr(memory, "_STATUS", Path(__file__))
    copy = Pack.open(ticket_pack).copy_to(tmp_path / "pack").path
    rows = [{"prompt": f"Ticket T-{i}", "completion": "{}"} for i in range(9)]
    few = BenchOptions(("tasc-spec",), rows=4, repeats=1, max_new_tokens=3, minutes=7, memory=True)

    def told(options: BenchOptions, **more: Any) -> dict[str, str]:
        jobs.clear()
        result = bench.bench_pack(copy, rows, dtype="float32", options=options, **more)
        found = result["methods"].items()
        return {name: m["memory"]["skipped"] for name, m in found if "memory" in m}

    assert told(few) == {"plain": "full, no drafts"}
    assert jobs == [MemoryJob(str(copy), dtype="float32", max_new_tokens=3)]
    assert asked == [["Ticket T-0", "Ticket T-2", "Ticket T-4"]]
    loaded = load_model(bundled.model_path(), dtype="float32")[:2]
    assert told(few, model=loaded) == {}  # another process has no such model
    assert told(dataclasses.replace(few, memory=False)) == {}
    assert told(dataclasses.replace(few, memory=None)) == {}  # there is nothing to save
    tailor(copy, bundled.data_path("tickets", "train"), config=VocabConfig(head="exact"))
    heads = dataclasses.replace(few, methods=("tasc-paper", "tasc-spec", *HEADS), memory=None)
    assert told(heads, model=bundled.model_path()) == {
        "plain": "full, no drafts",
        "tasc-spec": "full, with drafts",
        "tailored-masked": "masked, no drafts",
        "tailored-exact": "exact, no drafts",
        "tasc-spec+tailored-exact": "exact, with drafts",
    }
    assert {job.model for job in jobs} == {str(bundled.model_path())}
    monkeypatch.setattr(memory, "_STATUS", tmp_path / "no such account")
    assert told(few) == {}

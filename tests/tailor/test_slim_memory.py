"""What loading costs, by the kernel's own high-water mark, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tascade.testing import byte_tokenizer, tiny_model

VOCAB, WIDTH = 60_000, 256

# The mark is of all resident pages and never falls. Ballast lifts what is resident now up to it, so
# that whatever is needed next, for however short a time, moves it. Pages of the file count as well:
# a table that is only mapped costs none of them until its rows are asked for.
PROGRAM = """
import json, sys
import numpy as np
import torch
from transformers import AutoModelForCausalLM
from tascade.tailor.offload.load import load_offloaded

small, large, how = sys.argv[1:]
ballast = []

def status(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith(field + ":"))

def level():
    short = status("VmHWM") - status("VmRSS")
    if short > 0:
        ballast.append(np.ones(short + (1 << 20), np.uint8))
    return status("VmHWM"), status("RssAnon")

def load(folder):
    if how.startswith("slim"):
        return load_offloaded(folder, dtype=how.split("-")[1], device="cpu").model
    kind = torch.float32 if how.endswith("float32") else "auto"
    return AutoModelForCausalLM.from_pretrained(folder, dtype=kind, use_safetensors=True)

ids = torch.arange(8)[None]
with torch.no_grad():
    load(small)(ids)   # what is imported and started on first use is not counted
    mark, own = level()
    model = load(large)
    loaded = status("VmHWM") - mark
    model.model(ids)
    used = status("VmHWM") - mark
    model(ids)
anonymous = status("RssAnon") - own
print(json.dumps({"loaded": loaded, "used": used, "anonymous": anonymous}))
"""

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="needs Linux's account of memory"
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model for warming up, one whose tables are most of it, and the bytes of both parts."""
    sizes = {"hidden_size": WIDTH, "head_dim": 64, "intermediate_size": 512}
    paths = [tmp_path_factory.mktemp("small"), tmp_path_factory.mktemp("large")]
    for path, vocab in zip(paths, (300, VOCAB), strict=True):
        model = tiny_model("llama", vocab_size=vocab, **sizes).to(torch.float16)
        model.save_pretrained(path)
        byte_tokenizer().save_pretrained(path)
    table = VOCAB * WIDTH * 2
    body = sum(p.nbytes for p in model.parameters()) - 2 * table
    assert body < table / 8
    return [*map(str, paths)], table, body


def measure(folders: list[str], how: str) -> dict[str, int]:
    """Bytes by which memory grew: while loading, and with its first use."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *folders, how], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


SLACK = 4 << 20  # allocator, page tables, the interpreter's own objects


@pytest.mark.parametrize("dtype", ["auto", pytest.param("float32", marks=pytest.mark.slow)])
def test_a_slim_model_never_needs_memory_for_a_table(folders, dtype):
    paths, table, body = folders
    grown = measure(paths, f"slim-{dtype}")
    size = body * (2 if dtype == "float32" else 1)
    assert grown["loaded"] <= 1.05 * size + SLACK < table / 2
    assert grown["used"] <= 1.05 * size + SLACK
    # With the whole head, pages of the file come in; memory of the process's own is not taken.
    block = 64 << 20 if dtype == "float32" else 0
    assert grown["anonymous"] <= 1.05 * size + SLACK + block


def test_the_measure_sees_a_table(folders):
    paths, table, _ = folders
    grown = measure(paths, "stock-float32")
    assert min(grown["loaded"], grown["anonymous"]) > 4 * table  # two, in twice the precision

"""`tascade warm-up`: what a container image runs, so that no request waits for a compiler."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

USE = """
import numpy as np, tascade
from tascade import bundled
from tascade.data.load import load_examples
from tascade.draft.ngram.batch import BatchDrafter
from tascade.draft.ngram.batch_budget import BatchBudget
from tascade.draft.ngram.sources import open_task

rows = [
    {"prompt": row.prompt, "completion": row.completion}
    for row in list(load_examples(bundled.data_path("tickets")))[:60]
]
recipe = tascade.Recipe(dtype="float32", max_new_tokens=24)
model = tascade.adapt(bundled.model_path(), rows, out="pack", recipe=recipe)
assert model.generate(rows[0]["prompt"])
task = open_task(model.pack, model.pack.info.fingerprint, model.pack.info.vocab_size)
drafter = BatchDrafter([task], requests=4, length=64, most=8, budget=BatchBudget(8))
ids = np.zeros((4, 64), np.int32)
for length in range(8, 12):
    drafter.propose([[5]] * 4, np.full(4, length, np.int32), ids)
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_nothing_is_compiled_after_a_warm_up(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    env = os.environ | {"NUMBA_CACHE_DIR": str(cache)}

    def run(*words: str) -> set[str]:
        command = [sys.executable, *words]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return {path.name for path in cache.rglob("*.nbc")}

    warm = run("-m", "tascade.cli", "warm-up")
    assert len(warm) > 20
    # Each for one signature, but two: one searches in an index that is being made and in one that
    # was opened, which cannot be written to; one multiplies with floats and with halves of them.
    more = {name.split("-")[0] for name in warm if not name.endswith(".1.nbc")}
    assert more == {"product_kernels._share", "similar_kernels._find"}
    assert run("-c", USE) - warm == set()

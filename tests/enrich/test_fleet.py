"""Two processes that train together take the steps one would."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import json, sys
import numpy as np
import torch
from tascade.config import TuneConfig
from tascade.testing import tiny_model
from tascade.enrich.tokens.merger import Merger
from tascade.enrich.train.distributed import join_fleet
from tascade.enrich.train.samples import merged
from tascade.enrich.train.embeddings import make_room, start_rows
from tascade.enrich.train.train import teach
from pathlib import Path

torch.set_num_threads(1)
fleet = join_fleet("cpu")
model = tiny_model("llama")
merger = Merger([(5, 6), (7, 8, 9)], model.config.vocab_size)
rng = np.random.default_rng(0)
rows = []
for n in range(13):
    answer = [5, 6, 3 + n, 7, 8, 9, 1][n % 3 :]
    rows.append((rng.integers(3, 60, n + 2).astype(np.int32), np.array(answer, np.int32)))
config = TuneConfig(
    start="mean", row_steps=3, epochs=2, batch=4, rank=4, precision="float32", rate=1e-3
)
samples = merged(rows, merger, 64)
work = Path(sys.argv[1])
taught = teach(model, merger, samples, [], config, work, lambda *a: None, fleet)
total = {k: float(v.double().abs().sum()) for k, v in taught.model.state_dict().items()}
found = {"losses": taught.losses, "total": total}
Path(sys.argv[2] + f".{fleet.rank}").write_text(json.dumps(found))
"""


def run(tmp_path: Path, processes: int) -> list[dict[str, object]]:
    script, out = tmp_path / "train.py", tmp_path / f"out{processes}"
    script.write_text(SCRIPT)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *(launch if processes > 1 else [])]
    command += [str(script), str(tmp_path / f"state{processes}"), str(out)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(Path(f"{out}.{rank}").read_text()) for rank in range(processes)]


def test_two_processes_take_the_steps_of_one(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    (alone,) = run(tmp_path, 1)
    first, second = run(tmp_path, 2)
    assert len(alone["losses"]) == 3 + 2 * 4  # type: ignore[arg-type]
    assert first == second
    assert first["losses"] == pytest.approx(alone["losses"], rel=1e-4)
    assert first["total"] == pytest.approx(alone["total"], rel=1e-4)

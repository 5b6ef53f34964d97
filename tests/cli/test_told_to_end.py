"""A command that is told to end, as a container or `timeout` does it, leaves nothing half-made."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from tascade import bundled


def test_adapt_that_is_told_to_end_keeps_what_a_resume_needs_and_no_more(tmp_path: Path) -> None:
    data = bundled.data_path("tickets", "train")
    command = [sys.executable, "-m", "tascade.cli", "adapt", "--model", str(bundled.model_path())]
    command += ["--data", str(data), "--self", "--own-seconds", "600", "--threads", "1"]
    command += ["--out", str(tmp_path / "pack")]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env) as running:
        assert running.stderr is not None
        before = []
        for line in running.stderr:
            before.append(line)
            if "answering training prompts" in line:
                running.send_signal(signal.SIGTERM)
                break
        said = running.stderr.read()
        assert running.wait() == 130
    assert "at most: own answers (--own-seconds) " in "".join(before)
    assert "--resume goes on with what there is" in said
    assert [path.name for path in tmp_path.iterdir()] == [".pack.answers"]

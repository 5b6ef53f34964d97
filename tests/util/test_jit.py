"""The cache of compiled kernels survives an upgrade that moves things about."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

KERNELS = """
from typing import NamedTuple
import numpy as np
from tascade.util.jit import kernel
{box}
@kernel
def first(box):
    return box.numbers[0] + {constant}
print(first({name}(np.arange(3))))
"""
BOX = "class Box(NamedTuple):\n    numbers: np.ndarray\n"


def run(folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", "import kernels"], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_changed_neighbour_is_compiled_again(tmp_path: Path) -> None:
    text = KERNELS.format(box="from other import OTHER\n" + BOX, constant="OTHER", name="Box")
    (tmp_path / "kernels.py").write_text(text)
    (tmp_path / "other.py").write_text("OTHER = 1\n")
    assert run(tmp_path) == "1"
    (tmp_path / "other.py").write_text("OTHER = 2\n")
    assert run(tmp_path) == "2"


def test_an_index_that_names_classes_long_gone_is_not_read(tmp_path: Path) -> None:
    here = KERNELS.format(box="\n" + BOX, constant=0, name="Box")
    moved = KERNELS.format(box="import box\n\n\n", constant=0, name="box.Box")
    assert here.count("\n") == moved.count("\n")  # or the index would have another name
    (tmp_path / "kernels.py").write_text(here)
    assert run(tmp_path) == "0"
    (tmp_path / "box.py").write_text("from typing import NamedTuple\nimport numpy as np\n" + BOX)
    (tmp_path / "kernels.py").write_text(moved)
    assert run(tmp_path) == "0"

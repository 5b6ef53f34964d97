"""The cache of compiled kernels survives an upgrade that moves things about."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numba.core.caching import NullCache
from numba.core.errors import NumbaError

from tascade.util.jit import inner, kernel, lean

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


@inner
def _sum(numbers, start, span):
    total = start
    for i in range(span[0], span[1]):
        total += numbers[i]
    return total


@lean
def sums(numbers, start):
    return _sum(numbers, 7, (0, 2)) + _sum(numbers, start, (start, len(numbers)))


@kernel
def doubled(numbers):
    return numbers * 2


@lean
def copied(numbers):
    return numbers.copy()[0]


for _made in (_sum, sums, doubled, copied):
    _made._cache = NullCache()  # else what an earlier run has compiled is counted


def test_literals_and_widths_make_no_kernel_of_their_own():
    numbers = np.arange(5)
    for start in (1, np.int32(1), np.uint8(1)):
        assert sums(numbers, start) == 19
    assert [len(one.signatures) for one in (sums, _sum)] == [1, 1]
    assert sums(numbers.astype(np.float32), 1) == 19.0


def test_arrays_are_made_only_where_that_is_said():
    assert doubled(np.arange(3)).tolist() == [0, 2, 4]
    with pytest.raises(NumbaError, match="NRT required"):
        copied(np.arange(3))


def test_an_inner_kernel_cannot_be_called_from_python():
    assert sums(np.arange(5), 1) == 19
    with pytest.raises(TypeError, match="_sum is for kernels alone"):
        _sum(np.arange(5), 1, (0, 1))

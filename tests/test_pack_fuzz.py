"""Whatever the bytes of a pack are: tascade's own errors, or right words, and never a crash."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import pack_fuzz

MUTATIONS = 2000
PARTS = 4


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("fuzz") / "sound"
    root.mkdir()
    pack_fuzz.build(root)
    return root


def run(sound: Path, root: Path, *arguments: object) -> str:
    """Run the script on a copy in a process of its own; returns what it printed."""
    shutil.copytree(sound, root)
    command = [sys.executable, pack_fuzz.__file__, str(root), *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    told = "\n".join(done.stdout.splitlines()[-25:])
    assert done.returncode == 0, f"exit {done.returncode} at the last mutation named here:\n{told}"
    return done.stdout


MANY = [pytest.param(("read", "mapped")[i % 2], MUTATIONS // PARTS * i, MUTATIONS // PARTS,
                     marks=pytest.mark.slow) for i in range(PARTS)]  # fmt: skip


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("kind", "first", "count"), [("mapped", MUTATIONS, 60), *MANY])
def test_mutated_packs_are_refused_or_right(
    sound: Path, tmp_path: Path, kind: str, first: int, count: int
) -> None:
    out = run(sound, tmp_path / "root", kind, first, count)
    results = [line for line in out.splitlines() if line.startswith("    ")]
    assert len(results) == count
    # Else the test would say little: many are refused, and many work as well.
    assert sum("Error" in line for line in results) > count / 4
    assert sum("used, used" in line for line in results) > count / 4


@pytest.mark.slow
def test_files_written_over_after_opening_change_nothing(sound: Path, tmp_path: Path) -> None:
    run(sound, tmp_path / "root", "overwritten")

"""The rules of the house: import directions, the size of things, what an import costs."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import tascade

SRC = Path(tascade.__file__).parent

# Top row first. A module may import from rows below its own, and from its own room.
ROWS = [
    {"cli"},
    {"bench", "serve", "integrations", "testing"},
    {"pipeline"},
    {"train_drafter"},
    {"forecast"},
    {"own_answers"},
    {"builder"},
    {"model"},
    {"enrich", "draft.neural"},
    {"tailor"},
    {"tailor.offload", "enrich.train", "draft.ngram"},
    {"draft", "enrich.tokens", "answers"},
    {"index", "decode", "data", "pack", "load", "bundled", "options"},
    {"config"},
    {"data.chat"},
    {"util"},
    {"core", "errors"},
]
ROOMS = {room for row in ROWS for room in row}


def room_of(module: str) -> str:
    """The room that a module ("draft.ngram.mixer") lies in: the longest name of a row."""
    parts = module.split(".")
    names = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
    return next((name for name in names if name in ROOMS), module)


def rank(room: str) -> int:
    return next(i for i, row in enumerate(ROWS) if room in row)


def imports(path: Path) -> set[str]:
    """Modules of tascade that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            if node.module == "tascade":
                found |= {alias.name for alias in node.names}
            elif node.module.startswith("tascade."):
                found.add(node.module.removeprefix("tascade."))
        elif isinstance(node, ast.Import):
            names = [a.name for a in node.names]
            found |= {n.removeprefix("tascade.") for n in names if n.startswith("tascade.")}
    return found - {"__version__"}


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(SRC).with_suffix("").parts).removesuffix(".__init__")


def files() -> list[Path]:
    return [p for p in SRC.rglob("*.py") if p.parent != SRC or p.name != "__init__.py"]


def test_imports_go_downward_only() -> None:
    for path in files():
        room = room_of(module_of(path))
        for other in map(room_of, imports(path)):
            allowed = other == room or rank(other) > rank(room)
            assert allowed, f"{path.relative_to(SRC)} imports {other}, which is not below {room}"


def test_every_room_has_a_row_and_every_row_its_rooms() -> None:
    modules = {module_of(path) for path in files()}
    assert {room_of(module) for module in modules} <= ROOMS
    for room in ROOMS:
        assert any(m == room or m.startswith(room + ".") for m in modules), room
    loose = [path for path in files() if path.parent == SRC]
    assert len(loose) <= 12


def test_the_map_in_the_docs_is_the_tree() -> None:
    page = SRC.parents[1] / "docs" / "design.md"
    drawn = page.read_text().split("```text")[1].split("tests/")[0]
    listed = re.findall(r"^  (\S+)  ", drawn, re.MULTILINE)
    loose = {path.name for path in SRC.glob("*.py")}
    top = {f"{path.name}/" for path in SRC.iterdir() if (path / "__init__.py").exists()}
    rooms = {room.replace(".", "/") + "/" for room in ROOMS if "." in room}
    rooms = {room for room in rooms if (SRC / room).is_dir()}
    assert sorted(listed) == sorted(loose | top | rooms)


def test_kernels_take_names_from_files_with_kernels_only() -> None:
    # The cache of compiled kernels is stamped by these files (tascade/util/jit.py).
    held = {module_of(p) for p in files() if "from tascade.util.jit import" in p.read_text()}
    assert len(held) > 8
    for path in files():
        if module_of(path) in held:
            assert imports(path) <= held | {"core", "errors", "util.jit"}, path
        else:
            assert "njit" not in path.read_text() or path.name == "jit.py", path


def test_files_and_functions_fit_a_screen() -> None:
    for path in files():
        text = path.read_text()
        assert text.count("\n") <= 400, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno is not None
                assert node.end_lineno - node.lineno < 75, f"{node.name} in {path} is long"


def test_public_surface_is_small_and_real() -> None:
    assert len(tascade.__all__) <= 16
    for name in tascade.__all__:
        assert getattr(tascade, name) is not None
    with pytest.raises(AttributeError, match="nothing_like_it"):
        tascade.nothing_like_it  # noqa: B018


def test_import_is_light() -> None:
    code = (
        "import time; t = time.perf_counter(); import tascade, sys;"
        "heavy = {'torch', 'transformers', 'numba', 'numpy'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "code",
    [
        "sys.argv = ['tascade', '--help']; from tascade.cli import main; main()",
        "sys.argv = ['tascade', 'bench', '--help']; from tascade.cli import main; main()",
        "import tascade.cli.console, tascade.bench.page, tascade.pack",
    ],
    ids=["help", "help of a verb", "report"],
)
def test_what_runs_no_model_loads_no_torch(code: str) -> None:
    check = (
        "import atexit, os, sys\n"
        "def look():\n"
        "    heavy = {'torch', 'transformers', 'numba'} & set(sys.modules)\n"
        "    os._exit(1 if heavy else 0)\n"
        f"atexit.register(look); {code}"
    )
    subprocess.run([sys.executable, "-c", check], check=True, capture_output=True)


def test_vllm_and_web_frameworks_stay_in_their_place() -> None:
    for path in files():
        text = path.read_text()
        if "serve" not in path.parts and path.name not in ("vllm.py", "vllm_answers.py"):
            assert not re.search(r"^\s*(import vllm|from vllm)\b", text, re.MULTILINE)
            assert "fastapi" not in text

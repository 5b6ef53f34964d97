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

# Top row first. A module may import from rows below its own, and from its own folder.
ROWS = [
    {
        "cli",
        "cli_serve",
        "cli_options",
        "cli_train",
        "demo",
        "console",
        "serve",
        "bench",
        "integrations",
        "inspection",
        "enrichment",
        "tailoring",
        "tuning",
        "tuning_run",
        "testing",
    },
    {"lessons"},
    {"pipeline", "forecast"},
    {"calibration"},
    {"model", "own", "learning"},
    {"train", "tailored", "assistant"},
    {"draft", "decode", "tokens", "vocab"},
    {"data", "pack", "encode", "load", "bundled"},
    {"config", "places"},
    {"chat"},
    {"fields"},
    {"core", "errors", "files", "jit"},
]
# The top row is the user's side: these of its modules may use another one of it.
TOP_ROW_ALLOWED = {
    "cli": {
        "cli_options",
        "cli_serve",
        "cli_train",
        "console",
        "demo",
        "bench",
        "inspection",
        "tuning",
    },
    "cli_serve": {"cli_options", "console", "serve"},
    "cli_train": {"cli_options", "console", "enrichment", "tailoring", "tuning"},
    "tuning": {"tuning_run"},
    "tuning_run": {"enrichment"},
    "inspection": {"enrichment"},
    "demo": {"console", "bench", "tuning"},
}


def rank(noun: str) -> int:
    return next(i for i, row in enumerate(ROWS) if noun in row)


def imports(path: Path) -> set[str]:
    """First-level tascade modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            if node.module == "tascade":
                found |= {alias.name for alias in node.names}
            elif node.module.startswith("tascade."):
                found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("tascade.")}
    return found


def files() -> list[Path]:
    return [p for p in SRC.rglob("*.py") if p.parent != SRC or p.name != "__init__.py"]


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(SRC)))
def test_imports_go_downward_only(path: Path) -> None:
    noun = path.relative_to(SRC).parts[0].removesuffix(".py")
    for other in imports(path) - {noun, "__version__"}:
        allowed = rank(other) > rank(noun) or other in TOP_ROW_ALLOWED.get(noun, set())
        assert allowed, f"{path.relative_to(SRC)} imports {other}, which is not below {noun}"


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(SRC)))
def test_files_and_functions_fit_a_screen(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < 75, f"{node.name} is long"


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
        "import tascade.console, tascade.bench.page, tascade.pack",
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
        if "serve" not in path.parts and path.name != "vllm.py":
            assert not re.search(r"^\s*(import vllm|from vllm)\b", text, re.MULTILINE)
            assert "fastapi" not in text

"""Every causal architecture of Transformers does what docs/models.md says: equal, or refused."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).parents[2] / "docs"


def script() -> Any:
    spec = importlib.util.spec_from_file_location("generate_models", DOCS / "generate_models.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MODELS = script()
SAID: dict[str, str] = MODELS.rows_of(MODELS.PAGE.read_text("utf-8"))
FEW = ("bert", "deepseek_v2", "gpt_oss", "llama", "mamba", "mixtral", "qwen3_moe")


def test_the_page_names_every_architecture_and_none_differs() -> None:
    assert set(SAID) == set(MODELS.NAMES)
    assert not [name for name, said in SAID.items() if said.startswith("differs")]
    assert sum(said.startswith("equal") for said in SAID.values()) > 60


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name", [n if n in FEW else pytest.param(n, marks=pytest.mark.slow) for n in MODELS.NAMES]
)
def test_an_architecture_is_equal_or_refused(name: str) -> None:
    assert MODELS.tried(name).replace("|", "/") == SAID[name]

"""Every causal architecture of Transformers does what docs/models.md says: equal, or refused."""

from __future__ import annotations

from typing import Any

import pytest

from scripts import DOCS, load

MODELS: Any = load(DOCS / "generate_models.py")
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

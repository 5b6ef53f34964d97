"""`--help` says every word of every option, brackets too, and what a default does."""

from __future__ import annotations

import re
from typing import Any

import pytest
import typer.main
from typer.testing import CliRunner

from tascade.cli.verbs import app

VERBS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def letters(text: str) -> str:
    """What stays of a text however it is wrapped and framed."""
    return re.sub(r"[\s│]+", "", text)


@pytest.mark.parametrize("verb", VERBS)
def test_help_loses_nothing(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setenv("TERMINAL_WIDTH", "400")
    shown = letters(CliRunner().invoke(app, [verb, "--help"]).stdout)
    for parameter in VERBS[verb].params:
        assert letters(parameter.help or "") in shown, parameter.name
        if isinstance(parameter.show_default, str):
            assert letters(parameter.show_default) in shown, parameter.name


@pytest.mark.parametrize("verb", VERBS)
def test_a_zero_that_means_something_else_says_what(verb: str) -> None:
    for parameter in VERBS[verb].params:
        zero = parameter.default == 0 and not isinstance(parameter.default, bool)
        if zero and parameter.name not in ("seed", "temperature"):  # where 0 is what is meant
            assert isinstance(parameter.show_default, str), parameter.name

"""What programs read on stdout: the model's bytes, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tascade.cli.verbs import app
from tascade.core import Generation
from tascade.model import TaskModel

ANSWERS = [
    '{"face": ":smile:", "at": "10:key:30"}',
    "name\tvalue",
    "one\rtwo\athree",
    "[bold]x[/bold] [/] [red",
    "\x1b[31mred\x1b[0m",
    "long " * 100,
    "ends with a newline\n",
    " 🙂 é\n\n  spaces ",
    "",
]


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Prompts that come, each answered by the next of ``ANSWERS``."""
    asked: list[Any] = []

    def run(self: TaskModel, prompt: Any, **options: Any) -> Generation:
        asked.append(prompt)
        return Generation([1], ANSWERS[(len(asked) - 1) % len(ANSWERS)], sources=[0])

    monkeypatch.setattr(TaskModel, "run", run)
    return asked


@pytest.mark.parametrize("flags", [[], ["--explain"]])
def test_generate_prints_the_answers_bytes(
    ticket_pack: Path, told: list[Any], flags: list[str]
) -> None:
    prompts = [f"p{i}" for i in range(len(ANSWERS))]
    result = CliRunner().invoke(app, ["generate", str(ticket_pack), *prompts, *flags])
    assert result.exit_code == 0, result.output
    assert result.stdout_bytes.decode() == "".join(answer + "\n" for answer in ANSWERS)


def test_a_prompt_file_is_read_as_it_is_and_stdin_without_its_last_newline(
    ticket_pack: Path, told: list[Any], tmp_path: Path
) -> None:
    file = tmp_path / "[v1] prompt.txt"
    file.write_bytes(b"from a file\r\n\n")
    asked = ["generate", str(ticket_pack), "-", "--prompt-file", str(file)]
    for piped, heard in (("piped\n", "piped"), ("piped\n\n", "piped\n"), ("piped", "piped")):
        told.clear()
        assert CliRunner().invoke(app, asked, input=piped).exit_code == 0
        assert told == [heard, "from a file\r\n\n"]


def test_without_a_prompt_there_is_an_error_not_a_model(ticket_pack: Path) -> None:
    result = CliRunner().invoke(app, ["generate", str(ticket_pack)])
    assert "no prompt" in str(result.exception)
    result = CliRunner().invoke(app, ["generate", str(ticket_pack), "--prompt-file", "nowhere"])
    assert "cannot be read" in str(result.exception)


def test_folders_with_markup_in_their_names_are_named_whole(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text(
        "".join(f'{{"prompt": "p{i}", "completion": "answer {i}"}}\n' for i in range(9))
    )
    out = tmp_path / ("[v1]" + "x" * 120) / "packs[/v1]"
    out.parent.mkdir(parents=True)
    from tascade import bundled

    asked = ["adapt", "-m", str(bundled.model_path()), "-d", str(data), "-o", str(out)]
    result = CliRunner().invoke(app, asked)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(f"{out}: ")

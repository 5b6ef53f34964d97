"""`chat` remembers what was said, and `--system` stands in for the pack's."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import tascade
from tascade.cli import answer
from tascade.cli.verbs import app
from tascade.errors import ConfigError
from tascade.model import TaskModel
from tascade.testing import byte_tokenizer, tiny_model

ROWS = [{"prompt": f"item {i}", "completion": f"number {i % 7}"} for i in range(8)]
USER = {"role": "user", "content": "one"}


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A pack with a chat template, and one without."""
    found = {}
    for name in ("chat", "plain"):
        folder = tmp_path_factory.mktemp(name)
        tokenizer = byte_tokenizer()
        if name == "plain":
            tokenizer.chat_template = None
        for part in (tiny_model("llama", vocab_size=260, eos_token_id=256), tokenizer):
            part.save_pretrained(folder / "model")
        found[name] = folder / "pack"
        tascade.adapt(folder / "model", ROWS, out=found[name], max_new_tokens=4)
    return found


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every prompt that comes, with the system prompt in force; answers are A1, A2, ..."""
    seen: list[Any] = []

    def streamed(task_model: TaskModel, prompt: Any, **options: Any) -> str:
        if "long" in str(prompt):
            raise ConfigError("this prompt is too long")
        task_model.encode(prompt)
        seen.append((prompt, task_model.chat.system))
        sys.stdout.write(f"A{len(seen)}\n")
        return f"A{len(seen)}"

    monkeypatch.setattr(answer, "_streamed", streamed)
    return seen


def test_a_conversation_is_remembered(packs: dict[str, Path], asked: list[Any]) -> None:
    words = ["chat", str(packs["chat"]), "--system", "Be brief."]
    done = CliRunner().invoke(app, words, input="one\nlong\ntwo\n\n", catch_exceptions=False)
    assert "A1\n" in done.stdout
    assert "A2\n" in done.stdout
    assert "too long" in done.stderr
    reply = {"role": "assistant", "content": "A1"}
    second = [USER, reply, {"role": "user", "content": "two"}]
    assert asked == [([USER], "Be brief."), (second, "Be brief.")]


def test_without_a_chat_template_nothing_is_and_it_says_so(
    packs: dict[str, Path], asked: list[Any]
) -> None:
    done = CliRunner().invoke(app, ["chat", str(packs["plain"])], input="one\ntwo\n\n")
    assert asked == [("one", ""), ("two", "")]
    assert "nothing is remembered" in done.stderr


def test_a_systems_prompt_reaches_the_model(packs: dict[str, Path]) -> None:
    def said(*more: str) -> str:
        words = ["generate", str(packs["chat"]), "one", *more]
        done = CliRunner().invoke(app, words, catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.stdout

    model = TaskModel.from_pretrained(packs["chat"])
    wanted = model.generate([{"role": "system", "content": "Speak Dutch."}, USER])
    assert said("--system", "Speak Dutch.") == f"{wanted}\n"
    assert said() == f"{model.generate('one')}\n"
    done = CliRunner().invoke(app, ["generate", str(packs["plain"]), "one", "--system", "x"])
    assert "no chat template" in str(done.exception)


def test_an_answer_that_is_cut_says_so(packs: dict[str, Path]) -> None:
    words = ["chat", str(packs["chat"]), "--max-new-tokens", "3"]
    done = CliRunner().invoke(app, words, input="one\n\n", catch_exceptions=False)
    task_model = TaskModel.from_pretrained(packs["chat"])
    wanted = task_model.run([USER], max_new_tokens=3)
    assert wanted.finish_reason == "length"
    assert wanted.text in done.stdout
    assert "(cut at 3 tokens)" in done.stderr

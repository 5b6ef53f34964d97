"""What is said beside a recipe: the same in Python and on the command line."""

from __future__ import annotations

import inspect
import typing
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.main

import tascade
from tascade.cli.verbs import app
from tascade.config import Recipe
from tascade.errors import ConfigError
from tascade.options import KEYS, AdaptOptions, laid_over
from tascade.pipeline import adapt
from tascade.testing import byte_tokenizer, tiny_model

ROWS = [{"prompt": f"item {i}", "completion": f"number {i % 7}"} for i in range(8)]
GIVEN: dict[str, Any] = {
    "dtype": "float32",
    "max_new_tokens": 7,
    "on_error": "skip",
    "prompt_field": "prompt",
    "completion_field": "completion",
    "own_answers": True,
    "own_seconds": 600.0,
    "drafter": True,
    "tailor": "exact",
    "system": "Be brief.",
    "chat_template_kwargs": {"mood": "calm"},
}
"""A value for each keyword that is a setting of a pack; a template stands for the field."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("model")
    tiny_model("llama", vocab_size=260, eos_token_id=256).save_pretrained(place)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ mood }}{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(place)
    return place


def said(recipe: Recipe, key: str) -> Any:
    value: Any = recipe
    for part in key.split("."):
        value = getattr(value, part)
    return value


def test_every_flag_of_adapt_is_an_argument_of_it() -> None:
    command = typer.main.get_command(app).commands["adapt"]  # type: ignore[attr-defined]
    flags = {option.name for option in command.params} - {"help", "json"}  # how it is printed
    arguments = set(inspect.signature(adapt).parameters) - {"options", "progress"}
    options = set(typing.get_type_hints(AdaptOptions))
    assert flags == arguments | options
    assert options == set(KEYS) - {"model", "data", "validation", "logs"}
    assert {*GIVEN, "prompt_template"} == options


def test_each_argument_reaches_the_recipe_of_the_pack(folder: Path, tmp_path: Path) -> None:
    with warnings.catch_warnings():  # a drafter is trained or not as the clock has it
        warnings.simplefilter("ignore", UserWarning)
        made = adapt(folder, ROWS, validation=ROWS[:2], out=tmp_path / "pack", **GIVEN)
    kept = Recipe.from_dict(made.pack.info.recipe, stored=True)
    for name, value in GIVEN.items():
        wanted = {"mood": "calm"} if name == "chat_template_kwargs" else value
        assert said(kept, KEYS[name]) == wanted, name
    assert made.pack.info.own_answers == len(ROWS)
    assert made.tailored is not None


def test_arguments_win_over_a_recipe_and_none_says_nothing(tmp_path: Path) -> None:
    base = {"max_new_tokens": 9, "spec": {"own_answers": True}, "data": {"prompt_field": "q"}}
    Recipe.from_dict(base).to_yaml(tmp_path / "recipe.yaml")
    for recipe in (base, Recipe.from_dict(base), tmp_path / "recipe.yaml",
                   str(tmp_path / "recipe.yaml")):  # fmt: skip
        assert laid_over(recipe, {}) == Recipe.from_dict(base)
        made = laid_over(recipe, {"own_answers": False, "max_new_tokens": None, "system": "s"})
        assert (made.spec.own_answers, made.max_new_tokens, made.chat.system) == (False, 9, "s")
        made = laid_over(recipe, {"prompt_template": "{a}"})
        assert (made.data.prompt_field, made.data.prompt_template) == ("", "{a}")
        made = laid_over(made, {"prompt_field": "b"})
        assert (made.data.prompt_field, made.data.prompt_template) == ("b", "")


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"own_answer": True}, "did you mean own_answers"),
        ({"max_new_tokens": 0}, "max_new_tokens is out of range"),
        ({"own_answers": "yes"}, "wrong type"),
        ({"tailor": "tiny"}, "vocab.head"),
        ({"chat_template_kwargs": "["}, "JSON"),
        ({"recipe": {"specs": {}}}, "did you mean 'spec'"),
        ({"recipe": "nowhere.yaml"}, "cannot read the recipe"),
        ({"recipe": 5}, "no recipe"),
        ({"threads": -1}, "threads"),
        ({"tune": True}, "pass out="),
    ],
)
def test_what_is_wrong_is_named_before_a_model_is_loaded(given: Any, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        adapt("no-such-model", ROWS, **given)


def test_a_model_without_its_tokenizer_is_told_what_to_give(folder: Path) -> None:
    model = tiny_model("llama", vocab_size=260)
    made = adapt(folder, ROWS, max_new_tokens=4, tailor="exact")  # its folder goes with it
    pack = made.pack.path
    for call in (
        lambda: tascade.adapt(model, ROWS),
        lambda: tascade.inspect(ROWS, model),
        lambda: tascade.TaskModel.from_pretrained(pack, model),
        lambda: tascade.TaskModel.from_pretrained(pack, model, head="full"),
        lambda: tascade.adapt((model,), ROWS),  # type: ignore[arg-type]
    ):
        with pytest.raises(ConfigError, match="model") as told:
            call()
        assert "give (model, tokenizer)" in told.value.fix


def test_threads_are_those_of_the_call_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    whole = tascade.pipeline.load_model

    def watched(*args: Any, **options: Any) -> Any:
        seen.append(torch.get_num_threads())
        return whole(*args, **options)

    monkeypatch.setattr("tascade.pipeline.load_model", watched)
    before = torch.get_num_threads()
    adapt(folder, ROWS, max_new_tokens=4, threads=before + 1)
    assert seen == [before + 1]
    assert torch.get_num_threads() == before

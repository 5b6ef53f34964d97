"""What a call or a command may say beside a recipe, and the one place that lays it over the recipe.

Every flag of ``tascade adapt`` that is a setting of the pack is a key of :data:`KEYS`, and so is
every keyword of :func:`tascade.adapt` of that kind: they cannot drift apart.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Mapping
from typing import Any, TypedDict

from tascade.config import Recipe
from tascade.errors import ConfigError
from tascade.util.fields import shown

RecipeLike = Recipe | Mapping[str, Any] | str | os.PathLike[str]
"""A recipe, its nested mappings, or the path of its YAML file."""

KEYS = {
    "model": "model",
    "data": "data.train",
    "validation": "data.validation",
    "logs": "data.logs",
    "dtype": "dtype",
    "max_new_tokens": "max_new_tokens",
    "on_error": "data.on_error",
    "prompt_field": "data.prompt_field",
    "completion_field": "data.completion_field",
    "prompt_template": "data.prompt_template",
    "own_answers": "spec.own_answers",
    "own_seconds": "spec.own_seconds",
    "drafter": "spec.drafter",
    "tailor": "vocab.head",
    "system": "chat.system",
    "chat_template_kwargs": "chat.options",
}
"""The key of a recipe that each keyword stands for."""
_CHAT = ("system", "chat_template_kwargs")
_EITHER = {"prompt_field": "prompt_template", "prompt_template": "prompt_field"}


class FieldOptions(TypedDict, total=False):
    """Which fields of a row are its prompt and its answer, where they have names of their own.

    ``prompt_field``, ``completion_field``: names; ``prompt_template``: the prompt made of several
    fields, such as ``"{title}: {question}"``.
    """

    prompt_field: str
    completion_field: str
    prompt_template: str


class RowOptions(FieldOptions, total=False):
    """How rows are read: their fields, and ``on_error``: ``raise``, or ``skip`` bad ones."""

    on_error: str


class ReadOptions(RowOptions, total=False):
    """How examples become token ids, and what of a model.

    ``system``: system message of prompts that bring none; ``chat_template_kwargs``: variables of
    the chat template, and tools; ``dtype``: ``auto``, float32, bfloat16 or float16;
    ``max_new_tokens``: most tokens of an answer.
    """

    system: str
    chat_template_kwargs: Mapping[str, Any] | str
    dtype: str
    max_new_tokens: int


class AdaptOptions(ReadOptions, total=False):
    """What a pack is made of.

    ``own_answers``: index the model's own answers, not the references; ``own_seconds``: time for
    them; ``drafter``: train a small network that drafts too, where it pays; ``tailor``: an LM head
    of the task's tokens, ``exact``, ``masked`` or ``draft-only``.
    """

    own_answers: bool
    own_seconds: float
    drafter: bool
    tailor: str


def read_recipe(recipe: RecipeLike | None) -> Recipe:
    """A recipe from whatever stands for one; without any, the defaults.

    Raises:
        ConfigError: see :meth:`Recipe.from_yaml` and :meth:`Recipe.from_dict`; or it is none.
    """
    if recipe is None:
        return Recipe()
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, Mapping):
        return Recipe.from_dict(dict(recipe))
    if isinstance(recipe, str | os.PathLike):
        return Recipe.from_yaml(os.fspath(recipe))
    raise ConfigError(
        "this is no recipe",
        got=shown(recipe),
        wanted="a Recipe, a dict, or the path of a YAML file",
        where="recipe",
    )


def laid_over(recipe: RecipeLike | None, options: Mapping[str, Any]) -> Recipe:
    """A recipe with what was said beside it, which wins; ``None`` says nothing.

    Args:
        recipe: what it is laid over.
        options: by the names in :data:`KEYS`.

    Raises:
        ConfigError: an unknown name, a value of another type or out of range, or see
            :func:`read_recipe`.
    """
    made = read_recipe(recipe)
    given = {name: value for name, value in options.items() if value is not None}
    sections: dict[str, dict[str, Any]] = {}
    for name, value in given.items():
        if name not in KEYS:
            near = difflib.get_close_matches(name, KEYS, 1)
            raise ConfigError(
                "unknown argument",
                got=name,
                wanted=", ".join(KEYS),
                fix=f"did you mean {near[0]}?" if near else "other settings have keys in a recipe",
            )
        if name in _CHAT:
            continue
        section, _, key = KEYS[name].rpartition(".")
        sections.setdefault(section, {})[key] = value
        if value and (other := _EITHER.get(name)) and other not in given:
            sections[section][other] = ""  # a prompt is made in one way
    chat = made.chat.given(*(given.get(name, "") for name in _CHAT))
    top = sections.pop("", {})
    for section, values in sections.items():
        top[section] = dataclasses.replace(getattr(made, section), **values)
    return dataclasses.replace(made, chat=chat, **top)

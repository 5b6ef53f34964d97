from __future__ import annotations

import dataclasses
import json
import typing
from pathlib import Path

import pytest

from tascade import Recipe
from tascade.config import SCRIPTS, SpecConfig, TuneConfig, VocabConfig
from tascade.errors import ConfigError
from tascade.tailor import required as letters


def test_a_recipe_survives_yaml(tmp_path: Path) -> None:
    recipe = Recipe(model="some/model", max_new_tokens=64)
    recipe.to_yaml(tmp_path / "recipe.yaml")
    assert Recipe.from_yaml(tmp_path / "recipe.yaml") == recipe


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("modle: x", "did you mean 'model'"),
        ("spec:\n  shard: 2", "did you mean 'shards'"),
        ("spec:\n  shards: two", "wanted: int"),
        ("spec: 3", "not a mapping"),
        ("spec:\n  shards: 0", "1 or more"),
        ("dtype: float8", "float32"),
        ("max_new_tokens: true", "wanted: int"),
        ("a: [", "cannot read"),
        ("- 1", "not a mapping"),
        ("vocab:\n  scripts: english", "wanted: a list of strings"),
        ("vocab:\n  scripts: [english, 2]", "wanted: a list of strings"),
        ("vocab:\n  scripts: {english: true}", "wanted: a list of strings"),
        ("vocab:\n  scripts: [english, klingon]", "got:    klingon"),
    ],
)
def test_a_wrong_recipe_is_refused_with_the_reason(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r".") as caught:
        Recipe.from_yaml(path)
    assert said in str(caught.value)


def test_whole_numbers_may_stand_for_floats(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("spec:\n  calibration_seconds: 5")
    assert Recipe.from_yaml(path).spec.calibration_seconds == 5.0


def test_scripts_survive_yaml_and_json(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("vocab:\n  head: exact\n  scripts: [english, code]")
    recipe = Recipe.from_yaml(path)
    assert recipe.vocab.scripts == ("english", "code")
    recipe.to_yaml(path)
    assert Recipe.from_yaml(path) == recipe
    # As a pack keeps it.
    stored = json.loads(json.dumps(recipe.to_dict()))["vocab"]
    assert stored["scripts"] == ["english", "code"]
    assert VocabConfig(**stored) == recipe.vocab


def test_scripts_are_refused_where_they_are_made() -> None:
    with pytest.raises(ConfigError, match="a list of strings"):
        VocabConfig(scripts="english")  # type: ignore[arg-type]  # its letters would be names
    with pytest.raises(ConfigError, match="english, code, math"):
        VocabConfig(scripts=("english", "klingon"))
    assert set(letters.SCRIPTS) == set(SCRIPTS)


def _fields(cls: typing.Any, section: str = "") -> list[tuple[typing.Any, str, str, typing.Any]]:
    """(class, where it stands in a recipe, field, type) of every value of a recipe."""
    found = []
    for name, kind in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(kind):
            found += _fields(kind, f"{section}{name}.")
        else:
            found.append((cls, section, name, kind))
    return found


_HUGE = 10**400
_WRONG: dict[typing.Any, list[typing.Any]] = {
    int: ["many", True, None, 1.0, [], {}, -_HUGE, _HUGE, 10**5000, float("nan")],
    float: ["1.0", True, None, [], float("nan"), float("inf"), float("-inf"), 1e300, _HUGE],
    bool: [0, 1, "true", None, []],
    str: [1, None, True, ["x"], b"x"],
}
_WRONG[tuple[str, ...]] = ["english", 3, None, {"english": 1}, [1], [["english"]]]
_WRONG[dict[str, typing.Any]] = ["x", 1, None, ["x"], {1: 2}, {"not a name": 1}]
_WRONG[tuple[dict[str, typing.Any], ...]] = ["x", 1, None, {"x": 1}]


@pytest.mark.parametrize(
    ("cls", "section", "name", "kind"),
    _fields(Recipe),
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_every_value_of_a_recipe_is_checked_however_it_comes(
    tmp_path: Path, cls: typing.Any, section: str, name: str, kind: typing.Any
) -> None:
    """Built in Python, or out of a file: the field is named, and nothing else is ever raised."""
    for value in _WRONG[kind]:
        with pytest.raises(ConfigError) as caught:
            cls(**{name: value})
        assert caught.value.where == section + name
        assert len(str(caught.value)) < 400
        nested: typing.Any = {name: value}
        for part in reversed(section.split(".")[:-1]):
            nested = {part: nested}
        with pytest.raises(ConfigError) as caught:
            Recipe.from_dict(nested, "here: ")
        assert caught.value.where == f"here: {section}{name}"


@pytest.mark.parametrize(
    "name", ["shards", "calibration_rows", "calibration_seconds", "max_nodes", "own_seconds"]
)
def test_counts_and_times_are_not_negative(name: str) -> None:
    with pytest.raises(ConfigError, match=f"spec.{name}"):
        SpecConfig(**{name: -1})  # type: ignore[arg-type]


def test_whole_numbers_are_kept_as_the_floats_they_stand_for() -> None:
    assert type(SpecConfig(own_seconds=5).own_seconds) is float
    assert type(TuneConfig(epochs=5).epochs) is int


@pytest.mark.parametrize(
    "text",
    [
        "max_new_tokens: 0x" + "f" * 5000,
        "max_new_tokens: " + "9" * 5000,
        "spec: {max_nodes: .nan}",
        "spec: {calibration_seconds: .inf}",
        "model: 2020-99-99",
        "model: !!timestamp x",
        "model: !!int ''",
        "model: !!bool x",
        "? [a, b]\n: 1",
        "2: 1",
        "model: !!python/object/apply:os.abort []",
        "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\nmodel: [*c, *c]",
        "[" * 5000,
    ],
)
def test_odd_yaml_is_refused_by_name(tmp_path: Path, text: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"recipe\.yaml") as caught:
        Recipe.from_yaml(path)
    assert len(str(caught.value)) < 1000


_HUGE_PARTS = [float("nan"), float("inf"), 1e300, _HUGE, -_HUGE, 10**5000]


@pytest.mark.parametrize("value", _HUGE_PARTS, ids=range(len(_HUGE_PARTS)))
def test_numbers_for_a_chat_template_are_such_as_a_pack_can_keep(value: typing.Any) -> None:
    for chat in ({"options": {"depth": [value]}}, {"tools": [{"name": {"most": value}}]}):
        with pytest.raises(ConfigError) as caught:
            Recipe.from_dict({"chat": chat})
        assert (caught.value.where or "").startswith("chat.")
        assert len(str(caught.value)) < 400

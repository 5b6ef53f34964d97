from __future__ import annotations

import dataclasses
import json
import typing
import warnings
from pathlib import Path

import pytest

from tascade import Recipe
from tascade.config import (
    REMOVED,
    RENAMED,
    SCRIPTS,
    GateConfig,
    SpecConfig,
    TuneConfig,
    VocabConfig,
)
from tascade.errors import ConfigError, PackError
from tascade.pack import Pack
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
        ("dtype: bf16", "write bfloat16"),
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


# --- keys of 0.1.0 ------------------------------------------------------------------------------

OLD = json.loads((Path(__file__).parents[1] / "benchmarks" / "foretold.json").read_text())[
    "settings"
]["tune"]
"""A whole section as 0.1.0 wrote it."""


def _nested(name: str, value: typing.Any) -> typing.Any:
    for part in reversed(name.split(".")):
        value = {part: value}
    return value


def _at(config: typing.Any, name: str) -> typing.Any:
    for part in name.split("."):
        config = getattr(config, part)
    return config


def _old(name: str) -> typing.Any:
    found = OLD
    for part in name.split(".")[1:]:
        found = found[part]
    return found


def test_the_tables_name_every_key_that_changed() -> None:
    now = {f"{section}{name}" for _, section, name, _ in _fields(Recipe)}
    was = {f"tune.{key}" for key in OLD if key != "gate"}
    was |= {f"tune.gate.{key}" for key in OLD["gate"]}
    assert was - now == {*RENAMED, *REMOVED}
    assert len(now & was) == len(was) - len(RENAMED) - len(REMOVED)
    for old, new in RENAMED.items():
        assert old not in now
        assert f"{old.rpartition('.')[0]}.{new}" in now


@pytest.mark.parametrize("name", RENAMED)
def test_an_old_name_is_read_and_the_new_one_is_told(name: str) -> None:
    section, _, old = name.rpartition(".")
    new = f"{section}.{RENAMED[name]}"
    value = {"init": "first", "max_length": 77}.get(RENAMED[name], 1.0)
    with pytest.warns(FutureWarning, match=rf"{name} is called {new} now"):
        made = Recipe.from_dict(_nested(name, value))
    assert _at(made, new) == value
    assert made == Recipe.from_dict(_nested(new, value))
    assert Recipe.from_dict(_nested(name, value), stored=True) == made  # and nobody is warned
    both = {old: value, RENAMED[name]: value}
    for stored in (True, False):
        with pytest.raises(ConfigError, match="its old name and its new one"):
            Recipe.from_dict(_nested(section, both), stored=stored)


@pytest.mark.parametrize("name", REMOVED)
def test_a_key_that_is_gone_is_told_and_what_it_cannot_have_any_more_is_refused(name: str) -> None:
    with pytest.warns(FutureWarning, match=f"{name} has no effect any more"):
        assert Recipe.from_dict(_nested(name, _old(name))) == Recipe()
    other = {int: 3, float: 0.25, str: "4bit"}[type(REMOVED[name])]
    with pytest.raises(ConfigError, match="leave the key out") as caught:
        Recipe.from_dict(_nested(name, other), "here: ")
    assert caught.value.where == f"here: {name}"
    assert Recipe.from_dict(_nested(name, other), stored=True) == Recipe()
    for wrong in _WRONG[type(REMOVED[name])]:
        for stored in (True, False):
            with pytest.raises(ConfigError) as caught:
                Recipe.from_dict(_nested(name, wrong), stored=stored)
            assert caught.value.where == name


def test_alpha_may_be_twice_the_rank_that_stands_beside_it() -> None:
    with pytest.warns(FutureWarning, match=r"tune\.alpha"):
        assert Recipe.from_dict({"tune": {"alpha": 16, "rank": 8}}).tune.rank == 8
    with pytest.raises(ConfigError, match="cannot be had any more"):
        Recipe.from_dict({"tune": {"alpha": 64, "rank": 8}})


def test_a_pack_of_the_release_before_opens_and_nobody_is_warned(
    ticket_pack: Path, tmp_path: Path
) -> None:
    Pack.open(ticket_pack).copy_to(tmp_path / "pack")
    file = tmp_path / "pack" / "pack.json"
    info = json.loads(file.read_text())
    info["recipe"]["tune"] = OLD | {"kl": 0.5, "load": "4bit"}
    file.write_text(json.dumps(info))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Pack.open(tmp_path / "pack").info.recipe == info["recipe"]
    read = Recipe.from_dict(info["recipe"], stored=True).tune
    assert (read.tokens, read.epochs, read.init) == (40, 4, "first")
    assert (read.min_token_prob, read.min_ngram_prob) == (0.8, 0.7)
    assert read.gate == GateConfig()
    info["recipe"]["tune"] = OLD | {"kl": "much"}
    file.write_text(json.dumps(info))
    with pytest.raises(PackError, match=r"tune\.kl"):
        Pack.open(tmp_path / "pack")

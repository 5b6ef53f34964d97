from __future__ import annotations

import json
from pathlib import Path

import pytest

from tascade import Recipe
from tascade.config import SCRIPTS, VocabConfig
from tascade.errors import ConfigError
from tascade.vocab import letters


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

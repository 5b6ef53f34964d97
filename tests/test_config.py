from __future__ import annotations

from pathlib import Path

import pytest

from tascade import Recipe
from tascade.errors import ConfigError


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

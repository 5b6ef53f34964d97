"""The documentation says what the code does: recipes, options, commands, imports, links, tables."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from scripts import DOCS, load
from tascade import Recipe, bundled

REPO = Path(__file__).resolve().parents[1]
PAGES = [REPO / "README.md", REPO / "CHANGELOG.md", *sorted(DOCS.glob("*.md"))]
EXAMPLES = sorted((REPO / "examples" / "recipes").glob("*.yaml"))


def blocks(language: str, pages: list[Path] = PAGES) -> list[tuple[str, str]]:
    """(where, text) of every fenced block of a language."""
    found = []
    for page in pages:
        for n, text in enumerate(re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.S)):
            found.append((f"{page.name}-{n}", text))
    return found


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    return load(DOCS / "generate_cli.py")


@pytest.fixture(scope="module")
def table() -> ModuleType:
    return load(REPO / "benchmarks" / "pilot_table.py")


# --- recipes ------------------------------------------------------------------------------------

RECIPES = blocks("yaml", [DOCS / "recipes.md"]) + [(p.name, p.read_text()) for p in EXAMPLES]


def test_there_are_recipes_to_check() -> None:
    assert {path.stem for path in EXAMPLES} == set(bundled.tasks())
    assert len(RECIPES) > len(EXAMPLES)


@pytest.mark.parametrize(("where", "text"), RECIPES, ids=[where for where, _ in RECIPES])
def test_every_recipe_parses(where: str, text: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    assert isinstance(Recipe.from_yaml(tmp_path / "recipe.yaml"), Recipe)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_recipes_name_what_is_there(path: Path) -> None:
    recipe = Recipe.from_yaml(path)
    for split, given in (("train", recipe.data.train), ("validation", recipe.data.validation)):
        assert (REPO / given).samefile(bundled.data_path(path.stem, split))
        assert given in path.read_text().split("model:")[0], "the command uses the same file"
    assert (REPO / recipe.model).samefile(bundled.model_path())


def keys(config: Any, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    for entry in dataclasses.fields(config):
        value = getattr(config, entry.name)
        if dataclasses.is_dataclass(value):
            yield from keys(value, f"{prefix}{entry.name}.")
        else:
            yield prefix + entry.name, type(value).__name__, repr(value)


def test_the_recipe_page_lists_every_key_with_its_type_and_default() -> None:
    row = re.compile(r"^\| `([\w.]+)` \| `(\w+)` \| `([^`]*)` \|", re.M)
    assert row.findall((DOCS / "recipes.md").read_text()) == list(keys(Recipe()))


def test_the_recipe_page_shows_what_to_yaml_writes(tmp_path: Path) -> None:
    Recipe().to_yaml(tmp_path / "recipe.yaml")
    whole = [yaml.safe_load(text) for _, text in blocks("yaml", [DOCS / "recipes.md"])]
    assert yaml.safe_load((tmp_path / "recipe.yaml").read_text()) in whole


# --- the command line ---------------------------------------------------------------------------


def test_the_page_of_the_command_line_is_up_to_date(generator: ModuleType) -> None:
    said = (DOCS / "cli.md").read_text(encoding="utf-8")
    assert said == generator.render(), "run: python docs/generate_cli.py"


def test_every_verb_and_option_is_on_the_page(generator: ModuleType) -> None:
    said = (DOCS / "cli.md").read_text(encoding="utf-8")
    for name, verb in generator.commands().items():
        section = said.partition(f"\n## {name}\n")[2].partition("\n## ")[0]
        assert section, name
        for parameter in verb.params:
            if generator.is_argument(parameter):
                assert f"`{parameter.name.upper()}`" in section
            elif parameter.name != "help":
                for spelling in generator.spellings(parameter):
                    assert f"`{spelling}`" in section


def commands() -> list[tuple[str, str]]:
    """(where, command) of every call of tascade in a block, or in the head of a recipe."""
    texts = blocks("bash") + [(p.name, re.sub(r"^# ?", "", p.read_text(), flags=re.M))
                              for p in EXAMPLES]  # fmt: skip
    found = []
    for where, text in texts:
        for line in text.replace("\\\n", " ").splitlines():
            if line.strip().startswith("tascade "):
                found.append((where, line.strip()))
    return found


@pytest.mark.parametrize(("where", "command"), commands())
def test_commands_use_verbs_and_options_that_exist(
    where: str, command: str, generator: ModuleType
) -> None:
    words = shlex.split(command, comments=True)
    verb = generator.commands()[words[1]]
    options = [p for p in verb.params if not generator.is_argument(p)]
    known = {spelling for p in options for spelling in generator.spellings(p)}
    used = {word for word in words[2:] if word.startswith("--")}
    assert used <= known
    assert {p.opts[0] for p in options if p.required} <= used


# --- Python, links ------------------------------------------------------------------------------

PYTHON = blocks("python")


@pytest.mark.parametrize(("where", "text"), PYTHON, ids=[where for where, _ in PYTHON])
def test_python_blocks_import_what_is_there(where: str, text: str) -> None:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(str(node.module))
            for alias in node.names:
                if not hasattr(module, alias.name):
                    importlib.import_module(f"{node.module}.{alias.name}")
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "tascade":
            assert hasattr(importlib.import_module("tascade"), node.attr)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if not target.startswith("https://"):
            assert (page.parent / target.partition("#")[0]).exists(), target


def test_every_page_is_in_the_navigation() -> None:
    nav = yaml.safe_load((REPO / "mkdocs.yml").read_text())["nav"]
    listed = {name for entry in nav for name in entry.values()}
    assert listed == {path.name for path in DOCS.glob("*.md")}


@pytest.mark.parametrize("start", [REPO / "README.md", DOCS / "index.md"], ids=lambda p: p.name)
def test_every_page_is_reached_from_the_start_with_what_it_is_for(start: Path) -> None:
    rows = re.findall(r"^\| \[[^]]+\]\(([^)]+)\) \| (.{20,}) \|$", start.read_text(), re.M)
    listed = {(start.parent / name).resolve() for name, _ in rows}
    assert {page for page in DOCS.glob("*.md") if page.name != "index.md"} <= listed


@pytest.mark.parametrize("page", [PAGES[0], *PAGES[2:]], ids=lambda page: page.name)
def test_measured_files_that_a_page_names_are_there(page: Path) -> None:
    for name in re.findall(r"`(benchmarks/[^` ]+\.json)`", page.read_text(encoding="utf-8")):
        assert "<" in name or list(REPO.glob(name)), name


def test_the_glossary_stays_short() -> None:
    terms = re.findall(r"^\| \*\*([^*]+)\*\* \|", (DOCS / "glossary.md").read_text(), re.M)
    assert len(terms) <= 25
    assert terms == sorted(set(terms), key=str.lower)


# --- the table of the pilot -----------------------------------------------------------------------


def test_the_table_holds_what_the_json_says(table: ModuleType) -> None:
    page = (DOCS / "results.md").read_text(encoding="utf-8")
    assert table.put_into(page, table.render()) == page, (
        "run: python benchmarks/pilot_table.py --write"
    )


TABLES = {
    "vllm_table.py": ["docs/results.md"],
    "tune_table.py": ["docs/results.md"],
    "real_model/table.py": ["README.md", "docs/index.md"],
    "peers_table.py": ["README.md", "docs/which.md"],
}


@pytest.mark.parametrize("script", TABLES)
def test_tables_hold_what_their_json_says(script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(REPO / "benchmarks"))
    made = load(REPO / "benchmarks" / script)
    for name in TABLES[script]:
        page = (REPO / name).read_text(encoding="utf-8")
        text = page.partition(made.BEGIN)[2].partition(made.END)[0]
        assert text == f"\n{made.render()}\n", f"run: python benchmarks/{script} --write"


def result(dtype: str, speedup: float, differing: int) -> dict[str, Any]:
    def ratio(median: float) -> dict[str, float]:
        return {"median": median, "low": median - 0.1, "high": median + 0.1}

    arctic = {"max_tree_depth": 24, "max_spec_factor": 1.0, "max_spec_tokens": 16}
    larger = {"max_tree_depth": 64, "max_spec_factor": 2.0, "max_spec_tokens": 32}
    versus = {"arctic-suffix": 1.5, "arctic-suffix-64-2-32": 1.2, "hf-generate": speedup + 1}
    return {
        "dtype": dtype,
        "model": "pilot",
        "data": {"examples": 64},
        "settings": {"temperature": 0.0, "batch": 1, "max_new_tokens": 256, "repeats": 5},
        "machine": {
            "cpu": "A CPU", "threads": 2, "cores": 2, "memory_gb": 8.0, "python": "3.11",
            "torch": "2.13", "transformers": "5.19", "tascade": "0.1.0",
        },
        "methods": {
            "plain": {"tokens_per_second": 100.4},
            "tasc-spec": {
                "speedup": ratio(speedup),
                "tokens_per_step": 4.567,
                "versus": {name: ratio(value) for name, value in versus.items()},
                "identical": 64 - differing,
                "differing": differing,
                "near_ties": differing,
            },
            "arctic-suffix": {"tokens_per_second": 200.0, "settings": arctic},
            "arctic-suffix-64-2-32": {"tokens_per_second": 250.0, "settings": larger},
            "hf-generate": {"tokens_per_second": 80.0, "settings": {}},
            "tasc-paper": {"skipped": "not asked for"},
        },
    }  # fmt: skip


def test_a_row_shows_the_better_dtype_and_the_best_peer(table: ModuleType, tmp_path: Path) -> None:
    for dtype, speedup, differing in (("float32", 3.0, 0), ("bfloat16", 4.0, 2)):
        path = tmp_path / f"dst_sgd-{dtype}.json"
        path.write_text(json.dumps(result(dtype, speedup, differing)))
    lines = table.render(tmp_path).splitlines()
    cells = [cell.strip() for cell in lines[2].strip("|").split("|")]
    assert cells == [
        "`dst_sgd`",
        "bfloat16",
        "100",
        "**4.00x [3.90-4.10]**",
        "4.57",
        "5.00x [4.90-5.10]",
        "1.20x [1.10-1.30] (64, 2, 32)",
        "not run",
        "64 of 64",
        "62 of 64; 2 differ, 2 of them near ties",
    ]
    assert all(len(line.strip("|").split("|")) == len(cells) for line in lines[:3])
    assert sum("A CPU, 2 threads" in line for line in lines) == 1


def test_the_table_goes_between_its_markers_and_nowhere_else(table: ModuleType) -> None:
    text = f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n"
    once = table.put_into(text, "new")
    assert once == f"before\n{table.BEGIN}\nnew\n{table.END}\nafter\n"
    assert table.put_into(once, "new") == once
    for broken in ("no markers", table.BEGIN, text + text):
        with pytest.raises(SystemExit):
            table.put_into(broken, "new")


def test_without_results_the_table_says_so(table: ModuleType, tmp_path: Path) -> None:
    assert table.render(tmp_path) == table.NONE

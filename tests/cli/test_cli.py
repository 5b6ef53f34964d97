"""The command line, run as a user runs it, on the bundled model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tascade import bundled
from tascade.bench.schema import validate
from tascade.cli import verbs as cli
from tascade.pack import Pack

run = CliRunner()
TEST = str(bundled.data_path("tickets", "test"))


def ok(*words: object) -> str:
    result = run.invoke(cli.app, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def first_prompt() -> str:
    return str(json.loads(Path(TEST).read_text().splitlines()[0])["prompt"])


def test_generate_prints_text_json_or_colours(ticket_pack: Path) -> None:
    prompt = first_prompt()
    plain = ok("generate", ticket_pack, prompt)
    result = json.loads(ok("generate", ticket_pack, prompt, "--json"))
    assert plain.strip() == result["text"].strip()
    assert result["tokens_per_step"] > 1
    assert result["text"] in ok("generate", ticket_pack, prompt, "--explain").replace("\n", "")


def test_an_answer_that_is_cut_is_told_of_beside_it(ticket_pack: Path) -> None:
    for words, cut in ((["--max-new-tokens", "3"], True), ([], False)):
        given = ["generate", str(ticket_pack), first_prompt(), *words]
        result = run.invoke(cli.app, given, catch_exceptions=False)
        assert ("cut at the limit of 3 tokens" in result.stderr) == cut
        assert "cut at" not in result.stdout


def test_a_slow_precision_is_told_of_wherever_the_model_is_loaded(
    ticket_pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tascade.load.multiplies", lambda dtype: False)
    pack = tmp_path / "pack"
    shutil.copytree(ticket_pack, pack)
    said = json.loads((pack / "pack.json").read_text())
    for dtype, told in (("auto", True), ("float32", False)):
        said["recipe"]["dtype"] = dtype
        (pack / "pack.json").write_text(json.dumps(said))
        for words, given in ((["generate", str(pack), "x"], None), (["chat", str(pack)], "\n")):
            result = run.invoke(cli.app, words, input=given)
            assert ("give --dtype float32" in result.stderr) == told, words


def test_chat_answers_until_an_empty_line(ticket_pack: Path) -> None:
    prompt = first_prompt().replace("\n", " ")
    answer = ok("generate", ticket_pack, prompt).strip()
    result = run.invoke(cli.app, ["chat", str(ticket_pack)], input=prompt + "\n\n")
    assert result.exit_code == 0
    assert answer in result.stdout


@pytest.mark.slow
def test_bench_then_report(ticket_pack: Path, tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    methods = "plain,tasc-spec,tasc-paper,hf-generate,hf-prompt-lookup"
    words = ["--rows", 3, "--repeats", 2, "--max-new-tokens", 40, "--methods", methods]
    printed = json.loads(ok("bench", ticket_pack, "-d", TEST, *words, "-o", out, "--json"))
    assert printed == json.loads(out.read_text())
    validate(printed)
    for name in methods.split(",")[1:]:
        assert printed["methods"][name]["identical"] == 3
        assert printed["methods"][name]["differing"] == 0
    assert printed["methods"]["tasc-spec"]["tokens_per_step"] > 2
    page = tmp_path / "page.html"
    ok("report", ticket_pack, "--out", page)
    assert "tasc-spec" in page.read_text()


def test_a_pack_keeps_its_larger_benchmark_and_knows_its_own_rows(
    ticket_pack: Path, tmp_path: Path
) -> None:
    pack, out = tmp_path / "pack", tmp_path / "out.json"
    Pack.open(ticket_pack).copy_to(pack)
    Pack.open(pack).bench.unlink(missing_ok=True)
    words = ["--methods", "tasc-spec", "--repeats", 1, "--max-new-tokens", 6, "--no-memory"]
    ok("bench", pack, "-d", TEST, "--rows", 3, *words)
    kept = Pack.open(pack).bench.read_bytes()
    assert "seen_as" not in json.loads(kept)["data"]
    train = bundled.data_path("tickets", "train")
    again = ["bench", pack, "-d", train, "--rows", 2, *words, "--out", out]
    told = run.invoke(cli.app, [*map(str, again)], catch_exceptions=False)
    assert "keeps its last benchmark, which says more of it (rows unseen: 1 there" in told.stderr
    assert "The pack was made with these rows (train data)" in told.stderr
    assert Pack.open(pack).bench.read_bytes() == kept
    assert json.loads(out.read_text())["data"]["seen_as"] == "train"
    ok("report", pack, out, "--out", tmp_path / "page.html")
    assert "The pack was made with these rows" in (tmp_path / "page.html").read_text()
    ok("bench", pack, "-d", TEST, "--rows", 4, *words)
    assert Pack.open(pack).bench.read_bytes() != kept


@pytest.mark.parametrize(
    ("says_less", "lacking"),
    [
        (["--data", str(bundled.data_path("tickets", "train"))], "rows unseen: 1 there, 0 here"),
        (["--data", TEST, "--methods", "plain"], "the pack's methods: 1 there, 0 here"),
        (["--data", TEST, "--dtype", "bfloat16"], "in the pack's precision: 1 there, 0 here"),
        (["--data", TEST, "--rows", "1"], "measurements a method: 2 there, 1 here"),
    ],
)
def test_a_benchmark_that_says_less_never_takes_the_place_of_one_that_says_more(
    ticket_pack: Path, tmp_path: Path, says_less: list[str], lacking: str
) -> None:
    """However many measurements it has; and the other way round it always does."""
    pack = tmp_path / "pack"
    shutil.copytree(ticket_pack, pack)
    said = json.loads((pack / "pack.json").read_text())
    said["recipe"]["dtype"] = "float32"
    (pack / "pack.json").write_text(json.dumps(said))
    (pack / "bench.json").unlink(missing_ok=True)
    usual = ["--methods", "tasc-spec", "--repeats", "1", "--max-new-tokens", "6", "--no-memory"]
    less = [*usual, "--rows", "3", *says_less]
    more = [*usual, "--rows", "2", "--data", TEST]
    ok("bench", pack, *less)
    first = (pack / "bench.json").read_bytes()
    ok("bench", pack, *more)
    kept = (pack / "bench.json").read_bytes()
    assert kept != first
    told = run.invoke(cli.app, ["bench", str(pack), *less], catch_exceptions=False)
    assert lacking in told.stderr
    assert (pack / "bench.json").read_bytes() == kept


def test_what_serves_a_pack_as_it_was_measured_is_told(ticket_pack: Path, tmp_path: Path) -> None:
    pack = tmp_path / "pack"
    shutil.copytree(ticket_pack, pack)
    words = ["bench", str(pack), "--data", TEST, "--rows", "1", "--repeats", "1", "--no-memory"]
    words += ["--max-new-tokens", "4", "--methods", "tasc-spec"]
    for flag, dtype in (([], "float32"), (["--dtype", "bfloat16"], "bfloat16")):
        told = run.invoke(cli.app, [*words, *flag], catch_exceptions=False).stderr
        assert ("and the checkpoint in bfloat16" in told) == (dtype == "float32")
        assert f"tascade serve {pack}{''.join(' ' + f for f in flag)} serves it in {dtype};" in told


def test_adapt_from_a_recipe_with_flags_over_it(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {bundled.model_path()}\nmax_new_tokens: 40\ndata:\n"
        f"  train: {bundled.data_path('notes', 'train')}\n  max_examples: 80\n"
        "spec:\n  calibration_rows: 2\n"
    )
    facts = json.loads(ok("adapt", "--recipe", recipe, "-o", tmp_path / "pack", "--json"))
    assert facts["documents"] < 80
    assert json.loads((tmp_path / "pack" / "pack.json").read_text())["max_new_tokens"] == 40


def test_inspect_prints_one_object() -> None:
    data, held_out = bundled.data_path("sql", "train"), bundled.data_path("sql", "validation")
    words = ["inspect", data, "-m", bundled.model_path(), "--held-out", held_out, "--json"]
    assert json.loads(ok(*words))["tokens_per_step"] > 2


def test_errors_are_told_without_a_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("sys.argv", ["tascade", "generate", str(tmp_path), "x"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert "no pack in this folder" in capsys.readouterr().err

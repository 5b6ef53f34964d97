"""`tascade adapt`: any two of its flags together make a sound pack, or are refused at once."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from all_pairs import all_pairs
from brief import BRIEF
from tascade import bundled
from tascade.cli import adapt as cli_adapt
from tascade.cli import verbs as cli
from tascade.draft.costs import CostTable
from tascade.errors import ConfigError
from tascade.model import TaskModel
from tascade.testing import byte_tokenizer, tiny_model, toy_examples

TUNING = replace(BRIEF, tokens=3, prompts=0.1)
FLAGS: dict[str, tuple[str, ...]] = {
    "--validation": ("", "FILE"),
    "--logs": ("", "FILE"),
    "--recipe": ("", "FILE"),
    "--dtype": ("", "float32"),
    "--max-new-tokens": ("", "6"),
    "--on-error": ("", "skip"),
    "--prompt-field": ("", "prompt"),
    "--completion-field": ("", "completion"),
    "--prompt-template": ("", "{prompt}"),
    "--system": ("", "Be brief."),
    "--chat-template-kwargs": ("", '{"mood": "calm"}'),
    "--self": ("", "yes"),
    "--own-seconds": ("", "600"),
    "--tune": ("", "yes"),
    "--drafter": ("", "yes"),
    "--tailor": ("", "exact", "masked", "draft-only"),
    "--resume": ("", "yes"),
    "--overwrite": ("", "yes"),
    "--threads": ("", "1"),
    "--json": ("", "yes"),
}
"""Each flag's values; the first is to leave it out."""
MOST = 8
Case = tuple[str, ...]


@pytest.fixture(autouse=True, scope="module")
def short() -> Iterator[None]:
    """New rows learn alone for two steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tascade.enrich.train.trainer.EMBEDDING_WARMUP_STEPS", 2)
        yield


def refused(case: dict[str, str]) -> bool:
    """An assistant, whose head `draft-only` is, does not know a tuned model's tokens; and a prompt
    is made in one way.
    """
    twice = case["--prompt-field"] != "" and case["--prompt-template"] != ""
    unlike = case["--tailor"] == "draft-only" or case["--logs"] != ""
    return twice or (case["--tune"] != "" and unlike)


def cases() -> list[Case]:
    """Few calls that hold every pair of flags, given or not, that is not refused."""
    possible = lambda *case: not refused(dict(zip(FLAGS, case, strict=True)))  # noqa: E731
    return all_pairs(*FLAGS.values(), allowed=possible)


def given(case: Case) -> str:
    words = (f"{flag}={value}" for flag, value in zip(FLAGS, case, strict=True) if value)
    return " ".join(words) or "none"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, rows of data, and a recipe."""
    folder = tmp_path_factory.mktemp("flags")
    model = tiny_model("llama", vocab_size=260, eos_token_id=256)
    model.generation_config.eos_token_id = 256
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ mood }}{% for m in messages %}{{ m.content }}{% endfor %}"
    for part in (model, tokenizer):
        part.save_pretrained(folder / "model")
    rows = [{"prompt": e.prompt, "completion": e.completion} for e in toy_examples(90)]
    for name, part in (("train", rows[:82]), ("held_out", rows[82:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    served = [
        {"request": {"prompt": r["prompt"]}, "choices": [{"index": 0, "text": "Yes."}]}
        for r in rows[:3]
    ]
    (folder / "served.jsonl").write_text("".join(json.dumps(row) + "\n" for row in served))
    (folder / "recipe.yaml").write_text("max_new_tokens: 7\nspec:\n  calibration_rows: 2\n")
    return folder


@pytest.fixture(autouse=True)
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short answers, two steps of training, known step costs: flags are tested, not models."""
    table = CostTable((1, 64), (1e-3, 2e-3))
    monkeypatch.setattr("tascade.model.measure_cost", lambda target: table)
    monkeypatch.setattr("tascade.train_drafter.WORTH", 0.0)
    wanted = cli_adapt._recipe

    def short(*flags: Any) -> Any:
        made = wanted(*flags)
        return replace(made, tune=TUNING, max_new_tokens=min(MOST, made.max_new_tokens))

    monkeypatch.setattr(cli_adapt, "_recipe", short)


def words_of(case: dict[str, str], base: Path, out: Path) -> list[str]:
    words = ["adapt", "-m", str(base / "model"), "-d", str(base / "train.jsonl"), "-o", str(out)]
    files = {"--validation": base / "held_out.jsonl", "--recipe": base / "recipe.yaml"}
    files["--logs"] = base / "served.jsonl"
    for flag, value in case.items():
        if value == "yes":
            words.append(flag)
        elif value:
            words += [flag, str(files.get(flag, value))]
    return words


def adapted(case: dict[str, str], base: Path, out: Path) -> TaskModel:
    """What a call makes, opened; what it prints is looked at too."""
    ran = CliRunner().invoke(cli.app, words_of(case, base, out), catch_exceptions=False)
    assert ran.exit_code == 0, ran.output
    told = json.loads(ran.stdout) if case["--json"] else {}
    assert case["--json"] or str(out) in ran.stdout
    assistant = str(base / "model") if case["--tailor"] == "draft-only" else None
    made = TaskModel.from_pretrained(out, dtype="float32", assistant=assistant)
    assert told.get("rows", made.pack.info.rows) == made.pack.info.rows
    return made


@pytest.mark.filterwarnings("ignore:.*by more than a tie")  # of bfloat16, in a few packs
@pytest.mark.parametrize("case", cases(), ids=given)
def test_flags_together_make_a_pack_that_says_what_plain_decoding_says(
    base: Path, tmp_path: Path, case: Case
) -> None:
    flags = dict(zip(FLAGS, case, strict=True))
    out = tmp_path / "pack"
    if flags["--overwrite"] and not flags["--tune"]:
        adapted(dict.fromkeys(FLAGS, "") | {"--recipe": "FILE"}, base, out)
    made = adapted(flags, base, out)
    stages = ["tasc-ft"] * bool(flags["--tune"]) + ["tasc-spec"]
    stages += ["drafter"] * bool(flags["--drafter"])
    stages += ["vocab-tailor"] * bool(flags["--tailor"])
    assert made.pack.info.stages == stages
    limit = 6 if flags["--max-new-tokens"] else 7 if flags["--recipe"] else MOST
    assert made.pack.info.max_new_tokens == limit
    rows = made.pack.info.rows
    assert rows["held_out_of"] == (8 if flags["--validation"] else 5)
    assert rows["calibrated"] == (2 if flags["--recipe"] else rows["held_out"])
    assert rows["checked"] == (0 if flags["--tailor"] == "masked" else 4)
    own = bool(flags["--self"] or flags["--tune"])
    train = 82 if flags["--validation"] else 77
    assert made.pack.info.own_answers == train * own + 3 * bool(flags["--logs"])
    for row in toy_examples(120)[110:113]:
        prompt = made.encode(str(row.prompt))
        params = made.params(max_new_tokens=24)
        said = made.decoder.generate(prompt, params).tokens
        if flags["--tailor"] == "masked":  # which is no longer plain decoding, and says so
            assert made.tailored is not None
            small = made.tailored.head.union
            listed = set(small.ids[: small.static].tolist())
            assert set(said) <= listed | set(prompt.tolist())
        else:
            assert said == made.plain.generate(prompt, params).tokens


def test_a_tuned_model_has_no_assistant_to_draft_with_its_tokens(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "tascade.enrich.stage.load_model", lambda *given, **options: pytest.fail("late")
    )
    flags = dict.fromkeys(FLAGS, "") | {"--tune": "yes", "--tailor": "draft-only"}
    ran = CliRunner().invoke(cli.app, words_of(flags, base, tmp_path / "pack"))
    assert isinstance(ran.exception, ConfigError)
    assert "vocab.head" in str(ran.exception)
    assert not list(tmp_path.iterdir())


def test_every_flag_is_among_those_tried() -> None:
    import typer.main

    command = typer.main.get_command(cli.app).commands["adapt"]  # type: ignore[attr-defined]
    known = {option.opts[0] for option in command.params} - {"--help"}
    assert known == {*FLAGS, "--out", "--model", "--data"}


@pytest.mark.parametrize("kept", [False, True])
def test_stopped_it_says_what_there_is_to_go_on_with(
    kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "pack"
    if kept:
        (tmp_path / ".pack.answers").mkdir()

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tascade.pipeline.adapt", stop)
    words = ["adapt", "--model", "m", "--data", str(bundled.data_path("tickets", "train"))]
    result = CliRunner().invoke(cli.app, [*words, "--out", str(out), "--resume"])
    assert result.exit_code == 130
    assert ("--resume goes on" in result.stderr) == kept
    assert ("nothing is kept" in result.stderr) != kept
    assert ("nothing to resume" in result.stderr) != kept

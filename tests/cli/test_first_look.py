"""Bad data ends a command before torch, numba or transformers are loaded."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tascade.cli.verbs import app
from tascade.errors import TascadeError
from tascade.pack import Pack, PackInfo
from tascade.testing import byte_tokenizer, tiny_model

LOOK = """
import atexit, os, sys
def look():
    heavy = {'torch', 'transformers', 'numba'} & set(sys.modules)
    sys.stderr.flush()
    os._exit(1 if heavy else 77)
atexit.register(look)
from tascade.cli import main
main()
"""
FILES = {
    "good.jsonl": '{"prompt": "p", "completion": "c"}\n' * 3,
    "faq.jsonl": '{"question": "p", "answer": "c"}\n' * 3,
    "bad.jsonl": '{"prompt": "p", "completion": "c"}\n{"prompt": "p"}\n',
    "bad.csv": "question;answer\np;c\n",
    "strange.txt": "x",
}
NAMES = ["--prompt-field", "question", "--completion-field", "answer"]
VERBS = {
    "inspect": ["inspect", "DATA", "--model", "m"],
    "adapt": ["adapt", "--data", "DATA", "--model", "m", "--out", "new"],
    "enrich": ["enrich", "DATA", "--model", "m"],
    "tune": ["tune", "DATA", "--model", "m", "--out", "new"],
    "tailor": ["tailor", "pack", "--data", "DATA"],
    "bench": ["bench", "pack", "--data", "DATA"],
}
SECOND = dict.fromkeys(VERBS, "--held-out") | {"adapt": "--validation", "bench": "--warmup"}
BAD = [
    ("nowhere.jsonl", [], "no such file"),
    ("bad.jsonl", [], "bad.jsonl:2: completion"),
    ("bad.csv", [], "semicolons"),
    ("strange.txt", [], "which format"),
    ("faq.jsonl", [], "the field is missing"),
    ("faq.jsonl", ["--completion-field", "anser"], "did you mean 'answer'?"),
    ("faq.jsonl", ["--prompt-template", "{q}", *NAMES[2:]], "there is no field 'q'"),
    ("faq.jsonl", ["--prompt-template", "{question", *NAMES[2:]], "no template"),
]
"""What may be wrong: the file, flags beside it, and what is said."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("data")
    for name, text in FILES.items():
        (place / name).write_text(text)
    (place / "pack").mkdir()
    Pack(place / "pack", PackInfo("m", "260-x", 260)).save()
    return place


def words(verb: str, data: str, more: list[str]) -> list[str]:
    return [data if word == "DATA" else word for word in VERBS[verb]] + more


@pytest.mark.parametrize("verb", VERBS)
def test_bad_data_ends_every_verb_that_reads_before_torch_is_loaded(
    folder: Path, verb: str
) -> None:
    data, more, said = BAD[sorted(VERBS).index(verb)]
    code = f"import sys; sys.argv = ['tascade', *{words(verb, data, more)!r}]; {LOOK}"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 77, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: f"{bad[0]} {' '.join(bad[1])}")
@pytest.mark.parametrize("verb", VERBS)
def test_each_fault_is_told_by_each_verb(
    folder: Path, monkeypatch: pytest.MonkeyPatch, verb: str, bad: tuple[str, list[str], str]
) -> None:
    monkeypatch.chdir(folder)
    data, more, said = bad
    done = CliRunner().invoke(app, words(verb, data, more))
    assert isinstance(done.exception, TascadeError), done.output
    assert said in str(done.exception)


@pytest.mark.parametrize("verb", VERBS)
def test_held_out_examples_are_looked_at_too(
    folder: Path, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    monkeypatch.chdir(folder)
    done = CliRunner().invoke(app, words(verb, "good.jsonl", [SECOND[verb], "bad.jsonl"]))
    assert "bad.jsonl:2: completion" in str(done.exception)


def test_fields_that_were_not_used_are_told_in_one_line_on_stderr(tmp_path: Path) -> None:
    for part in (tiny_model("llama", vocab_size=260, eos_token_id=256), byte_tokenizer()):
        part.save_pretrained(tmp_path / "model")
    rows = [{"id": i, "q": f"q{i}", "k": "kind", "a": f"a{i}", "source": "x"} for i in range(3)]
    (tmp_path / "faq.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = ["adapt", "-m", str(tmp_path / "model"), "-d", str(tmp_path / "faq.jsonl")]
    asked += ["-o", str(tmp_path / "pack"), "--max-new-tokens", "4", "--json"]
    asked += ["--prompt-template", r"{k}\n{q}\\n", "--completion-field", "a"]
    done = CliRunner().invoke(app, asked, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    notes = [line for line in done.stderr.splitlines() if "not used" in line]
    assert notes == ["not used: id, source"]
    assert json.loads(done.stdout)["data"][0]["not_used"] == ["id", "source"]
    # What a shell passes as \n is a line break, and what it passes as \\n is a backslash and an n.
    assert Pack.open(tmp_path / "pack").reading.prompt_template == "{k}\n{q}\\n"

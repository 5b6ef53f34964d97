"""What `save_pretrained` and `push_to_hub` give away: nothing of the user's machine."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import huggingface_hub
import pytest

import tascade
from tascade import bundled
from tascade.bench.pack import BenchOptions, bench_pack
from tascade.bench.page import report_pack
from tascade.config import DataConfig, SpecConfig, VocabConfig
from tascade.enrich.choose import enrich
from tascade.enrich.tokens.stored import TOKENS_FILE
from tascade.errors import ConfigError, PackError
from tascade.index.corpus import CorpusIndex
from tascade.index.store import parse_manifest, write_manifest
from tascade.model import TaskModel
from tascade.pack import Pack
from tascade.pipeline import tailor
from tascade.testing import byte_tokenizer, tiny_model, toy_examples

USER = "ada-of-these-tests"
ARGUMENT = "--an-argument-of-these-tests"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The home of a user, with a model and data in it."""
    folder = tmp_path_factory.mktemp("published") / USER
    model = tiny_model("llama", vocab_size=260)
    model.generation_config.eos_token_id = 256
    model.save_pretrained(folder / "my model")
    byte_tokenizer().save_pretrained(folder / "my model")
    for file in ("config.json", "tokenizer_config.json"):
        raw = json.loads((folder / "my model" / file).read_text())
        raw["_name_or_path"] = raw["name_or_path"] = str(folder / "another model")
        (folder / "my model" / file).write_text(json.dumps(raw))
    rows = [{"prompt": e.prompt, "completion": e.completion} for e in toy_examples(48)]
    lines = [json.dumps(row) for row in rows]
    (folder / "train.jsonl").write_text("\n".join([*lines, '{"prompt": "no output"}']) + "\n")
    (folder / "test.jsonl").write_text("\n".join(lines[:4]) + "\n")
    return folder


@pytest.fixture(scope="module")
def pack(home: Path) -> Path:
    """A local pack with all that a pack can hold."""
    given = sys.argv
    sys.argv = ["/usr/bin/tascade", "adapt", ARGUMENT, str(home / "train.jsonl")]
    try:
        recipe = tascade.Recipe(
            model=str(home / "my model"),
            max_new_tokens=8,
            data=DataConfig(str(home / "train.jsonl"), str(home / "test.jsonl"), on_error="skip"),
            spec=SpecConfig(calibration_rows=1),
        )
        data, test = home / "train.jsonl", home / "test.jsonl"
        tascade.adapt(home / "my model", data, validation=test, out=home / "pack", recipe=recipe)
        tailor(home / "pack", data, on_error="skip", config=VocabConfig(head="exact"))
        options = BenchOptions(methods=("plain",), rows=1, repeats=1, memory=False)
        bench_pack(home / "pack", test, options=options)
        report_pack(home / "pack")
    finally:
        sys.argv = given
    return home / "pack"


def private(home: Path) -> set[bytes]:
    words = {str(home), str(home.parent), USER, ARGUMENT, os.path.expanduser("~")}
    words |= {" ".join(sys.argv), os.getcwd()} - {"-c"}  # of a worker that runs tests
    return {word.encode() for word in words if len(word) > 1}


def found_in(folder: Path, words: set[bytes]) -> list[tuple[str, bytes]]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    return [(p.name, word) for p in files for word in words if word in p.read_bytes()]


class FakeHub:
    """As much of ``HfApi`` as is used; keeps what is uploaded."""

    kept: Path

    def __init__(self, token: str | None = None) -> None:
        self.token = token

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> None:
        assert (repo_id, private, exist_ok) == ("ada/pack", True, True)

    def upload_folder(self, *, repo_id: str, folder_path: str) -> str:
        assert self.token == "secret"
        shutil.copytree(folder_path, self.kept)
        return f"https://hub/{repo_id}"


def publish(kind: str, task_model: TaskModel, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind == "save":
        task_model.save_pretrained(out)
    else:
        FakeHub.kept = out
        monkeypatch.setattr(huggingface_hub, "HfApi", FakeHub)
        address = task_model.push_to_hub("ada/pack", private=True, token="secret")
        assert address == "https://hub/ada/pack"


@pytest.mark.parametrize("kind", ["save", "push"])
def test_nothing_of_the_users_machine_is_published(
    kind: str, home: Path, pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert found_in(pack, private(home)), "the local pack says where its model is"
    local = {path: path.read_bytes() for path in pack.rglob("*.*")}
    out = tmp_path / "out"
    publish(kind, TaskModel.from_pretrained(pack), out, monkeypatch)
    assert found_in(out, private(home)) == []
    assert {path: path.read_bytes() for path in pack.rglob("*.*")} == local
    assert {path.name for path in out.iterdir()} == {path.name for path in pack.iterdir()}
    info = Pack.open(out).info
    assert info.model == "./my model"
    assert info.data[0]["path"] == "train.jsonl"
    assert info.data[0]["skipped_rows"][0][0] == "train.jsonl:49: completion"
    for file in out.rglob("*"):
        assert not file.is_symlink()


def test_a_published_pack_opens_with_its_model_again(
    home: Path, pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    local = TaskModel.from_pretrained(pack)
    local.save_pretrained(tmp_path / "shared" / "pack")
    published = tmp_path / "shared" / "pack"
    with pytest.raises(ConfigError, match="published without its place") as caught:
        TaskModel.from_pretrained(published)
    assert "--model" in str(caught.value)
    said = local.generate("Ticket 1", max_new_tokens=6)
    given = TaskModel.from_pretrained(published, home / "my model")
    assert given.generate("Ticket 1", max_new_tokens=6) == said
    (tmp_path / "shared" / "my model").symlink_to(home / "my model")  # beside it
    assert TaskModel.from_pretrained(published).generate("Ticket 1", max_new_tokens=6) == said
    again = Pack.open(published).copy_to(tmp_path / "again")
    assert again.info == Pack.open(published).info


def test_a_pack_of_a_tuned_model(home: Path, pack: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(pack, tmp_path / USER / "pack")
    shutil.copytree(home / "my model", copy / "model")
    (copy / "model" / "tuning.json").write_text(
        json.dumps({"command": f"tascade tune {home}", "tokens": 2, "path": str(home / "x")})
    )
    (copy / "model" / TOKENS_FILE).write_text(json.dumps({"model": str(home / "my model")}))
    out = Pack.open(copy).copy_to(tmp_path / "out").path
    assert found_in(out, private(home)) == []
    tokenizer = (out / "model" / "tokenizer.json").read_bytes()
    assert tokenizer == (copy / "model" / "tokenizer.json").read_bytes()


def test_a_pack_of_the_first_release(home: Path, pack: Path, tmp_path: Path) -> None:
    old = shutil.copytree(pack, tmp_path / "old")
    command = f"tascade adapt -m {home}/model"
    manifest = parse_manifest((old / "corpus" / "manifest.json").read_bytes(), old)
    object.__setattr__(manifest, "command", command)
    write_manifest(old / "corpus", manifest)
    raw = json.loads((old / "pack.json").read_text())
    del raw["vocabulary"]
    (old / "pack.json").write_text(json.dumps({**raw, "command": command}))
    (old / "report.html").write_text(f"<pre>{command}</pre>")
    out = Pack.open(old).copy_to(tmp_path / "out").path
    assert found_in(out, private(home)) == []
    assert not (out / "report.html").exists()
    assert CorpusIndex.open(out / "corpus", verify=True).n_documents == 48
    altered = (
        (old / "corpus" / "manifest.json")
        .read_text()
        .replace('"vocab_size": 260', '"vocab_size": 261')
    )
    (old / "corpus" / "manifest.json").write_text(altered)
    with pytest.raises(PackError, match="checksum"):
        Pack.open(old).copy_to(tmp_path / "altered")


def test_a_pack_of_the_bundled_model_opens_wherever_tascade_is(
    ticket_pack: Path, tmp_path: Path
) -> None:
    copy = Pack.open(ticket_pack).copy_to(tmp_path / "copy")
    assert copy.info.model == "tascade:bundled/model"
    assert copy.model == str(bundled.model_path())


def test_hidden_files_stay_behind(pack: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(pack, tmp_path / "pack")
    (copy / ".git").mkdir()
    (copy / ".git" / "config").write_text(USER)
    (copy / ".bench.json.x.part").write_text(USER)
    (copy / "README.md").write_text("about this pack")
    out = Pack.open(copy).copy_to(tmp_path / "out").path
    assert not [path for path in out.rglob(".*")]
    assert (out / "README.md").read_text() == "about this pack"


def test_chosen_tokens_name_the_model_alone(home: Path, tmp_path: Path) -> None:
    out = tmp_path / "tokens"
    enrich(home / "train.jsonl", home / "my model", out=out, tokens=3, on_error="skip")
    assert json.loads((out / TOKENS_FILE).read_text())["model"] == "my model"
    words = private(home)
    assert found_in(out, words) == []

"""What is replaced and what is not: only packs, in one step, and nothing temporary stays."""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import tascade
from tascade.cli import demo
from tascade.cli import verbs as cli
from tascade.config import SpecConfig
from tascade.errors import ConfigError, TascadeError
from tascade.model import TaskModel
from tascade.pack import Pack, PackInfo
from tascade.pipeline import adapt, adapt_tuned
from tascade.testing import byte_tokenizer, tiny_model, toy_examples
from tascade.util import files
from tascade.util.files import folder_beside, install_folder
from tascade.util.places import place_for

ROWS = [{"prompt": e.prompt, "completion": e.completion} for e in toy_examples(8)]
RECIPE = tascade.Recipe(max_new_tokens=4, spec=SpecConfig(calibration_rows=1))


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    return tiny_model("llama", vocab_size=260), byte_tokenizer()


def a_pack(folder: Path) -> Path:
    return Pack(folder, PackInfo("org/model", "f", 260)).save().path


def thesis(folder: Path) -> Path:
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "thesis.txt").write_text("years of work")
    return folder


def link_to_pack(folder: Path) -> Path:
    folder.symlink_to(a_pack(folder.with_name("elsewhere")))
    return folder


def lost_link(folder: Path) -> Path:
    folder.symlink_to(folder.with_name("nowhere"))
    return folder


def plain_file(folder: Path) -> Path:
    folder.write_text("years of work")
    return folder


def pack_and_more(folder: Path) -> Path:
    return thesis(a_pack(folder))


def not_our_json(folder: Path) -> Path:
    thesis(folder)
    (folder / "pack.json").write_text('{"name": "a pack of something else"}')
    return folder


def working_directory(folder: Path) -> Path:
    os.chdir(a_pack(folder))
    return Path()


def above_the_working_directory(folder: Path) -> Path:
    inner = a_pack(folder) / "model"
    inner.mkdir()
    os.chdir(inner)
    return Path("..")


KINDS: list[Callable[[Path], Path]] = [
    thesis,
    link_to_pack,
    lost_link,
    plain_file,
    pack_and_more,
    not_our_json,
    working_directory,
    above_the_working_directory,
]


def listing(folder: Path) -> list[tuple[str, bytes]]:
    found = sorted(path for path in folder.rglob("*") if not path.is_dir())
    return [(str(path), path.read_bytes() if path.is_file() else b"") for path in found]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("tuned", [False, True], ids=["adapt", "adapt_tuned"])
def test_only_a_pack_is_ever_replaced(
    kind: Callable[[Path], Path],
    tuned: bool,
    loaded: tuple[Any, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)  # puts the working directory back
    out = kind(tmp_path / "out")
    before = listing(tmp_path)
    make: Any = adapt_tuned if tuned else adapt
    with pytest.raises(ConfigError, match="only a pack is ever replaced") as caught:
        make(loaded, ROWS, out=out, recipe=RECIPE, overwrite=True)
    assert str(out) in str(caught.value)
    with pytest.raises(ConfigError, match="exists already"):
        make(loaded, ROWS, out=out, recipe=RECIPE)
    assert listing(tmp_path) == before


@pytest.mark.parametrize("out", [Path("/"), Path.home(), Path("..", ".."), Path("/etc/passwd")])
def test_no_place_of_the_system_is_one_for_a_pack(out: Path) -> None:
    with pytest.raises(ConfigError, match="only a pack is ever replaced"):
        place_for(out, overwrite=True)  # which removes nothing itself


def test_the_model_and_the_data_in_use_are_not_replaced(
    loaded: tuple[Any, Any], tmp_path: Path
) -> None:
    pack = a_pack(tmp_path / "pack")
    loaded[0].save_pretrained(pack / "model")
    loaded[1].save_pretrained(pack / "model")
    (pack / "similar").mkdir()
    data = pack / "similar" / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    model = tiny_model("llama", vocab_size=260)
    model.name_or_path = str(pack / "model")
    given: dict[str, Any] = {"out": pack, "recipe": RECIPE, "overwrite": True}
    before = listing(pack)
    for name, rows in (
        (str(pack / "model"), ROWS),
        ((model, loaded[1]), ROWS),
        (loaded, data),
        (loaded, str(data)),
    ):
        with pytest.raises(ConfigError, match="which is in use"):
            adapt(name, rows, **given)  # type: ignore[arg-type]
    assert listing(pack) == before


def test_what_comes_while_a_pack_is_made_is_not_replaced(
    loaded: tuple[Any, Any], tmp_path: Path
) -> None:
    for overwrite in (False, True):
        out = tmp_path / f"out-{overwrite}"

        def come(stage: str, done: int, total: int | None, out: Path = out) -> None:
            if stage == "calibrating" and not out.exists():
                thesis(out)

        given: dict[str, Any] = {"recipe": RECIPE, "validation": ROWS, "progress": come}
        with pytest.raises(ConfigError):
            adapt(loaded, ROWS, out=out, overwrite=overwrite, **given)
        assert (out / "sub" / "thesis.txt").read_text() == "years of work"
    assert len(list(tmp_path.iterdir())) == 2


def test_packs_are_replaced_and_so_are_empty_folders(
    loaded: tuple[Any, Any], tmp_path: Path
) -> None:
    given: dict[str, Any] = {"recipe": RECIPE, "overwrite": True}
    (tmp_path / "empty").mkdir()
    old = a_pack(tmp_path / "pack")
    for name in ("report.html", "vocabulary.json", ".bench.json.x1.part", ".corpus.0a.tmp"):
        (old / name).write_text("{}")  # also what a killed run left in it
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "pack.json").write_text('{"format": "tascade-pack"}')
    for name in ("new", "empty", "pack", "damaged"):
        made = adapt(loaded, ROWS, out=tmp_path / name, **given)
        assert made.corpus.n_documents == len(ROWS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged", "empty", "new", "pack"]
    assert not (old / "report.html").exists()
    umask = os.umask(0)
    os.umask(umask)
    assert old.stat().st_mode & 0o777 == 0o777 & ~umask


def test_the_command_says_it(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    loaded[0].save_pretrained(tmp_path / "model")
    loaded[1].save_pretrained(tmp_path / "model")
    data, out = tmp_path / "rows.jsonl", thesis(tmp_path / "out")
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    words = ["adapt", "-m", tmp_path / "model", "-d", data, "-o", out, "--overwrite"]
    for more in ([], ["--tune"]):
        result = CliRunner().invoke(cli.app, [str(word) for word in [*words, *more]])
        assert isinstance(result.exception, ConfigError)
        assert "thesis" not in str(result.exception)
        assert "sub" in str(result.exception)
    assert (out / "sub" / "thesis.txt").exists()


def test_a_demo_writes_over_a_demo_alone(tmp_path: Path) -> None:
    for name in ("report.html", "tickets.json", "notes.txt"):
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        (folder / name).write_text("years of work")
        with pytest.raises(ConfigError, match="what no demo wrote"):
            demo.run(folder)
        assert (folder / name).read_text() == "years of work"
    thesis(tmp_path / "out" / "tickets")
    with pytest.raises(ConfigError, match="only a pack is ever replaced"):
        demo.run(tmp_path / "out")


def test_two_folders_change_places_in_one_step_or_else_in_three(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "target"
    for number, exchange in enumerate((None, None, lambda *_: False)):
        if exchange:
            monkeypatch.setattr(files, "_exchange", exchange)
        with folder_beside(target) as part:
            (part / "number").write_text(str(number))
            install_folder(part, target)
            assert target.is_dir()
            assert number == 0 or (part / "number").read_text() == str(number - 1)
        assert (target / "number").read_text() == str(number)
        assert os.listdir(tmp_path) == ["target"]

    rename = os.rename

    def refuse_once(source: Any, new: Any) -> None:
        if str(new) == str(target) and (Path(source) / "bad").exists():
            raise OSError("disk gone")
        rename(source, new)

    monkeypatch.setattr("os.rename", refuse_once)
    with folder_beside(target) as part:
        (part / "bad").write_text("")
        with pytest.raises(OSError, match="disk gone"):
            install_folder(part, target)
    assert (target / "number").read_text() == "2"
    assert os.listdir(tmp_path) == ["target"]


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_a_temporary_pack_goes_with_its_last_user(loaded: tuple[Any, Any], temporary: Path) -> None:
    made = adapt(loaded, ROWS, recipe=RECIPE)
    assert made.pack.path.parent == temporary
    made.save_pretrained(temporary / "saved")
    pack = made.pack
    del made
    gc.collect()
    assert pack.path.is_dir(), "somebody still has it"
    del pack
    gc.collect()
    assert os.listdir(temporary) == ["saved"]
    assert TaskModel.from_pretrained(temporary / "saved", loaded).corpus.n_documents == len(ROWS)


def test_a_temporary_pack_goes_when_it_fails(
    loaded: tuple[Any, Any], temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    for name in ("check", "calibrate", "index_references"):
        monkeypatch.setattr(f"tascade.pipeline.{name}", stop)
        with pytest.raises(KeyboardInterrupt):
            adapt(loaded, ROWS, recipe=RECIPE)
        assert os.listdir(temporary) == []


def test_a_temporary_pack_goes_at_the_end_of_its_process_and_not_of_a_fork(
    tmp_path: Path,
) -> None:
    code = f"""
import os, sys, tempfile
tempfile.tempdir = {str(tmp_path)!r}
import tascade
from tascade.testing import byte_tokenizer, tiny_model
from tascade.config import SpecConfig
recipe = tascade.Recipe(max_new_tokens=2, spec=SpecConfig(calibration_rows=1))
made = tascade.adapt((tiny_model("llama", vocab_size=260), byte_tokenizer()),
                     {ROWS!r}, recipe=recipe)
child = os.fork()
if child == 0:
    sys.exit(0)
os.waitpid(child, 0)
assert (made.pack.path / "pack.json").is_file(), "a fork removed it"
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
    assert os.listdir(tmp_path) == []


def test_nothing_is_lost_where_the_copy_cannot_be_made(tmp_path: Path) -> None:
    pack = Pack.open(a_pack(tmp_path / "pack"))
    with pytest.raises(TascadeError, match="exists already"):
        pack.copy_to(lost_link(tmp_path / "link"))
    (pack.path / "bench.json").write_text("{")
    with pytest.raises(TascadeError, match="damaged"):
        pack.copy_to(tmp_path / "copy")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "pack"]
    shutil.rmtree(pack.path)

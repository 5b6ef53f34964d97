from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tascade.errors import FingerprintError, PackError
from tascade.files import write_atomic
from tascade.pack import Pack, PackInfo


@pytest.fixture
def pack(tmp_path: Path) -> Pack:
    return Pack.create(tmp_path / "pack", PackInfo("org/model", "256-abc", 256))


def test_a_pack_opens_as_it_was_written(pack: Pack) -> None:
    assert Pack.open(pack.path).info == pack.info


def test_no_pack_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(PackError, match="tascade adapt"):
        Pack.open(tmp_path)


def test_another_tokenizer_is_refused_by_name(pack: Pack) -> None:
    pack.check_tokenizer("256-abc", "org/model")
    with pytest.raises(FingerprintError) as caught:
        pack.check_tokenizer("256-def", "org/other")
    assert "org/other" in str(caught.value)
    assert "org/model" in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"format": "other"},
        {"version": 99},
        {"surprise": 1},
        {"model": 3},
        {"recipe": []},
        {"costs": "x"},
        {"vocab_size": "many"},
    ],
)
def test_a_changed_manifest_is_refused(pack: Pack, change: dict[str, object]) -> None:
    file = pack.path / "pack.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(PackError):
        Pack.open(pack.path)


@given(junk=st.binary(max_size=200))
def test_junk_never_raises_anything_else(
    tmp_path_factory: pytest.TempPathFactory, junk: bytes
) -> None:
    folder = tmp_path_factory.mktemp("junk")
    (folder / "pack.json").write_bytes(junk)
    with pytest.raises(PackError):
        Pack.open(folder)


def test_a_copy_is_whole_and_never_overwrites(pack: Pack, tmp_path: Path) -> None:
    assert pack.copy_to(tmp_path / "copy").info == pack.info
    with pytest.raises(PackError, match="exists"):
        pack.copy_to(tmp_path / "copy")


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "f"
    write_atomic(file, b"old")

    def fail(*_: object) -> None:
        raise OSError("disk gone")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk gone"):
        write_atomic(file, b"new")
    assert file.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]

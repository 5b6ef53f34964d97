from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tascade import Recipe, bundled
from tascade.errors import FingerprintError, PackError
from tascade.pack import Pack, PackInfo
from tascade.util.files import write_atomic


@pytest.fixture
def pack(tmp_path: Path) -> Pack:
    return Pack(tmp_path / "pack", PackInfo("org/model", "256-abc", 256)).save()


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


COSTS = {"sizes": [1.0, 2.0, 96.0], "seconds": [0.1, 0.1, 0.5]}
SOURCE = {"role": "train", "path": "a.jsonl", "sha256": "ab", "bytes": 3, "rows": 2, "skipped": 1}
SOURCE["skipped_rows"] = [["a.jsonl, line 3", "no completion"]]


@pytest.fixture
def full_pack(tmp_path: Path) -> Pack:
    info = PackInfo("org/model", "256-abc", 256, recipe=Recipe().to_dict(), data=[SOURCE])
    pack = Pack(tmp_path / "pack", info).save()
    file = pack.path / "pack.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "costs": {"a cpu": COSTS}}))
    return Pack.open(pack.path)


def test_what_a_pack_says_is_kept(full_pack: Pack) -> None:
    assert full_pack.info.costs == {"a cpu": COSTS}
    assert full_pack.info.data == [SOURCE]
    full_pack.save()
    assert Pack.open(full_pack.path).info == full_pack.info


@pytest.mark.parametrize(
    ("place", "value", "named"),
    [
        ("recipe.spec.max_nodes", "many", "recipe.spec.max_nodes"),
        ("recipe.spec.max_nodes", True, "recipe.spec.max_nodes"),
        ("recipe.spec.max_nodes", -1, "recipe.spec.max_nodes"),
        ("recipe.spec.max_nodes", 10**400, "recipe.spec.max_nodes"),
        ("recipe.spec.calibration_seconds", float("nan"), "recipe.spec.calibration_seconds"),
        ("recipe.spec", "x", "recipe.spec"),
        ("recipe.spec", None, "recipe.spec"),
        ("recipe.spec.context", "no", "recipe.spec.context"),
        ("recipe.vocab.head", "fast", "recipe.vocab.head"),
        ("recipe.vocab.scripts", "english", "recipe.vocab.scripts"),
        ("recipe.vocab.deferred", 1e400, "recipe.vocab.deferred"),
        ("recipe.tune.gate.refuse", 1, "recipe.tune.gate.refuse"),
        ("recipe.from_tomorrow", 1, "recipe"),
        ("recipe.spec.from_tomorrow", 1, "recipe.spec"),
        ("recipe", None, "recipe"),
        ("stages", "tasc-spec", "stages"),
        ("stages", [1], "stages[0]"),
        ("data", {}, "data"),
        ("data", [3], "data[0]"),
        ("data.0.sha256", 3, "data[0].sha256"),
        ("data.0.rows", "2", "data[0].rows"),
        ("data.0.skipped_rows", 3, "data[0].skipped_rows"),
        ("data.0.skipped_rows", [3], "data[0].skipped_rows"),
        ("costs", [], "costs"),
        ("costs.a cpu", 3, "costs['a cpu']"),
        ("costs.a cpu.sizes", None, "sizes"),
        ("costs.a cpu.sizes", [1, 2, 1e12], "costs"),
        ("costs.a cpu.sizes", [1, float("inf"), 3], "sizes"),
        ("costs.a cpu.sizes", [2, 1, 3], "costs"),
        ("costs.a cpu.sizes", [0, 1, 3], "costs"),
        ("costs.a cpu.sizes", [1, 2], "costs"),
        ("costs.a cpu.sizes", [1, "2", 3], "sizes"),
        ("costs.a cpu.seconds", [0.1, 0.1, -0.1], "costs"),
        ("costs.a cpu.seconds", [0.1, 0.1, float("nan")], "seconds"),
        ("costs.a cpu.seconds", [], "costs"),
        ("costs.a cpu.equal_rows", 3, "equal_rows"),
        ("costs.a cpu.equal_rows", [2, float("inf")], "equal_rows"),
        ("costs.a cpu.product_rows", [2, float("inf")], "product_rows"),
        ("prefixes", 3, "prefixes"),
        ("prefixes", [[1], 2], "prefixes[1]"),
        ("prefixes", [[1, -1]], "prefixes[0]"),
        ("prefixes", [[1, 10**9]], "prefixes[0]"),
        ("prefixes", [[1, "2"]], "prefixes[0]"),
        ("vocab_size", 0, "vocab_size"),
        ("vocab_size", True, "vocab_size"),
        ("max_new_tokens", -5, "max_new_tokens"),
        ("max_new_tokens", 10**30, "max_new_tokens"),
        ("own_answers", "3", "own_answers"),
        ("command", None, "command"),
        ("created", 3, "created"),
    ],
)
def test_every_value_of_a_pack_is_checked_and_named(
    full_pack: Pack, place: str, value: Any, named: str
) -> None:
    file = full_pack.path / "pack.json"
    body = json.loads(file.read_text())
    *above, last = [int(part) if part.isdigit() else part for part in place.split(".")]
    holder = body
    for part in above:
        holder = holder[part]
    holder[last] = value
    file.write_text(json.dumps(body))
    with pytest.raises(PackError, match=r"pack\.json: ") as caught:
        Pack.open(full_pack.path)
    assert named in caught.value.where
    assert len(str(caught.value)) < 800


@pytest.mark.parametrize("raw", [b"[" * 10**5, b'{"a":' * 10**5, b" " * (17 << 20), b"9" * 5000])
def test_a_manifest_of_any_size_or_depth_is_refused(pack: Pack, raw: bytes) -> None:
    (pack.path / "pack.json").write_bytes(raw)
    with pytest.raises(PackError, match="damaged"):
        Pack.open(pack.path)


def test_links_out_of_a_pack_are_refused(pack: Pack, tmp_path: Path) -> None:
    """What they lead to would be read, copied and published as the pack's own."""
    (tmp_path / "secret").write_text("mine")
    (tmp_path / "folder").mkdir()
    places = pack.path / "bench.json", pack.path / "corpus", pack.path / "model" / "config.json"
    targets = "../secret", str(tmp_path / "folder"), "../../secret"
    for place, target in zip(places, targets, strict=True):
        place.parent.mkdir(exist_ok=True)
        for leads in (target, "nowhere", place.name, "/dev/zero"):
            place.symlink_to(leads)
            with pytest.raises(PackError, match="leads out"):
                Pack.open(pack.path)
            place.unlink()
    os.mkfifo(pack.path / "calibration.json")
    with pytest.raises(PackError, match="calibration"):
        Pack.open(pack.path)
    (pack.path / "calibration.json").unlink()
    (pack.path / "report.html").symlink_to("pack.json")
    (tmp_path / "elsewhere").symlink_to(pack.path)
    assert Pack.open(tmp_path / "elsewhere").info == pack.info


def test_a_pack_in_the_cache_of_the_hub_opens(pack: Pack, tmp_path: Path) -> None:
    """There every file is a link to the blob of its content."""
    home = tmp_path / "models--org--pack"
    (home / "blobs").mkdir(parents=True)
    (home / "snapshots").mkdir()
    pack.path.rename(home / "snapshots" / "abc")
    file = home / "snapshots" / "abc" / "pack.json"
    file.rename(home / "blobs" / "123")
    file.symlink_to("../../blobs/123")
    assert Pack.open(file.parent).info == pack.info
    (file.parent / "bench.json").symlink_to("../../secret")
    with pytest.raises(PackError, match="leads out"):
        Pack.open(file.parent)


def test_a_model_that_is_taken_for_a_pack_is_told_what_to_do() -> None:
    with pytest.raises(PackError, match="this is a model, and no pack") as raised:
        Pack.open(bundled.model_path())
    assert "tascade adapt --model" in str(raised.value)

"""Paths, folders, saved datasets and Hub names through ``load_examples`` and ``source_hash``."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tascade.data.load import LoadReport, load_examples, source_hash
from tascade.errors import DataError

ROW = b'{"completion": "x"}\n'


def written(folder: Path, name: str, content: bytes = ROW) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def parquet(folder: Path, name: str, *outputs: str) -> Path:
    pa = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet")
    folder.mkdir(parents=True, exist_ok=True)
    pa.parquet.write_table(pa.table({"text": pa.array(outputs, pa.string())}), folder / name)
    return folder / name


def outputs(source: Any, **options: Any) -> list[str]:
    return [example.completion for example in load_examples(source, **options)]


def refusal(source: Any, **options: Any) -> DataError:
    with pytest.raises(DataError) as caught:
        load_examples(source, **options)  # found, or refused, before the first row is taken
    assert str(caught.value).encode()
    return caught.value


# --- paths ---------------------------------------------------------------------------------------


def test_a_path_that_does_not_exist_is_answered_with_near_names(tmp_path: Path) -> None:
    written(tmp_path, "tickets.jsonl")
    error = refusal(tmp_path / "tickts.jsonl")
    assert error.message == "no such file or folder"
    assert error.fix == f"did you mean '{tmp_path / 'tickets.jsonl'}'?"
    written(tmp_path, "corpora/a.jsonl")
    assert repr(str(tmp_path / "corpora")) in refusal(tmp_path / "corpra" / "sub" / "a.jsonl").fix
    assert str(tmp_path) in refusal(tmp_path / "zzz").fix


@pytest.mark.parametrize("source", ["", "\0", "x" * 5000, "a\ud800b/t.jsonl", "no such thing"])
def test_text_that_is_no_path_is_refused(source: str) -> None:
    assert refusal(source).wanted


@pytest.mark.parametrize(
    ("name", "fix"), [("t.txt", "JSONL"), ("t.json", "jq -c"), ("jsonl", "JSONL"), ("t.gz", "JSON")]
)
def test_a_file_of_another_kind_is_refused(tmp_path: Path, name: str, fix: str) -> None:
    error = refusal(written(tmp_path, name))
    assert error.where == str(tmp_path / name)
    assert ".jsonl" in error.wanted
    assert fix in error.fix


def test_a_pipe_is_not_waited_on(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "t.jsonl")
    assert "neither a file nor a folder" in refusal(tmp_path / "t.jsonl").message


def test_a_file_named_itself_may_be_a_link(tmp_path: Path) -> None:
    written(tmp_path, "real.jsonl")
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "real.jsonl")
    assert outputs(tmp_path / "link.jsonl") == ["x"]


def test_a_name_that_is_not_utf8_can_be_read_and_printed(tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.jsonl"))
    try:
        path.write_bytes(ROW + b"oops\n")
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    with pytest.raises(DataError) as caught:
        list(load_examples(path))
    assert str(caught.value).encode()
    assert str(source_hash(path)["path"]).encode()


# --- folders -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["train.jsonl", "data/train.jsonl", "train.ndjson"])
def test_a_folder_gives_its_split(tmp_path: Path, name: str) -> None:
    written(tmp_path, name)
    written(tmp_path, "test.jsonl", b'{"text": "t"}\n')
    written(tmp_path, "README.md")
    report = LoadReport()
    assert outputs(tmp_path, report=report) == ["x"]
    assert report.source == str(tmp_path)
    assert outputs(tmp_path, split="test") == ["t"]


def test_shards_are_read_in_order(tmp_path: Path) -> None:
    for n in (2, 0, 1):
        parquet(tmp_path / "data", f"train-{n:05d}-of-00003.parquet", f"{n}a", f"{n}b")
    parquet(tmp_path / "data", "test-00000-of-00001.parquet", "t")
    assert outputs(tmp_path) == ["0a", "0b", "1a", "1b", "2a", "2b"]
    rows = list(load_examples(tmp_path))
    assert rows[-1].where == f"{tmp_path / 'data' / 'train-00002-of-00003.parquet'}:row 2"


@pytest.mark.parametrize(
    "names",
    [
        ["train-00000-of-00002.parquet"],
        ["train-00000-of-00001.parquet", "train-00000-of-00002.parquet"],
        ["train-00000-of-00001.parquet", "train-extra.parquet"],
        ["train-00001-of-00001.parquet"],
        ["train-0-of-99999999999999999999.parquet"],
    ],
)
def test_an_incomplete_set_of_shards_is_refused(tmp_path: Path, names: list[str]) -> None:
    for name in names:
        parquet(tmp_path, name, "x")
    error = refusal(tmp_path)
    assert "complete set" in error.message
    assert names[0] in str(error.got)


@pytest.mark.parametrize("second", ["train.csv", "train.jsonl.gz", "train-0.parquet"])
def test_two_candidates_for_a_split_are_refused(tmp_path: Path, second: str) -> None:
    written(tmp_path, "train.jsonl")
    written(tmp_path, second)
    error = refusal(tmp_path)
    assert "several files" in error.message
    assert second in str(error.got)


def test_a_folder_without_the_split_is_refused_with_what_it_holds(tmp_path: Path) -> None:
    written(tmp_path, "test.jsonl")
    error = refusal(tmp_path, split="train")
    assert error.where == str(tmp_path)
    assert error.got == "test.jsonl"
    (tmp_path / "empty").mkdir()
    assert refusal(tmp_path / "empty").got == "an empty folder"


@pytest.mark.parametrize("inner", ["train.jsonl", "data"])
def test_a_link_out_of_the_folder_is_refused(tmp_path: Path, inner: str) -> None:
    written(tmp_path, "secret/train.jsonl")
    (tmp_path / "given").mkdir()
    target = tmp_path / "secret"
    (tmp_path / "given" / inner).symlink_to(target if inner == "data" else target / "train.jsonl")
    error = refusal(tmp_path / "given")
    assert "points out of the folder" in error.message
    assert error.where == str(tmp_path / "given" / inner)
    with pytest.raises(DataError):
        source_hash(tmp_path / "given")


def test_links_inside_the_folder_and_to_the_folder_are_fine(tmp_path: Path) -> None:
    written(tmp_path, "given/files/one.jsonl")
    (tmp_path / "given" / "train.jsonl").symlink_to("files/one.jsonl")
    (tmp_path / "alias").symlink_to(tmp_path / "given")
    assert outputs(tmp_path / "alias") == ["x"]


@pytest.mark.parametrize("target", ["nowhere.jsonl", "train.jsonl"])
def test_a_broken_link_is_refused(tmp_path: Path, target: str) -> None:
    (tmp_path / "train.jsonl").symlink_to(target)
    with pytest.raises(DataError, match="cannot be read"):
        outputs(tmp_path)


def test_a_folder_is_hashed_as_sha256sum_lists_it(tmp_path: Path) -> None:
    first = parquet(tmp_path / "d" / "data", "train-00000-of-00002.parquet", "a")
    second = parquet(tmp_path / "d" / "data", "train-00001-of-00002.parquet", "b")
    listing = "".join(
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  data/{path.name}\n"
        for path in (first, second)
    )
    size = first.stat().st_size + second.stat().st_size
    assert source_hash(tmp_path / "d") == {
        "path": "d",
        "sha256": hashlib.sha256(listing.encode()).hexdigest(),
        "bytes": size,
    }
    written(tmp_path / "d", "notes.txt", b"not data")
    assert source_hash(tmp_path / "d")["bytes"] == size


# --- saved datasets ------------------------------------------------------------------------------


def saved(folder: Path, outputs: list[str], names: list[str] | None = None, **state: Any) -> Path:
    """A folder as ``datasets.save_to_disk`` leaves it."""
    pa = pytest.importorskip("pyarrow")
    folder.mkdir(parents=True, exist_ok=True)
    table = pa.table({"prompt": ["p"] * len(outputs), "completion": outputs})
    name = "data-00000-of-00001.arrow"
    with pa.OSFile(str(folder / name), "wb") as file, pa.ipc.new_stream(file, table.schema) as out:
        out.write_table(table)
    files = [{"filename": n} for n in names or [name]]
    full = {"_data_files": files, "_split": None, **state}
    (folder / "state.json").write_text(json.dumps(full))
    return folder


def test_a_saved_dataset_is_read(tmp_path: Path) -> None:
    saved(tmp_path, ["a", "b"])
    assert outputs(tmp_path) == ["a", "b"]
    assert source_hash(tmp_path)["bytes"] == (tmp_path / "data-00000-of-00001.arrow").stat().st_size


def test_a_saved_dataset_dict_gives_its_split(tmp_path: Path) -> None:
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    saved(tmp_path / "train", ["a"], _split="train")
    saved(tmp_path / "test", ["t"], _split="test")
    assert (outputs(tmp_path), outputs(tmp_path, split="test")) == (["a"], ["t"])
    assert "dev" in refusal(tmp_path, split="dev").message


def test_what_datasets_itself_saves_is_read(tmp_path: Path) -> None:
    script = (
        "import datasets, sys\n"
        "rows = [{'prompt': 'p', 'completion': str(n)} for n in range(2500)]\n"
        "data = datasets.Dataset.from_list(rows)\n"
        "data.filter(lambda row: int(row['completion']) % 2).save_to_disk(sys.argv[1] + '/one')\n"
        "every = datasets.DatasetDict(train=data)\n"
        "every.save_to_disk(sys.argv[1] + '/all', num_shards={'train': 3})\n"
    )
    if importlib.util.find_spec("datasets") is None:
        pytest.skip("datasets is not installed")
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], check=True, env=offline, capture_output=True
    )
    assert outputs(tmp_path / "all") == [str(n) for n in range(2500)]
    assert outputs(tmp_path / "one") == [str(n) for n in range(1, 2500, 2)]


@pytest.mark.parametrize("name", ["../secret/data-00000-of-00001.arrow", "/etc/hosts", "..", "", 3])
def test_a_saved_dataset_that_names_files_elsewhere_is_refused(tmp_path: Path, name: Any) -> None:
    saved(tmp_path / "secret", ["s"])
    error = refusal(saved(tmp_path / "given", ["a"], [name]))
    assert "not plain files" in error.message
    assert error.where == str(tmp_path / "given" / "state.json")


def test_a_saved_dataset_that_links_out_is_refused(tmp_path: Path) -> None:
    saved(tmp_path / "secret", ["s"])
    given = saved(tmp_path / "given", ["a"], ["other.arrow"])
    (given / "other.arrow").symlink_to(tmp_path / "secret" / "data-00000-of-00001.arrow")
    assert "points out" in refusal(given).message


@pytest.mark.parametrize(
    "state", [b"", b"[]", b"{}", b"\xff", b"[" * 100_000, b'{"_data_files": 1}']
)
def test_a_broken_state_file_is_refused(tmp_path: Path, state: bytes) -> None:
    saved(tmp_path, ["a"])
    written(tmp_path, "state.json", state)
    assert refusal(tmp_path).where == str(tmp_path / "state.json")


def test_another_split_than_the_saved_one_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, ["a"], _split="test")
    assert "'test'" in str(refusal(tmp_path).got)
    assert outputs(tmp_path, split="test") == ["a"]


def test_row_selections_of_old_versions_are_refused(tmp_path: Path) -> None:
    error = refusal(saved(tmp_path, ["a"], _indices_data_files=[{"filename": "i.arrow"}]))
    assert "save it again" in error.fix


def test_a_damaged_arrow_file_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, ["abc", "def"] * 50) / "data-00000-of-00001.arrow"
    whole = path.read_bytes()
    for content in (b"", b"x" * 50, whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(DataError):
            outputs(tmp_path)


def test_arrow_offsets_that_lie_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, ["abc", "def"]) / "data-00000-of-00001.arrow"
    whole = path.read_bytes()
    offsets = b"\0\0\0\0\3\0\0\0\6\0\0\0"  # of the completions
    assert whole.count(offsets) == 1
    path.write_bytes(whole.replace(offsets, b"\0\0\0\0\3\0\0\0\xff\xff\xff\x0f"))
    with pytest.raises(DataError, match="cannot be read"):
        outputs(tmp_path)


# --- the Hub -------------------------------------------------------------------------------------


class FakeStream:
    """Stands for a streamed Hub dataset: gives Arrow tables."""

    def __init__(self, rows: list[dict[str, Any]], asked: list[Any]) -> None:
        self.rows, self.asked = rows, asked

    def with_format(self, kind: str) -> FakeStream:
        assert kind == "arrow"
        return self

    def iter(self, batch_size: int) -> Any:
        pa = pytest.importorskip("pyarrow")
        for start in range(0, len(self.rows), batch_size):
            self.asked.append(start)
            yield pa.Table.from_pylist(self.rows[start : start + batch_size])


class FakeDatasets:
    """The part of ``datasets`` that is called."""

    def __init__(self, version: str, rows: list[dict[str, Any]]) -> None:
        self.__version__, self.rows = version, rows
        self.calls: list[Any] = []
        self.asked: list[int] = []

    def load_dataset(self, *args: Any, **options: Any) -> FakeStream:
        self.calls.append((args, options))
        if args[0] == "nobody/nothing":
            raise ConnectionError("offline \ud800")
        return FakeStream(self.rows, self.asked)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeDatasets:
    rows = [{"prompt": "p", "completion": str(n), "image": b"\xff"} for n in range(600)]
    fake = FakeDatasets("5.2.0", rows)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    monkeypatch.chdir(tmp_path)
    return fake


def test_a_hub_dataset_is_streamed(hub: FakeDatasets) -> None:
    examples = load_examples("owner/name:config", split="test")
    assert hub.calls == []
    first = next(examples)
    assert (first.completion, first.where) == ("0", "owner/name:config (test):row 1")
    assert hub.calls == [(("owner/name", "config"), {"split": "test", "streaming": True})]
    assert hub.asked == [0]
    assert len(list(examples)) == 599
    assert source_hash("owner/name")["path"] == "owner/name"
    assert hub.calls[-1][0] == ("owner/name", None)


def test_no_version_of_datasets_may_run_code_from_the_hub(hub: FakeDatasets) -> None:
    hub.__version__ = "3.6.0"
    next(load_examples("owner/name"))
    assert hub.calls[-1][1]["trust_remote_code"] is False


def test_a_hub_dataset_that_cannot_be_reached_is_refused(hub: FakeDatasets) -> None:
    with pytest.raises(DataError) as caught:
        outputs("nobody/nothing", on_error="skip")
    assert "ConnectionError" in str(caught.value.got)
    assert str(caught.value).encode()
    hub.rows = [{"question": "x"}]
    with pytest.raises(DataError, match="no column holds outputs"):
        outputs("owner/name")


@pytest.mark.parametrize("name", ["here/nme", "owner/name.jsonl", "a/b/c", "../name", "name"])
def test_what_looks_like_a_local_path_is_not_looked_up_on_the_hub(
    hub: FakeDatasets, tmp_path: Path, name: str
) -> None:
    written(tmp_path, "here/name/train.jsonl")
    error = refusal(name)
    assert error.message == "no such file or folder"
    assert hub.calls == []


def test_a_local_folder_comes_before_the_hub(hub: FakeDatasets, tmp_path: Path) -> None:
    written(tmp_path, "owner/name/train.jsonl")
    assert outputs("owner/name") == ["x"]
    assert hub.calls == []

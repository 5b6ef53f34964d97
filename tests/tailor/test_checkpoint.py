"""Safetensors headers and indexes come from outside: what is not right is refused."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from tascade.errors import ConfigError
from tascade.tailor.offload import checkpoint as module
from tascade.tailor.offload.checkpoint import INDEX, WEIGHTS, Checkpoint
from tascade.tailor.offload.table import RowTable

HEADER_LIMIT = 100_000_000  # the format's
TABLE = torch.arange(15, dtype=torch.float32).view(5, 3)
TENSORS = {"table": TABLE, "half": TABLE.half() + 7, "ids": torch.arange(4), "one": torch.ones(())}


def write(path: Path, header: Any, data: bytes, length: int | None = None) -> Path:
    """A file of this header (bytes, or JSON to be) and this data; ``length`` is what it claims."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    claimed = len(raw) if length is None else length
    path.write_bytes(claimed.to_bytes(8, "little") + raw + data)
    return path


def saved(folder: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data of a good file, which is in the folder."""
    folder.mkdir(exist_ok=True)
    save_file(TENSORS, folder / WEIGHTS)
    raw = (folder / WEIGHTS).read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    return json.loads(raw[8:end]), raw[end:]


_opened: list[str] | None = None


def _listen(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and _opened is not None and isinstance(arguments[0], str | bytes):
        _opened.append(os.fsdecode(arguments[0]))


sys.addaudithook(_listen)


@pytest.fixture(autouse=True)
def _safetensors_is_listened_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its files are opened outside Python, where no audit hook sees them."""

    def listened(file: Any, **options: Any) -> Any:
        _listen("open", (str(file),))
        return safe_open(file, **options)

    monkeypatch.setattr(module, "safe_open", listened)


@contextmanager
def opened_files() -> Iterator[list[str]]:
    """Real paths of all files that are opened meanwhile."""
    global _opened
    _opened = []
    paths: list[str] = []
    try:
        yield paths
    finally:
        paths += [os.path.realpath(path) for path in _opened]
        _opened = None


def test_a_good_file_is_read_as_safetensors_reads_it(tmp_path):
    saved(tmp_path)
    checkpoint = Checkpoint(tmp_path)
    with safe_open(tmp_path / WEIGHTS, "pt") as file:
        assert set(checkpoint.shapes) == set(file.keys())
        for name in file.keys():  # noqa: SIM118
            tensor = file.get_tensor(name)
            assert checkpoint.shapes[name] == tuple(tensor.shape)
            assert torch.equal(checkpoint.tensor(name), tensor)
    assert torch.equal(RowTable.from_checkpoint(tmp_path, "table").rows, TABLE)
    assert torch.equal(RowTable.from_checkpoint(tmp_path, "half").rows, TENSORS["half"])


@pytest.mark.parametrize("name", ["ids", "one", "nothing"])
def test_what_is_no_table_is_refused_by_name(tmp_path, name):
    saved(tmp_path)
    with pytest.raises(ConfigError, match=name):
        RowTable.from_checkpoint(tmp_path, name)


def test_every_truncation_is_refused(tmp_path):
    saved(tmp_path)
    whole = (tmp_path / WEIGHTS).read_bytes()
    for size in range(len(whole)):
        (tmp_path / WEIGHTS).write_bytes(whole[:size])
        with pytest.raises(ConfigError):
            Checkpoint(tmp_path)


def test_a_file_cut_off_after_it_was_looked_at_is_refused(tmp_path):
    saved(tmp_path)
    checkpoint = Checkpoint(tmp_path)
    os.truncate(tmp_path / WEIGHTS, 20)
    with pytest.raises(ConfigError):
        RowTable.from_checkpoint(checkpoint, "table")


@pytest.mark.parametrize("length", [HEADER_LIMIT + 1, 1 << 40, (1 << 63) - 1, (1 << 64) - 1])
def test_a_huge_header_is_refused_before_it_is_read(tmp_path, length):
    header, data = saved(tmp_path)
    write(tmp_path / WEIGHTS, header, data, length)
    with pytest.raises(ConfigError, match="damaged"):
        Checkpoint(tmp_path)
    os.truncate(tmp_path / WEIGHTS, HEADER_LIMIT + 100)  # now a hole of zeros would be there
    with pytest.raises(ConfigError, match="damaged"):
        Checkpoint(tmp_path)


def entry(dtype: Any = "F32", shape: Any = (5, 3), span: Any = (0, 60)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": span}


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"[]",
        b"null",
        b"{",
        b"\xff{}",
        b"[" * 100_000,
        b'{"a": {"dtype": "F32", "shape": [' + b"9" * 5000 + b'], "data_offsets": [0, 60]}}',
        {"a": 7},
        {"a": {}},
        {"a": entry(shape=[5, 4])},
        {"a": entry(shape=[-5, -3])},
        {"a": entry(shape=[5.0, 3])},
        {"a": entry(shape=[True, 15])},
        {"a": entry(shape="53")},
        {"a": entry(shape=[1 << 62, 1 << 62])},
        {"a": entry(dtype=4)},
        {"a": entry(dtype="F16")},
        {"a": entry(span=[60, 0])},
        {"a": entry(span=[-60, 0])},
        {"a": entry(span=[0, 60, 60])},
        {"a": entry(span=[4, 64])},
        {"a": entry(span=[1 << 62, (1 << 62) + 60])},
        {"a": entry(), "b": entry()},
        {"a": entry(), "b": entry(shape=[1], span=[56, 60])},
        {"a": entry(shape=[7, 1], span=[0, 28]), "b": entry(shape=[7, 1], span=[32, 60])},
    ],
    ids=lambda header: str(header)[:60],
)
def test_headers_that_contradict_themselves_are_refused(tmp_path, header):
    write(tmp_path / WEIGHTS, {"a": entry()}, bytes(60))  # that it is the header, not the rest
    assert RowTable.from_checkpoint(tmp_path, "a").shape == (5, 3)
    write(tmp_path / WEIGHTS, header, bytes(60))
    with pytest.raises(ConfigError, match="damaged"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    "header",
    [
        b'{"a": %b, "a": %b}' % ((b'{"dtype":"F32","shape":[15],"data_offsets":[0,60]}',) * 2),
        {"a": entry(shape=[15] + [1] * 40)},
    ],
    ids=["twice", "dimensions"],
)
def test_an_odd_header_that_is_sound_makes_no_table(tmp_path, header):
    """Safetensors accepts these: what they name lies in the file."""
    write(tmp_path / WEIGHTS, header, bytes(60))
    with pytest.raises(ConfigError, match="vocabulary table"):
        RowTable.from_checkpoint(tmp_path, "a")


@pytest.mark.parametrize("spaces", range(8))
def test_numbers_need_not_lie_on_word_boundaries(tmp_path, spaces):
    """Files from before the format had padding; safetensors reads them, too."""
    raw = json.dumps({"a": entry()}).encode() + b" " * spaces
    write(tmp_path / WEIGHTS, raw, TABLE.numpy().tobytes())
    table = RowTable.from_checkpoint(tmp_path, "a")
    assert torch.equal(table.rows, TABLE)
    assert torch.equal(table.gather([4, 0]), TABLE[[4, 0]])
    with safe_open(tmp_path / WEIGHTS, "pt") as file:
        assert torch.equal(file.get_tensor("a"), TABLE)


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=6,
)
_number = st.integers(-2, 70) | st.integers()
_entry = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "BF16", "I64", "F99"]) | _json,
        "shape": st.lists(_number, max_size=3) | _json,
        "data_offsets": st.lists(_number, min_size=2, max_size=2) | _json,
    }
)
_header = st.dictionaries(st.sampled_from(["a", "b", "__metadata__"]), _entry | _json, max_size=3)


def check_what_was_accepted(folder: Path, raw: bytes) -> None:
    """Tensors lie within the file, and hold what its header says."""
    try:
        names = Checkpoint(folder).shapes
    except ConfigError:
        return
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    for name in names:
        try:
            table = RowTable.from_checkpoint(folder, name)
        except ConfigError:
            continue
        first, last = (start + offset for offset in header[name]["data_offsets"])
        assert start <= first <= last <= len(raw)
        assert bytes(table.rows.view(torch.uint8).view(-1).numpy()) == raw[first:last]


@settings(max_examples=300)
@given(header=_header, data=st.binary(max_size=64), claim=st.none() | st.integers(0, 300))
def test_no_header_leads_out_of_its_file(tmp_path_factory, header, data, claim):
    folder = tmp_path_factory.getbasetemp() / "headers"
    folder.mkdir(exist_ok=True)
    raw = write(folder / WEIGHTS, header, data, claim).read_bytes()
    check_what_was_accepted(folder, raw)


@settings(max_examples=300)
@given(data=st.data())
def test_no_change_to_a_good_file_leads_out_of_it(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "changed"
    saved(folder)
    raw = bytearray((folder / WEIGHTS).read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(raw) - 1))
        raw[at] = data.draw(st.sampled_from(b'0123456789,:[]{}" x\x00\xff'))
    (folder / WEIGHTS).write_bytes(raw)
    check_what_was_accepted(folder, bytes(raw))


def sharded(folder: Path, mapping: Any) -> Path:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": mapping}))
    return folder


def test_a_sharded_checkpoint_is_one(tmp_path):
    names = {
        "table": "model-00001-of-00002.safetensors",
        "half": "model-00002-of-00002.safetensors",
    }
    for tensor, file in names.items():
        save_file({tensor: TENSORS[tensor]}, tmp_path / file)
    sharded(tmp_path, names)
    for tensor in names:
        assert torch.equal(RowTable.from_checkpoint(tmp_path, tensor).rows, TENSORS[tensor])
    save_file({"table": TABLE}, tmp_path / names["half"])
    with pytest.raises(ConfigError, match="also in"):
        Checkpoint(tmp_path)
    (tmp_path / names["half"]).unlink()
    with pytest.raises(ConfigError, match="lacks a file"):
        Checkpoint(tmp_path)


OUTSIDE = ["../outside/x.safetensors", "a/../../outside/x.safetensors", "{outside}/x.safetensors"]
OUTSIDE += ["link.safetensors", "linked/x.safetensors", "..", ".", "", "linked", "\0", "..\\x"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_an_index_does_not_lead_out_of_the_folder(tmp_path, name):
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    for folder in (inside, outside):
        folder.mkdir()
    save_file({"table": TABLE}, outside / "x.safetensors")
    save_file({"half": TABLE}, inside / "good.safetensors")
    (inside / "a").mkdir()
    (inside / "link.safetensors").symlink_to(outside / "x.safetensors")
    (inside / "linked").symlink_to(outside)
    sharded(inside, {"half": "good.safetensors", "table": name.format(outside=outside)})
    with opened_files() as opened, pytest.raises(ConfigError):
        Checkpoint(inside)
    assert opened
    assert all(Path(path).is_relative_to(inside) for path in opened)
    sharded(inside, {"half": "good.safetensors"})
    assert Checkpoint(inside).shapes


@settings(max_examples=200)
@given(
    mapping=_json
    | st.dictionaries(st.text(max_size=3), st.text(max_size=8) | st.sampled_from(OUTSIDE))
)
def test_no_index_opens_a_file_outside(tmp_path_factory, mapping):
    folder = tmp_path_factory.getbasetemp() / "indexed"
    folder.mkdir(exist_ok=True)
    sharded(folder, mapping)
    with opened_files() as opened, pytest.raises(ConfigError):
        Checkpoint(folder)
    assert all(Path(path).is_relative_to(folder) for path in opened)


def test_a_weights_file_that_is_a_link_is_refused_but_for_the_hubs(tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    for folder in (blobs, snapshot):
        folder.mkdir(parents=True)
    save_file({"table": TABLE}, blobs / "0f0f")
    save_file({"table": TABLE}, tmp_path / "secret")
    (snapshot / WEIGHTS).symlink_to(Path("../../blobs/0f0f"))
    assert torch.equal(RowTable.from_checkpoint(snapshot, "table").rows, TABLE)
    (snapshot / WEIGHTS).unlink()
    (snapshot / WEIGHTS).symlink_to(Path("../../secret"))
    with pytest.raises(ConfigError, match="link out"):
        Checkpoint(snapshot)


def test_an_empty_folder_says_what_it_lacks(tmp_path):
    with pytest.raises(ConfigError, match=WEIGHTS):
        Checkpoint(tmp_path)

"""The files of a corpus index: damage, hostile manifests, locks, replacement."""

import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tascade.errors import DataError, FingerprintError, PackError
from tascade.index import store as corpus_store
from tascade.index.corpus import CorpusIndex

DOCUMENTS = [[1, 2, 3, 0], [2, 2, 0], [1, 2, 3, 4, 0], [3, 0], [1, 2, 0]]
APPENDED = [[4, 4, 0], [1, 2, 4, 0], [2, 0], [3, 3, 3, 0]]
DELETED = [1, 6]


@pytest.fixture(autouse=True, scope="module")
def no_waiting_for_the_disk():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda handle: None)
        yield


def build(path, fingerprint="tok"):
    CorpusIndex.build(path, DOCUMENTS, vocab_size=5, fingerprint=fingerprint, shards=3)
    with CorpusIndex.open(path, writable=True) as index:
        index.append(APPENDED[:2])
        index.append(APPENDED[2:])
        index.delete(DELETED)
    return path


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return build(tmp_path_factory.mktemp("sound") / "index")


@pytest.fixture
def copy(sound, tmp_path):
    return Path(shutil.copytree(sound, tmp_path / "index"))


def contents(index):
    return {i: d.tolist() for i, d in index.documents()}


EVERYTHING = dict(enumerate(DOCUMENTS + APPENDED))
LIVE = {i: d for i, d in EVERYTHING.items() if i not in DELETED}


def use(path, verify):
    """Use an index in every way; only tascade's own errors may come out."""
    try:
        index = CorpusIndex.open(path, fingerprint="tok", verify=verify)
        found = contents(index)
        counts = [index.count(c) for c in ([], [1], [1, 2], [-1], [-1, 1], [3, 3])]
        assert all(0 <= c <= 100 for c in counts)
        assert index.n_documents >= 0
        assert index.n_bytes > 0
        index.refresh()
        index.deleted_spans()
        int(index.n_tokens)
        return found
    except PackError as error:
        named = str(path) in error.where
    assert named
    return None


def is_prefix_of_live(found):
    """What a log cut short may leave: the shards, and the first documents of the log."""
    shards = {i: d for i, d in LIVE.items() if i < len(DOCUMENTS)}
    in_log = [i for i in LIVE if i >= len(DOCUMENTS)]
    return any(found == shards | {i: LIVE[i] for i in in_log[:n]} for n in range(len(in_log) + 1))


def files_of(path):
    return sorted(f.relative_to(path) for f in path.rglob("*") if f.is_file())


def test_sound_index_is_sound(sound):
    assert use(sound, True) == use(sound, False) == LIVE
    assert len(files_of(sound)) == 2 * 4 + 4 + 3


def damages(raw, other):
    """Truncations, flipped bits, and other contents, for a file that holds ``raw``."""
    n = len(raw)
    for keep in sorted({0, 1, 10, n // 2, n - 4, n - 1} & set(range(n))):
        yield f"cut to {keep}", raw[:keep]
    rng = np.random.default_rng(n)
    for at in sorted({0, 7, 9, 20, 60, n - 1, *rng.integers(0, n, 12).tolist()} & set(range(n))):
        yield f"bit flipped at {at}", raw[:at] + bytes([raw[at] ^ (1 << at % 8)]) + raw[at + 1 :]
    yield "longer", raw + b"\0" * 8
    yield "zeros", bytes(n)
    yield "garbage", rng.bytes(n)
    yield "another's", other
    yield "text", b"hello\n"
    yield "npy of objects", saved(np.array([{}], object))
    yield "npy of another kind", saved(np.arange(3.0))
    yield "npy of fortran order", saved(np.asfortranarray(np.zeros((3, 2), np.int64)))
    zipped = io.BytesIO()
    with zipfile.ZipFile(zipped, "w") as archive:
        archive.writestr("tokens.npy", raw)
    yield "zip", zipped.getvalue()
    yield "pickle", pickle.dumps(Bomb())
    for header in (
        "{'descr': '<i4', 'fortran_order': False, 'shape': (99999999999999999999,), }",
        "{'descr': '<i4', 'fortran_order': False, 'shape': (-1,), }",
        "{'descr': [('a', 'O')], 'fortran_order': False, 'shape': (1,), }",
        "{" * 3000,
        "__import__('os').abort()",
    ):
        body = header.encode().ljust(9000 if len(header) > 200 else 117) + b"\n"
        yield f"npy header {header[:20]}", b"\x93NUMPY\1\0" + len(body).to_bytes(2, "little") + body


def saved(array):
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


class Bomb:
    def __reduce__(self):
        return os.abort, ()


def test_any_damaged_file_is_named_or_harmless(sound, copy, tmp_path):
    other = build(tmp_path / "other", "another")
    with CorpusIndex.open(other, writable=True) as index:
        index.append([[2, 2, 2]])
    refused = 0
    for name in files_of(sound):
        if name.name == corpus_store.LOCK:
            continue
        raw = (sound / name).read_bytes()
        for how, bad in damages(raw, (other / name).read_bytes()):
            (copy / name).write_bytes(bad)
            found = use(copy, True)
            assert found is None or found == LIVE or is_prefix_of_live(found), (name, how)
            assert name.suffix == ".log" or found in (None, LIVE), (name, how)
            if found not in (None, LIVE):
                assert "cut" in how or "flipped" in how or how == "longer", (name, how)
            refused += found is None
            use(copy, False)
        (copy / name).unlink()
        assert use(copy, True) is use(copy, False) is None
        (copy / name).mkdir()
        assert use(copy, True) is use(copy, False) is None
        (copy / name).rmdir()
        (copy / name).write_bytes(raw)
    assert use(copy, True) == LIVE
    assert refused > 300


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damaged_arrays_cause_no_reads_out_of_bounds(sound, data):
    """Values altered behind a valid header; run without ``verify``."""
    copy = sound.parent / "altered"
    shutil.copytree(sound, copy, dirs_exist_ok=True)
    name = data.draw(st.sampled_from(corpus_store.ARRAYS))
    file = copy / "shards" / "0" / name
    array = np.load(file)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, array.size - 1))
        array.reshape(-1)[at] = np.uint64(data.draw(st.integers(0, 2**64 - 1))).astype(array.dtype)
    np.save(file, array)
    use(copy, False)
    assert use(copy, True) in (None, LIVE)
    shutil.rmtree(copy)


def tamper(path, **changes):
    """Change the manifest as someone would who knows the checksum."""
    file = path / "manifest.json"
    body = json.loads(file.read_text())
    body.pop("checksum")
    for name, value in changes.items():
        if value is ...:
            del body[name]
        else:
            body[name] = value
    body["checksum"] = corpus_store.checksum(body)
    file.write_text(json.dumps(body))


DIGESTS = dict.fromkeys(corpus_store.ARRAYS, "0" * 64)
SHARD = {"name": "0", "tokens": 7, "documents": 2, "sha256": DIGESTS}


@pytest.mark.parametrize(
    "change",
    [
        *({"delta": name} for name in ("../delta-0.log", "/etc/passwd", "delta-0.log\n", "", 0)),
        *({"shards": [SHARD | {"name": n}]} for n in ("..", "../../x", "/", "", "0/..", "0\n", 0)),
        *({"shards": [SHARD | {"tokens": n}]} for n in (2**62, 2**33, -1, 0, 7.0, "7")),
        *({"shards": [SHARD | {"documents": n}]} for n in (3, True, 2**32)),
        *({"shards": [SHARD | {"sha256": digests}]} for digests in ({}, [], None)),
        *({"shards": s} for s in ([SHARD, SHARD], [SHARD] * 5000, [None], {}, ...)),
        *({"vocab_size": v} for v in (2**31 - 1, 0, 10**400, "5", 6)),
        *({"tombstones": t} for t in ([-1], ["0"], 3)),
        *({"identity": i} for i in ("x", "0" * 32)),
        *({"fingerprint": f} for f in (None, ...)),
        *({"sources": s} for s in ([["a"]], [[1, 2]], 5)),
        *({name: value} for name in ("next_document_id", "next_shard") for value in (-1, 2**80)),
        *({"version": v} for v in (0, True, "1")),
        {"command": []},
        {"format": "something else"},
    ],
)
def test_hostile_manifests_are_refused(copy, change):
    tamper(copy, **change)
    for options in ({}, {"verify": True}, {"writable": True}):
        with pytest.raises(PackError, match="index") as caught:
            CorpusIndex.open(copy, **options)
        assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("change", [{"tombstones": [99]}, {"next_document_id": 3}])
def test_hostile_ids_are_found_by_verify(copy, change):
    tamper(copy, **change)
    contents(CorpusIndex.open(copy))
    with pytest.raises(PackError, match="ids"):
        CorpusIndex.open(copy, verify=True)


@pytest.mark.parametrize(
    "raw", [b"", b"{", b"[]", b"null", b"[" * 10**5, b"\xff", b'{"a": 1e999}', b"9" * 5000]
)
def test_what_is_no_manifest(copy, raw):
    (copy / "manifest.json").write_bytes(raw)
    with pytest.raises(PackError, match=r"manifest\.json"):
        CorpusIndex.open(copy)


def test_huge_manifest_is_not_read(copy, monkeypatch):
    monkeypatch.setattr(corpus_store, "_MAX_MANIFEST_BYTES", 900)
    with pytest.raises(PackError, match="more than 900 bytes"):
        CorpusIndex.open(copy)


def test_manifest_refuses_to_grow_beyond_what_can_be_read(copy, monkeypatch):
    with CorpusIndex.open(copy, writable=True) as index:
        size = (copy / "manifest.json").stat().st_size
        monkeypatch.setattr(corpus_store, "_MAX_MANIFEST_BYTES", size)
        with pytest.raises(PackError, match=r"compact\(\)"):
            index.delete([0])
        assert contents(index) == LIVE
    assert use(copy, True) == LIVE


def test_newer_format_says_so(copy):
    tamper(copy, version=2, shards="who knows")
    with pytest.raises(PackError, match="upgrade tascade"):
        CorpusIndex.open(copy)


def test_other_fingerprint_names_both(sound):
    with pytest.raises(FingerprintError, match=r"(?s)got: +tok\n.*wanted: other"):
        CorpusIndex.open(sound, fingerprint="other")


def test_reader_refuses_an_index_replaced_for_another_tokenizer(copy):
    reader = CorpusIndex.open(copy)
    CorpusIndex.build(copy, [[1]], vocab_size=5, fingerprint="tok", overwrite=True)
    assert reader.refresh()
    assert contents(reader) == {0: [1]}
    CorpusIndex.build(copy, [[1]], vocab_size=5, fingerprint="new", overwrite=True)
    with pytest.raises(FingerprintError, match="new"):
        reader.refresh()
    shutil.rmtree(copy)
    with pytest.raises(PackError, match="no corpus index"):
        reader.refresh()
    assert contents(reader) == {0: [1]}


def test_missing_folder_is_left_missing(tmp_path):
    for writable in (False, True):
        with pytest.raises(PackError, match="no corpus index"):
            CorpusIndex.open(tmp_path / "none", writable=writable)
        with pytest.raises(PackError, match="no corpus index"):
            CorpusIndex.open(tmp_path, writable=writable)
    assert list(tmp_path.iterdir()) == []


def test_build_replaces_only_an_index(copy, tmp_path):
    options = {"vocab_size": 5, "fingerprint": "f"}
    with pytest.raises(PackError, match="overwrite=True"):
        CorpusIndex.build(copy, [[1]], **options)
    assert use(copy, True) == LIVE
    with pytest.raises(DataError):
        CorpusIndex.build(copy, [[1], [9]], **options, overwrite=True)
    assert use(copy, True) == LIVE
    assert contents(CorpusIndex.build(copy, [[1]], **options, overwrite=True)) == {0: [1]}
    (copy / "thesis.txt").write_text("mine")
    with pytest.raises(PackError, match=r"thesis\.txt"):
        CorpusIndex.build(copy, [[2]], **options, overwrite=True)
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(PackError, match="file"):
        CorpusIndex.build(file, [[2]], **options, overwrite=True)
    (tmp_path / "empty").mkdir()
    CorpusIndex.build(tmp_path / "empty", [[2]], **options)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "file", "index"]


def test_an_error_in_the_documents_leaves_nothing(tmp_path):
    def documents():
        yield [1]
        raise OSError("the user's own")

    with pytest.raises(OSError, match="the user's own"):
        CorpusIndex.build(tmp_path / "i", documents(), vocab_size=5, fingerprint="f")
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_index_can_be_overwritten(copy):
    (copy / "manifest.json").write_bytes(b"?")
    build_again = CorpusIndex.build(copy, [[1]], vocab_size=5, fingerprint="f", overwrite=True)
    assert contents(build_again) == {0: [1]}


LOCK_HOLDER = """
import sys
from tascade.index.corpus import CorpusIndex
index = CorpusIndex.open(sys.argv[1], writable=True)
print("held", flush=True)
sys.stdin.read()
"""


def test_one_writer_at_a_time(copy):
    with CorpusIndex.open(copy, writable=True) as first:
        with pytest.raises(PackError, match="another writer"):
            CorpusIndex.open(copy, writable=True)
        with pytest.raises(PackError, match="another writer"):
            CorpusIndex.build(copy, [[1]], vocab_size=5, fingerprint="f", overwrite=True)
        first.append([[1]])
    with pytest.raises(PackError, match="not open for writing"):
        first.append([[1]])
    first.close()
    command = [sys.executable, "-c", LOCK_HOLDER, str(copy)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(PackError, match="another writer"):
            CorpusIndex.open(copy, writable=True)
        assert contents(CorpusIndex.open(copy)) == LIVE | {9: [1]}
        other.kill()
        other.wait()
        with CorpusIndex.open(copy, writable=True) as third:
            assert third.append([[2]]) == [10]


def test_readers_do_not_write(copy):
    reader = CorpusIndex.open(copy)
    before = {name: (copy / name).read_bytes() for name in files_of(copy)}
    writes = lambda: reader.append([[1]]), lambda: reader.delete([0]), reader.compact, reader.flush
    for write in writes:
        with pytest.raises(PackError, match="writable=True"):
            write()
    reader.close()
    assert {name: (copy / name).read_bytes() for name in files_of(copy)} == before


def test_a_writer_from_before_a_fork_is_refused(copy, monkeypatch):
    with CorpusIndex.open(copy, writable=True) as index:
        real = os.getpid()
        with monkeypatch.context() as patch:
            patch.setattr(os, "getpid", lambda: real + 1)
            with pytest.raises(PackError, match="fork"):
                index.append([[1]])
        index.append([[1]])


def test_strays_are_removed_by_the_next_writer(copy):
    strays = [copy / ".manifest.json.abc.part", copy / "delta-7.log", copy / "shards" / "77"]
    for stray in strays[:2]:
        stray.write_bytes(b"?")
    strays[2].mkdir()
    (copy / "delta-notes.log").write_text("mine")
    assert use(copy, True) == LIVE
    with CorpusIndex.open(copy, writable=True):
        pass
    assert not any(stray.exists() for stray in strays)
    assert (copy / "delta-notes.log").exists()

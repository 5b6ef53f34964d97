"""Values of an index that are wrong in themselves: refused when it is opened, or harmless."""

from __future__ import annotations

import io
import json
import shutil
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tascade.core import SEPARATOR
from tascade.draft.ngram.drafter import NgramDrafter
from tascade.draft.ngram.mixer_calibration import Calibration
from tascade.errors import PackError
from tascade.index.corpus import CorpusIndex

VOCAB, END = 100, 99
DOCUMENT = [5, 6, 7, 8, 9, 10, END]


@pytest.fixture(autouse=True, scope="module")
def no_waiting_for_the_disk() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda handle: None)
        yield


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sound") / "corpus"
    CorpusIndex.build(path, [DOCUMENT] * 30, vocab_size=VOCAB, fingerprint="x")
    with CorpusIndex.open(path, writable=True) as writer:
        writer.append([[50, 51, 52, END]])
    return path


@pytest.fixture
def copy(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "corpus"))


def drafted(index: CorpusIndex, said: list[int]) -> list[int]:
    drafter = NgramDrafter(index, end_tokens=(END,))
    drafter.start(np.array([1, 2], np.int32))
    drafter.commit(np.array(said, np.int32), 0, ())
    return [int(token) for token in drafter.propose(16, 0.0).tokens]


def change(path: Path, name: str, where: Any, value: Any) -> None:
    file = path / "shards" / "0" / f"{name}.npy"
    array = np.load(file)
    array[array == where if name == "tokens" else where] = value
    np.save(file, array)


@pytest.mark.parametrize("token", [VOCAB, 2_000_000_000, -2, -(2**31)])
def test_a_token_beyond_the_vocabulary_is_refused_at_open(copy: Path, token: int) -> None:
    assert drafted(CorpusIndex.open(copy), [5, 6, 7])[:3] == [8, 9, 10]
    change(copy, "tokens", 8, token)
    with pytest.raises(PackError, match=rf"(?s)tokens\.npy.*{token}.*-1 to {VOCAB - 1}"):
        CorpusIndex.open(copy)


def test_a_token_that_the_model_has_no_row_for_is_refused(copy: Path) -> None:
    """The fingerprint in a manifest is but a word; the model may have fewer rows than it says."""
    CorpusIndex.open(copy, limit=END + 1)
    with pytest.raises(PackError, match=r"(?s)tokens\.npy.*99.*-1 to 98"):
        CorpusIndex.open(copy, limit=END)
    with CorpusIndex.open(copy, writable=True) as writer:
        writer.delete(range(30))
        writer.compact()
        reader = CorpusIndex.open(copy, limit=END + 1)
        writer.append([[98, 3]])
        assert reader.refresh()
        writer.delete([30])
        writer.compact()
        reader = CorpusIndex.open(copy, limit=END)
        writer.append([[END, 3]])
        with pytest.raises(PackError, match="vocabulary: below 99"):
            reader.refresh()
        with pytest.raises(PackError, match="vocabulary: below 99"):
            CorpusIndex.open(copy, limit=END)


@pytest.mark.parametrize(
    ("name", "where", "value"),
    [
        ("order", 0, 0),
        ("order", 3, 2**32 - 1),
        ("order", 3, 1 + 30 * 8),
        ("head", 0, 1),
        ("head", 20, 2**32 - 1),
        ("head", -1, 7),
        ("documents", (0, 0), -1),
        ("documents", (4, 0), 3),
        ("documents", (0, 1), 2),
        ("documents", (4, 1), 30),
        ("documents", (4, 1), 2**62),
        ("documents", (29, 1), -(2**63)),
        ("documents", (29, 1), 30 * 8),
    ],
)
def test_values_out_of_range_are_refused_at_open(
    copy: Path, name: str, where: Any, value: int
) -> None:
    change(copy, name, where, value)
    with pytest.raises(PackError, match=rf"{name}\.npy"):
        CorpusIndex.open(copy)


def test_an_order_that_names_separators_drafts_nothing_wrong(tmp_path: Path) -> None:
    """It is within bounds, and looking at each of its places would make opening slow."""
    path = tmp_path / "corpus"
    CorpusIndex.build(path, [[5, 6, 7, 5, 6]] * 30, vocab_size=VOCAB, fingerprint="x")
    tokens, head = (np.load(path / "shards" / "0" / f"{n}.npy") for n in ("tokens", "head"))
    inner = np.flatnonzero(tokens == SEPARATOR)[1:-1]
    after_6 = slice(head[7], head[8])
    change(path, "order", after_6, np.resize(inner, head[8] - head[7]))
    found = drafted(CorpusIndex.open(path), [5, 6])
    assert all(0 <= token < VOCAB for token in found), found


@pytest.mark.parametrize("token", [VOCAB, VOCAB + 1, 4096, 2**31 - 3])
def test_a_request_may_say_what_the_index_has_no_bucket_for(sound: Path, token: int) -> None:
    """A model may have more rows than the one that the index was made for."""
    index = CorpusIndex.open(sound)
    assert all(t >= 0 for t in drafted(index, [5, 6, token]))
    assert drafted(index, [5, token, 5, 6, 7])[:3] == [8, 9, 10]


def test_headers_cannot_ask_for_memory(copy: Path) -> None:
    file = copy / "shards" / "0" / "tokens.npy"
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        head, {"descr": "<i4", "fortran_order": False, "shape": (2**60,)}
    )
    file.write_bytes(head.getvalue() + b"\0" * 64)
    with pytest.raises(PackError, match=r"tokens\.npy"):
        CorpusIndex.open(copy)


def test_a_writer_never_reaches_through_a_link(copy: Path, tmp_path: Path) -> None:
    """It removes the shards that the manifest does not name: those of another folder, then."""
    elsewhere = tmp_path / "elsewhere"
    shutil.move(copy / "shards", elsewhere)
    (elsewhere / "7").mkdir()
    (copy / "shards").symlink_to(elsewhere)
    for writable in (False, True):
        with pytest.raises(PackError, match="a link"):
            CorpusIndex.open(copy, writable=writable)
    assert (elsewhere / "7").is_dir()


def test_a_log_cannot_use_up_the_ids(copy: Path) -> None:
    log = copy / "delta-0.log"
    head = struct.pack("<4sIqQ", b"TDOC", 1, 2**63 - 1, 0)
    body = np.array([5], "<i4").tobytes()
    record = head + struct.pack("<I", zlib.crc32(head)) + body + struct.pack("<I", zlib.crc32(body))
    log.write_bytes(log.read_bytes() + record)
    with pytest.raises(PackError, match=r"delta-0\.log"):
        CorpusIndex.open(copy)


# --- what is learned ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "place", "value"),
    [
        ("final", (0, 0), float("nan")),
        ("final", (0, 1), float("inf")),
        ("final", (3, 0), 1e300),
        ("final", (3, 1), 0),
        ("final", (3, 1), 1e-300),
        ("path", (24, 0), 1e6),
        ("path", (24, 0), -1),
        ("cells", (1, 2, 3, 1), -4),
        ("cells", (1, 2, 3, 0), 5000),
        ("weights", (7, 3), 1e308),
        ("weights", (7, 3), float("-inf")),
        ("weights", (7, 3), 10**400),
        ("weights", (7, 3), "x"),
        ("weights", (7,), [1.0]),
    ],
)
def test_a_calibration_that_no_drafter_learns_is_refused(
    tmp_path: Path, name: str, place: tuple[int, ...], value: Any
) -> None:
    file = tmp_path / "calibration.json"
    Calibration().save(file)
    Calibration.load(file)
    state = json.loads(file.read_text())
    holder = state[name]
    for at in place[:-1]:
        holder = holder[at]
    holder[place[-1]] = value
    file.write_text(json.dumps(state))
    with pytest.raises(PackError, match=name):
        Calibration.load(file)


def test_what_a_drafter_learns_is_kept(sound: Path, tmp_path: Path) -> None:
    """Counts fade and are rounded on disk: never so that there are more hits than trials."""
    calibration = Calibration()
    drafter = NgramDrafter(CorpusIndex.open(sound), calibration=calibration, end_tokens=(END,))
    rng = np.random.default_rng(0)
    for _ in range(400):
        drafter.start(np.array([1, 2], np.int32))
        for token in DOCUMENT:
            drafter.propose(8)
            wrong = rng.random() < 0.05
            drafter.commit(np.array([3 if wrong else token], np.int32), 0, ())
    calibration.save(tmp_path / "calibration.json")
    Calibration.load(tmp_path / "calibration.json")


@pytest.mark.parametrize("raw", [b"[" * 10**5, b"{" + b" " * (2 << 20) + b"}", b"9" * 5000, b"[]"])
def test_a_calibration_is_read_warily(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "calibration.json").write_bytes(raw)
    with pytest.raises(PackError, match=r"calibration\.json"):
        Calibration.load(tmp_path / "calibration.json")

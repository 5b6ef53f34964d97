"""The delta log: torn tails, damage, full disks."""

import errno
import os

import numpy as np
import pytest

from tascade.errors import PackError
from tascade.index.corpus import CorpusIndex
from tascade.index.log import LogWriter, create_log, read_log


@pytest.fixture(autouse=True, scope="module")
def no_waiting_for_the_disk():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda handle: None)
        yield


IDENTITY = "ab" * 16
BATCHES = [[[1, 2], [3]], [[4] * 5], [[0, 1], [2]]]


@pytest.fixture
def log(tmp_path):
    path = tmp_path / "delta-0.log"
    create_log(path, IDENTITY)
    writer = LogWriter(path, read_log(path, IDENTITY, 5).end)
    number, ends = 10, [writer.end]
    for batch in BATCHES:
        for tokens in batch:
            writer.append([number], [np.array(tokens, np.int32)])
            ends.append(writer.end)
            number += 1
        writer.flush()
    writer.close()
    return path, ends


def test_a_torn_tail_ends_the_log_at_every_byte(log):
    path, ends = log
    raw = path.read_bytes()
    for n in range(len(raw)):
        path.write_bytes(raw[:n])
        if n < ends[0]:
            with pytest.raises(PackError, match=r"delta-0\.log"):
                read_log(path, IDENTITY, 5)
            continue
        tail = read_log(path, IDENTITY, 5)
        whole = sum(end <= n for end in ends) - 1
        assert tail.ids == list(range(10, 10 + whole))
        assert tail.end == ends[whole]
        LogWriter(path, tail.end).close()
        assert path.stat().st_size == tail.end


def test_damage_to_what_was_promised_is_no_torn_tail(log):
    path, ends = log
    raw = path.read_bytes()
    promised = ends[3]  # two batches were on disk when the third was written
    for at in range(len(raw)):
        path.write_bytes(raw[:at] + bytes([raw[at] ^ 4]) + raw[at + 1 :])
        if at < promised:
            with pytest.raises(PackError, match=r"delta-0\.log"):
                read_log(path, IDENTITY, 5)
        else:
            assert read_log(path, IDENTITY, 5).ids == list(range(10, 13 + (at >= ends[4])))


def test_a_log_is_tied_to_its_index_and_vocabulary(log):
    path, ends = log
    with pytest.raises(PackError, match="another index"):
        read_log(path, "cd" * 16, 5)
    with pytest.raises(PackError, match="vocabulary"):
        read_log(path, IDENTITY, 4)
    with pytest.raises(PackError, match="rising ids"):
        read_log(path, IDENTITY, 5, after=10)
    assert read_log(path, IDENTITY, 5, offset=ends[2], after=11).ids == [12, 13, 14]
    with pytest.raises(PackError, match="the log that the manifest names"):
        read_log(path.with_name("none"), IDENTITY, 5)


@pytest.fixture
def index_path(tmp_path):
    CorpusIndex.build(tmp_path / "i", [[1, 2]], vocab_size=5, fingerprint="tok")
    return tmp_path / "i"


def contents(index):
    return {i: d.tolist() for i, d in index.documents()}


class FullDisk:
    """A file that takes a few bytes more, then fails."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, data):
        if self.room == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken = self.file.write(bytes(data[: self.room]))
        self.room -= taken
        return taken


@pytest.mark.parametrize("room", [0, 1, 30, 45, 80])
def test_a_full_disk_loses_nothing(index_path, room):
    with CorpusIndex.open(index_path, writable=True) as index:
        real = index._log._file
        index._log._file = FullDisk(real, room)
        with pytest.raises(PackError, match="No space left"):
            index.append([[1, 1], [2, 2, 2, 2], [3] * 20])
        assert contents(index) == {0: [1, 2]}
        index._log._file = real
        assert index.append([[1]]) == [1]
    assert contents(CorpusIndex.open(index_path, verify=True)) == {0: [1, 2], 1: [1]}


def test_a_failed_flush_stops_the_writer(index_path, monkeypatch):
    def fail(handle):
        raise OSError(errno.EIO, "Input/output error")

    index = CorpusIndex.open(index_path, writable=True)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(PackError, match="Input/output error"):
            index.append([[1]])
    with pytest.raises(PackError, match="earlier write"):
        index.append([[1]])
    with pytest.raises(PackError, match="earlier write"):
        index.close()
    with CorpusIndex.open(index_path, writable=True) as again:
        assert contents(again) in ({0: [1, 2]}, {0: [1, 2], 1: [1]})

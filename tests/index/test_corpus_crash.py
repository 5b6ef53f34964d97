"""A writer may die anywhere: the index reopens, and nothing that was flushed is lost.

Run as a script, this file is the fork server of the kill test: it imports the index once, without
pytest's threads around, and forks a writer for every kill.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tascade.index.corpus import CorpusIndex

VOCAB = 1000
KILLS = 80


def sealed(rng):
    """A document that shows whether it is whole: its last token is the sum of the others."""
    body = [rng.randrange(VOCAB) for _ in range(rng.randrange(1, 60))]
    return [*body, sum(body) % VOCAB]


def is_whole(tokens):
    return len(tokens) > 1 and tokens[-1] == sum(tokens[:-1]) % VOCAB


def say(pipe, kind, value):
    os.write(pipe, (json.dumps([kind, value]) + "\n").encode())


def write_until_killed(path, pipe, seed):
    """Append, delete and compact; tell the pipe what is about to happen, and what is on disk."""
    rng = random.Random(seed)
    index = CorpusIndex.open(path, writable=True)
    live = [number for number, _ in index.documents()]
    say(pipe, "ready", 0)
    while True:
        choice = rng.random()
        if choice < 0.6:
            documents = [sealed(rng) for _ in range(rng.randrange(1, 4))]
            ids = index.append(documents, flush=choice < 0.45)
            if choice >= 0.45:
                index.flush()
            say(pipe, "kept", dict(zip(ids, documents, strict=True)))
            live += ids
        elif choice < 0.75 and live:
            doomed = [live.pop(rng.randrange(len(live)))]
            say(pipe, "deleting", doomed)
            index.delete(doomed)
            say(pipe, "deleted", doomed)
        else:
            index.compact(rng.randrange(1, 4))
            say(pipe, "compacted", 0)


def fork_and_kill(path, seed, delay):
    """Messages of a writer that was killed ``delay`` seconds after it was ready."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reading)
            write_until_killed(path, writing, seed)
        finally:
            os._exit(1)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.readline()
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
        said += pipe.read()
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), "the writer failed by itself"
    return [json.loads(line) for line in said.splitlines()]


def check(path, messages, kept, dying):
    """Update the model from the messages, then compare it with what is on disk."""
    for kind, value in messages:
        if kind == "kept":
            kept.update({int(number): tokens for number, tokens in value.items()})
        elif kind == "deleting":
            dying.update(value)
        elif kind == "deleted":
            dying.difference_update(value)
            for number in value:
                kept.pop(number)
    index = CorpusIndex.open(path, verify=True)
    found = {number: tokens.tolist() for number, tokens in index.documents()}
    lost = {number for number, tokens in kept.items() if found.get(number) != tokens}
    assert lost <= dying, f"lost {lost - dying}"
    assert all(is_whole(tokens) for tokens in found.values())
    kept.clear()
    kept.update(found)  # what was not promised may be there too, and then it stays
    dying.clear()
    return len(found)


def main(path, kills):
    rng = random.Random(7)
    CorpusIndex.build(path, [sealed(rng)], vocab_size=VOCAB, fingerprint="f")
    with CorpusIndex.open(path, writable=True, verify=True) as index:  # compile before the fork
        index.append([sealed(rng)])
        index.compact()
    kept = {number: tokens.tolist() for number, tokens in CorpusIndex.open(path).documents()}
    done, gone, dying = {}, 0, set()
    for kill in range(kills):
        if len(kept) > 300:  # keep the rounds short
            shutil.rmtree(path)
            CorpusIndex.build(path, [sealed(rng)], vocab_size=VOCAB, fingerprint="f")
            kept = {n: tokens.tolist() for n, tokens in CorpusIndex.open(path).documents()}
        messages = fork_and_kill(path, kill, rng.random() * (0.02 if kill % 2 else 0.15))
        for kind, _ in messages:
            done[kind] = done.get(kind, 0) + 1
        gone += messages[-1][0] == "deleting"
        check(path, messages, kept, dying)
    sys.stdout.write(json.dumps({"kills": kills, "mid_delete": gone, "done": done}))


def test_killed_writers_lose_nothing_they_promised(tmp_path):
    command = [sys.executable, __file__, str(tmp_path / "index"), str(KILLS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout)
    assert report["kills"] == KILLS
    assert min(report["done"].get(kind, 0) for kind in ("kept", "deleted", "compacted")) >= 10


class Crash(BaseException):
    """Stands for the moment the process dies."""


def crashing(monkeypatch, limit):
    """Die at the ``limit``-th call that touches the disk, before it does anything."""
    calls = [0]

    def wrap(real):
        def call(*args, **kwargs):
            calls[0] += 1
            if calls[0] == limit:
                raise Crash
            return real(*args, **kwargs)

        return call

    for name in ("fsync", "replace", "rename", "mkdir", "unlink", "rmdir", "open", "chmod"):
        monkeypatch.setattr(os, name, wrap(getattr(os, name)))
    return calls


def first_half():
    rng = random.Random(3)
    return [sealed(rng) for _ in range(6)], [sealed(rng) for _ in range(4)]


def prepare(path):
    """An index with two shards, a log and deletions in both; the documents that are live."""
    built, appended = first_half()
    CorpusIndex.build(path, built, vocab_size=VOCAB, fingerprint="f", shards=2)
    with CorpusIndex.open(path, writable=True) as index:
        index.append(appended)
        index.delete([1, 7])
    return {i: d for i, d in enumerate(built + appended) if i not in (1, 7)}


def crash_everywhere(tmp_path, monkeypatch, act):
    """Run ``act`` on fresh copies, dying at each disk call in turn; yields what each time left."""
    live = prepare(tmp_path / "model")
    for limit in range(1, 1000):
        path = tmp_path / f"at-{limit}"
        shutil.copytree(tmp_path / "model", path)
        index = CorpusIndex.open(path, writable=True)
        with monkeypatch.context() as patch:
            calls = crashing(patch, limit)
            with contextlib.suppress(Crash):
                act(index)
            total = calls[0]
        index._lock.close()  # the dead hold no locks
        if index._log is not None:
            index._log.close()
        snapshot = tmp_path / f"left-{limit}"
        shutil.copytree(path, snapshot)
        again = CorpusIndex.open(snapshot, verify=True)
        yield live, {number: tokens.tolist() for number, tokens in again.documents()}
        with CorpusIndex.open(snapshot, writable=True) as writer:
            ids = writer.append([[1, 1]])
            writer.compact()
            assert ids[0] not in live
            assert len(list((snapshot / "shards").iterdir())) == 1
        assert len(list(snapshot.iterdir())) == 4
        if total < limit:
            assert limit > 3
            return
    raise AssertionError("act never finished")


def test_compaction_dying_at_every_step(tmp_path, monkeypatch):
    for live, found in crash_everywhere(tmp_path, monkeypatch, lambda index: index.compact()):
        assert found == live


def test_deletion_dying_at_every_step(tmp_path, monkeypatch):
    after = [0, 0]
    for live, found in crash_everywhere(tmp_path, monkeypatch, lambda index: index.delete([0, 8])):
        less = {number: tokens for number, tokens in live.items() if number not in (0, 8)}
        assert found in (live, less)
        after[found == less] += 1
    assert min(after) > 0


def test_build_dying_at_every_step(tmp_path, monkeypatch):
    documents, others = first_half()
    for overwrite in (False, True):
        for limit in range(1, 1000):
            path = tmp_path / f"{overwrite}-{limit}" / "index"
            path.parent.mkdir()
            if overwrite:
                CorpusIndex.build(path, others, vocab_size=VOCAB, fingerprint="f")
            with monkeypatch.context() as patch:
                calls = crashing(patch, limit)
                with contextlib.suppress(Crash):
                    CorpusIndex.build(
                        path, documents, vocab_size=VOCAB, fingerprint="f", overwrite=overwrite
                    )
                total = calls[0]
            if path.exists():
                found = [d.tolist() for _, d in CorpusIndex.open(path, verify=True).documents()]
                assert found in (documents, others)
            if total < limit:
                assert found == documents
                break


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="reads file names from /proc")
def test_order_of_the_promises(tmp_path, monkeypatch):
    """Every file is on disk before the manifest that names it, and before append returns."""
    prepare(tmp_path / "i")
    events = []
    real_sync, real_replace = os.fsync, os.replace

    def sync(handle):
        events.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        real_sync(handle)

    def replace(source, target):
        events.append("-> " + Path(target).name)
        real_replace(source, target)

    with CorpusIndex.open(tmp_path / "i", writable=True) as index:
        monkeypatch.setattr(os, "fsync", sync)
        monkeypatch.setattr(os, "replace", replace)
        index.append([[1], [2]])
        assert events == ["delta-0.log"]
        index.append([[3]], flush=False)
        assert events == ["delta-0.log"]
        index.delete([0])
        assert events[1] == "delta-0.log"
        assert events[3:] == ["-> manifest.json", "i"]
        events.clear()
        index.append([[3]], flush=False)
        index.compact()
    at = events.index("-> manifest.json")
    arrays = {"tokens.npy", "order.npy", "head.npy", "documents.npy"}
    assert arrays | {"delta-0.log", "delta-1.log", "shards", "i"} <= set(events[:at])
    assert events[at - 1].startswith(".manifest.json.")
    assert events[at + 1] == "i"


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))

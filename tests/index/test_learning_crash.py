"""A server may be killed at any moment: what was flushed is there, what was forgotten is not.

Run as a script, this file is the fork server of the test: it imports the library once, without
pytest's threads around, and forks a learning process for every kill.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from tascade.index import learned
from tascade.index import traffic as learning
from tascade.index.corpus import CorpusIndex
from tascade.index.traffic import TrafficLearner

VOCAB = 1000
KILLS = 30


def open_learner(path: Path) -> TrafficLearner:
    return TrafficLearner.open(path, fingerprint="t", vocab_size=VOCAB, max_tokens=10**6)


def learn_until_killed(path: Path, diary: Path, seed: int) -> None:
    """Offer, flush and forget; the diary says what is about to happen, and what was promised."""
    rng = random.Random(seed)
    file = os.open(diary, os.O_CREAT | os.O_APPEND | os.O_WRONLY)

    def say(kind: str, value: Any) -> None:
        os.write(file, (json.dumps([kind, value]) + "\n").encode())

    learner = open_learner(path)
    say("ready", 0)
    since: list[list[int]] = []
    while True:
        choice = rng.random()
        if choice < 0.8:
            document = [rng.randrange(VOCAB) for _ in range(rng.randrange(8, 40))]
            say("offered", document)
            if learner.offer([], document):
                since.append(document)
        elif choice < 0.95:
            learner.flush()
            say("flushed", since)
            since = []
        elif learner._store.n_documents:
            with learner._disk:
                number = rng.choice(list(learner._store._rows))
                tokens = learner._store._index.document(number)
            assert tokens is not None
            say("forgetting", tokens.tolist())
            learner.forget([number])
            say("forgotten", tokens.tolist())
            since = [document for document in since if document != tokens.tolist()]


def fork_and_kill(path: Path, diary: Path, seed: int, delay: float) -> list[Any]:
    """The diary of a process that was killed ``delay`` seconds after it was ready."""
    child = os.fork()
    if child == 0:
        try:
            learn_until_killed(path, diary, seed)
        finally:
            os._exit(1)
    while not diary.exists() or not diary.stat().st_size:
        time.sleep(0.001)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), "the learning process failed by itself"
    return [json.loads(line) for line in diary.read_text().splitlines()]


def check(path: Path, messages: list[Any], known: dict[str, set[tuple[int, ...]]]) -> None:
    """Compare what is on disk with everything said so far."""
    dying: set[tuple[int, ...]] = set()
    for kind, value in messages:
        if kind == "offered":
            known["offered"].add(tuple(value))
        elif kind == "flushed":
            known["kept"].update(map(tuple, value))
        elif kind == "forgetting":
            dying = {tuple(value)}
        elif kind == "forgotten":
            known["kept"] -= dying
            known["gone"] |= dying
            dying = set()
    index = CorpusIndex.open(path, verify=True)
    documents = [tuple(tokens.tolist()) for _, tokens in index.documents()]
    found = set(documents)
    assert len(documents) == len(found), "a document is there twice"
    assert known["kept"] - found <= dying, "a document that was flushed is lost"
    assert found <= known["offered"], "a document that nobody offered"
    assert not found & known["gone"], "a document that was forgotten"
    held = b"".join(file.read_bytes() for file in path.rglob("*") if file.is_file())
    for tokens in known["gone"]:
        assert np.array(tokens, "<i4").tobytes() not in held, "bytes of a forgotten document"
    known["kept"] = found  # what was not promised may be there too, and then it stays
    known["gone"] |= dying - found


def main(folder: Path) -> None:
    learned.COMPACT_AT, learning.GATHER_SECONDS = 300, 0.002
    path, rng = folder / "learned", random.Random(5)
    with open_learner(path) as learner:  # compile before the forks
        learner.offer([], [1])
        learner.flush()
        learner.forget()
    known: dict[str, set[tuple[int, ...]]] = {"offered": set(), "kept": set(), "gone": set()}
    said: dict[str, int] = {}
    for kill in range(KILLS):
        delay = rng.random() * (0.03 if kill % 3 == 0 else 0.25)
        messages = fork_and_kill(path, folder / f"diary-{kill}", kill, delay)
        for kind, _ in messages:
            said[kind] = said.get(kind, 0) + 1
        known["gone"] = set(list(known["gone"])[-40:])
        check(path, messages, known)
    sys.stdout.write(json.dumps({**said, "kept": len(known["kept"])}))


def test_a_killed_server_keeps_what_was_flushed_and_nothing_else(tmp_path: Path) -> None:
    command = [sys.executable, __file__, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout)
    assert said["ready"] == KILLS
    assert min(said["offered"], said["flushed"] * 5, said["forgotten"] * 20) > 100
    assert said["kept"] > 100


if __name__ == "__main__":
    main(Path(sys.argv[1]))

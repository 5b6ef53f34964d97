"""Learning from traffic: what is kept, what drafts see of it, what is left when it is forgotten."""

from __future__ import annotations

import errno
import hashlib
import json
import signal
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from typer.testing import CliRunner

from tascade import bundled
from tascade.cli import verbs as cli
from tascade.data.load import load_examples
from tascade.decode.loop import Decoder
from tascade.draft.ngram.batch import BatchDrafter
from tascade.draft.ngram.drafter import NgramDrafter
from tascade.draft.ngram.sources import Task
from tascade.errors import ConfigError, FingerprintError, PackError
from tascade.index import learned
from tascade.index import log as corpus_log
from tascade.index import traffic as learning
from tascade.index.corpus import CorpusIndex
from tascade.index.hash_chain import HashChain
from tascade.index.traffic import TrafficLearner
from tascade.index.view import CorpusView, shard_table
from tascade.model import TaskModel

END = 1
VOCAB = 1000
SECRET = [901, 17, 902, 18, 903, 19, END]


def base_index(path: Path, documents: Any = ((5, 6, END),) * 3, shards: int = 1) -> CorpusIndex:
    return CorpusIndex.build(
        path / "base", list(documents), vocab_size=VOCAB, fingerprint="t", shards=shards
    )


def open_learner(path: Path, max_tokens: int = 100_000) -> TrafficLearner:
    return TrafficLearner.open(
        path / "learned", fingerprint="t", vocab_size=VOCAB, max_tokens=max_tokens
    )


def stored(path: Path) -> list[list[int]]:
    index = CorpusIndex.open(path / "learned", verify=True)
    return [tokens.tolist() for _, tokens in index.documents()]


def id_of(path: Path, document: list[int]) -> int:
    index = CorpusIndex.open(path / "learned")
    return next(number for number, tokens in index.documents() if tokens.tolist() == document)


def visible(view: CorpusView) -> Counter[tuple[int, ...]]:
    """The documents that a drafter over a view can draft from, and how often."""
    found: Counter[tuple[int, ...]] = Counter()
    for tokens in [shard.tokens for shard in view.shards] + [view.delta_tokens]:
        cuts = np.flatnonzero(tokens == -1)
        found.update(tuple(tokens[a + 1 : b].tolist()) for a, b in pairwise(cuts))
    return found


def on_disk(folder: Path, document: list[int]) -> list[str]:
    """Files of a folder that hold the tokens of a document."""
    needle = np.array(document, "<i4").tobytes()
    files = (path for path in folder.rglob("*") if path.is_file())
    return [str(path.relative_to(folder)) for path in files if needle in path.read_bytes()]


def mix_chain(drafter: NgramDrafter, said: list[int]) -> list[int]:
    drafter.start(np.array([40, 41], np.int32))
    drafter.commit(np.array(said, np.int32), 0, ())
    tree = drafter.propose(48)
    path, at = [], -1
    for i, parent in enumerate(tree.parents.tolist()):
        if parent == at:
            path.append(int(tree.tokens[i]))
            at = i
    return path


def batch_chain(drafter: BatchDrafter, said: list[int]) -> list[int]:
    ids = np.zeros((1, 64), np.int32)
    row = [40, 41, *said]
    ids[0, : len(row)] = row
    return drafter.propose([[said[-1]]], np.array([len(row)], np.int32), ids)[0]


def new_batch(view: CorpusView) -> BatchDrafter:
    return BatchDrafter([Task(view)], end_tokens=[END], requests=4, length=64, most=8)


# --- drafts ---------------------------------------------------------------------------------------


def test_what_was_answered_is_drafted_after_a_refresh(tmp_path: Path) -> None:
    base = base_index(tmp_path)
    with open_learner(tmp_path) as learner:
        view = learner.view(base)
        mix, batch = NgramDrafter(view, end_tokens=[END]), new_batch(view)
        assert not learner.refresh_due()
        assert mix_chain(mix, [901, 17]) == []
        for prompt in ([1], [2]):
            assert learner.offer(prompt, SECRET)
        learner.flush()
        assert mix_chain(mix, [901, 17]) == []
        assert learner.refresh_due()
        assert not learner.refresh_due()
        for drafter in (mix, batch):
            drafter.refresh()
        assert mix_chain(mix, [901, 17])[:2] == SECRET[2:4]
        assert batch_chain(batch, [901])[:2] == SECRET[1:3]
        assert mix_chain(mix, [5]) == [6, END]
        learner._store._compact()
        learner._publish()
        assert len(view.delta_tokens) == 1
        assert learner.refresh_due()
        again = new_batch(view)
        mix.refresh()
        assert mix_chain(mix, [901, 17])[:2] == SECRET[2:4]
        assert batch_chain(again, [901])[:2] == SECRET[1:3]


def test_delta_documents_of_the_base_are_drafted_too(tmp_path: Path) -> None:
    base_index(tmp_path).close()
    with CorpusIndex.open(tmp_path / "base", writable=True) as base, open_learner(tmp_path) as one:
        view = one.view(base)
        mix = NgramDrafter(view, end_tokens=[END])
        base.append([[30, 31, 32, END]] * 2)
        one.offer([], SECRET)
        one.offer([], SECRET)
        one.flush()
        mix.refresh()
        assert visible(view) == {(5, 6, END): 3, (30, 31, 32, END): 2, tuple(SECRET): 2}
        assert mix_chain(mix, [30, 31])[:1] == [32]
        assert mix_chain(mix, [901, 17])[:2] == SECRET[2:4]


DELTAS = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=4), max_size=5)


@given(st.lists(st.tuples(st.booleans(), DELTAS), max_size=6))
def test_following_a_delta_is_like_reading_it_anew(steps: list[Any]) -> None:
    chain, documents = HashChain(4, bits=6), []
    for more, extra in steps:
        documents = documents + extra if more else extra
        delta = np.array([-1] + [t for d in documents for t in [*d, -1]], np.int32)
        chain.follow(delta)
        fresh = HashChain(4, bits=6)
        if len(delta) > 1:
            fresh.extend(np.repeat(delta, np.where(delta == -1, 2, 1)))
        assert chain.tokens.tolist() == fresh.tokens.tolist()
        assert (chain._table == fresh._table).all()
        n = chain.length + 1
        assert chain._previous[2:n].tolist() == fresh._previous[2:n].tolist()


def test_following_reads_only_what_is_new(monkeypatch: pytest.MonkeyPatch) -> None:
    chain, read = HashChain(4, bits=6), []
    real = HashChain.extend
    monkeypatch.setattr(
        HashChain, "extend", lambda self, tokens: (read.append(len(tokens)), real(self, tokens))
    )
    chain.follow(np.array([-1, 5, 6, -1], np.int32))
    chain.follow(np.array([-1, 5, 6, -1, 7, -1], np.int32))
    assert read == [6, 3]


def test_answers_stay_those_of_the_plain_model_while_learning(
    ticket_pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learned, "COMPACT_AT", 200)
    model = TaskModel.from_pretrained(ticket_pack, dtype="float32")
    rows = list(load_examples(bundled.data_path("tickets", "test")))[::12]
    prompts = [model.encode(str(row.prompt)) for row in rows]
    plain = [model.plain.generate(ids, model.params()).tokens for ids in prompts]
    corpus = model.corpus
    with TrafficLearner.open(
        tmp_path / "learned", fingerprint=corpus.fingerprint, vocab_size=corpus.vocab_size
    ) as learner:
        drafter = NgramDrafter(
            learner.view(corpus),
            similar=model.similar,
            calibration=model.calibration.copy(),
            end_tokens=model.ends,
        )
        decoder = Decoder(model.target, drafter, None, model.tokenizer)
        forwards = []
        for _ in range(2):
            forwards.append(0)
            for ids, expected in zip(prompts, plain, strict=True):
                result = decoder.generate(ids, model.params())
                assert result.tokens == expected
                forwards[-1] += result.forwards
                assert learner.offer(ids.tolist(), result.tokens)
                learner.flush()
                if learner.refresh_due():
                    drafter.refresh()
        assert learner.stats()["compactions"] > 0
    assert forwards[1] < 0.9 * forwards[0]  # an answer that was learned takes fewer steps


# --- what is taken --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "output", [[], [VOCAB], [-1], [3, -5, 4], [1.5], [[1, 2]], ["x"], list(range(101))]
)
def test_what_is_no_answer_is_refused(tmp_path: Path, output: Any) -> None:
    with open_learner(tmp_path, max_tokens=100) as learner:
        assert not learner.offer([1], output)
        assert learner.offer([1], list(range(100)))
        learner.flush()
        found = learner.stats()
        assert (found["offered"], found["refused"], found["taken"]) == (2, 1, 1)
        assert found["documents"] == 1
        assert found["tokens"] == 100


def test_only_a_few_copies_are_kept(tmp_path: Path) -> None:
    with open_learner(tmp_path) as learner:
        taken = [learner.offer([n], np.array(SECRET)) for n in range(10)]
        assert taken == [True] * learned.COPIES + [False] * (10 - learned.COPIES)
        assert learner.offer([1], SECRET[:-1])
    with open_learner(tmp_path) as learner:
        assert not learner.offer([1], SECRET)
        assert learner.stats()["duplicates"] == 1
        assert learner.forget([id_of(tmp_path, SECRET)]) == 1
        assert learner.offer([1], SECRET)
        assert not learner.offer([1], SECRET)
    assert stored(tmp_path).count(SECRET) == learned.COPIES


def test_the_oldest_leave_when_the_cap_is_reached(tmp_path: Path) -> None:
    documents = [[n, n, n, n, END] for n in range(100, 140)]
    with open_learner(tmp_path, max_tokens=100) as learner:
        for count, document in enumerate(documents, 1):
            assert learner.offer([], document)
            learner.flush()
            now = stored(tmp_path)
            assert now == documents[count - len(now) : count]
            assert 100 - 2 * 12 <= sum(map(len, now)) <= 100 or count < 20
            assert sum(map(len, now)) == learner.stats()["tokens"]
        assert learner.stats()["evicted"] == 40 - len(now)
        assert learner.offer([], documents[0])  # it may come back
        assert on_disk(tmp_path / "learned", documents[1]) == []
    with open_learner(tmp_path, max_tokens=20) as learner:
        assert learner.stats()["tokens"] <= 20
        assert stored(tmp_path)[-1] == documents[0]


def test_the_delta_is_kept_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learned, "COMPACT_AT", 50)
    base = base_index(tmp_path)
    with open_learner(tmp_path) as learner:
        view = learner.view(base)
        for n in range(100, 200):
            learner.offer([], [n] * 7)
            learner.flush()
            assert len(view.delta_tokens) < 50 * 8 / 7 + 1
            assert len(view.shards) <= 1 + learned.LEARNED_SHARDS
        assert learner.stats()["compactions"] >= 10
        assert sum(visible(view).values()) == 103


def test_offers_do_not_wait_and_what_finds_no_room_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learning, "QUEUE_TOKENS", 20)
    with open_learner(tmp_path) as learner:
        with learner._disk:  # as if a compaction took for ever
            taken = [learner.offer([], [n] * 5) for n in range(6)]
            assert taken == [True] * 4 + [False] * 2
        learner.flush()
        assert learner.offer([], [6] * 5)
        assert learner.stats()["dropped"] == 2
    assert not learner.offer([], [7])
    assert stored(tmp_path) == [[n] * 5 for n in (0, 1, 2, 3, 6)]


def test_many_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learned, "COMPACT_AT", 300)
    monkeypatch.setattr(learning, "GATHER_SECONDS", 0.001)
    base = base_index(tmp_path)
    with open_learner(tmp_path) as learner:
        drafter = NgramDrafter(learner.view(base), end_tokens=[END])

        def offer_some(thread: int) -> None:
            for n in range(150):
                assert learner.offer([], [thread, n, n + 1, END])
                if n % 40 == 0:
                    learner.flush()

        threads = [threading.Thread(target=offer_some, args=(500 + n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            if learner.refresh_due():
                drafter.refresh()
            assert mix_chain(drafter, [5]) == [6, END]
        learner.flush()
    found = {tuple(document) for document in stored(tmp_path)}
    assert found == {(t, n, n + 1, END) for t in range(500, 504) for n in range(150)}


def test_arrays_stay_valid_when_a_compaction_replaces_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learned, "COMPACT_AT", 50)
    base = base_index(tmp_path)
    with open_learner(tmp_path, max_tokens=400) as learner:
        view = learner.view(base)
        held = []
        for n in range(100, 300):
            learner.offer([], [n] * 9)
            learner.flush()
            table, arrays = shard_table(view)
            held.append((arrays, [[a.copy() for a in shard] for shard in arrays]))
            assert len(table) == len(arrays)
        assert learner.stats()["evicted"] > 100
        names = {path.name for path in (tmp_path / "learned" / "shards").iterdir()}
        assert names == {entry.name for entry in learner._store._index.manifest.shards}
    for arrays, copies in held:
        for shard, copy in zip(arrays, copies, strict=True):
            assert all((a == b).all() for a, b in zip(shard, copy, strict=True))


def test_no_more_shards_than_a_draft_searches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learned, "COMPACT_AT", 50)
    full = base_index(tmp_path / "8", [[n, END] for n in range(5, 13)], shards=8)
    nearly = base_index(tmp_path / "7", [[n, END] for n in range(5, 12)], shards=7)
    with open_learner(tmp_path) as learner:
        with pytest.raises(ConfigError, match="no room"):
            learner.view(full)
        for n in range(100, 140):
            learner.offer([], [n] * 9)
            learner.flush()
        assert len(learner.snapshot.shards) == learned.LEARNED_SHARDS
        mix = NgramDrafter(learner.view(nearly))
        for n in range(140, 180):
            learner.offer([], [n] * 9)
            learner.flush()
            mix.refresh()
        assert len(mix._shards) == 8


# --- forgetting -----------------------------------------------------------------------------------


@pytest.mark.parametrize("compacted", [False, True])
@pytest.mark.parametrize("everything", [False, True])
def test_what_is_forgotten_is_neither_drafted_nor_on_disk(
    tmp_path: Path, compacted: bool, everything: bool
) -> None:
    base = base_index(tmp_path)
    with open_learner(tmp_path) as learner:
        other = [7, 8, 9, 10, END]
        for document in (SECRET, other, other):
            learner.offer([], document)
        learner.flush()
        if compacted:
            learner._store._compact()
            learner._publish()
        view = learner.view(base)
        mix, batch = NgramDrafter(view, end_tokens=[END]), new_batch(view)
        assert mix_chain(mix, [901, 17])[:2] == SECRET[2:4]
        assert on_disk(tmp_path / "learned", SECRET) != []
        learner.refresh_due()
        ids = None if everything else [id_of(tmp_path, SECRET), 12345]
        assert learner.forget(ids) == (3 if everything else 1)
        assert on_disk(tmp_path / "learned", SECRET) == []
        assert learner.refresh_due()
        mix.refresh()
        batch.refresh()
        assert mix_chain(mix, [901, 17]) == []
        assert batch_chain(batch, [901]) == []
        assert mix_chain(mix, [7, 8])[:2] == ([] if everything else [9, 10])
        assert visible(view)[tuple(SECRET)] == 0
        assert learner.forget(ids) == 0
    assert stored(tmp_path) == ([] if everything else [other, other])


def test_forgetting_everything_reaches_the_queue(tmp_path: Path) -> None:
    with open_learner(tmp_path) as learner:
        learner._closed.wait(0.01)
        assert learner.offer([], SECRET)
        assert learner.forget() == 1
        assert learner.stats()["documents"] == 0
    assert stored(tmp_path) == []


def test_what_a_dead_process_was_forgetting_is_gone_when_it_is_opened_again(tmp_path: Path) -> None:
    with open_learner(tmp_path) as learner:
        learner.offer([], SECRET)
        learner.flush()
        learner._store._compact()
    with CorpusIndex.open(tmp_path / "learned", writable=True) as index:
        index.delete([0])
    assert on_disk(tmp_path / "learned", SECRET) != []
    with open_learner(tmp_path) as learner:
        assert on_disk(tmp_path / "learned", SECRET) == []
        assert learner.snapshot.shards == ()


def test_forgetting_says_so_when_a_file_cannot_be_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_learner(tmp_path) as learner:
        learner.offer([], SECRET)
        learner.flush()
        learner._store._compact()
        with monkeypatch.context() as patch:
            patch.setattr("shutil.rmtree", lambda *_, **__: None)
            with pytest.raises(PackError, match="could not be removed"):
                learner.forget()
            assert learner.snapshot.shards == ()
            with pytest.raises(PackError, match="could not be removed"):
                learner.forget()  # still there, so it must not say that nothing is
    open_learner(tmp_path).close()
    assert on_disk(tmp_path / "learned", SECRET) == []


# --- opening, closing, failing --------------------------------------------------------------------


def test_only_the_owner_may_enter(tmp_path: Path) -> None:
    learner = open_learner(tmp_path)
    assert (tmp_path / "learned").stat().st_mode & 0o777 == 0o700
    learner.offer([], SECRET)
    learner.close()
    learner.close()
    assert (tmp_path / "learned").stat().st_mode & 0o777 == 0o700
    (tmp_path / "learned").chmod(0o755)
    open_learner(tmp_path).close()
    assert (tmp_path / "learned").stat().st_mode & 0o777 == 0o700


def test_another_owner_another_tokenizer_and_another_folder_are_refused(tmp_path: Path) -> None:
    base = base_index(tmp_path)
    with open_learner(tmp_path), pytest.raises(PackError, match="another process owns"):
        open_learner(tmp_path)
    folder = tmp_path / "learned"
    with pytest.raises(FingerprintError, match="another tokenizer"):
        TrafficLearner.open(folder, fingerprint="other", vocab_size=VOCAB)
    with pytest.raises(FingerprintError, match="another vocabulary"):
        TrafficLearner.open(folder, fingerprint="t", vocab_size=VOCAB + 1)
    with pytest.raises(ConfigError, match="out of range"):
        open_learner(tmp_path, max_tokens=0)
    with pytest.raises(PackError, match="not learned"):
        TrafficLearner.open(base.path, fingerprint="t", vocab_size=VOCAB)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("mine")
    with pytest.raises(PackError, match="something is there"):
        TrafficLearner.open(tmp_path / "full", fingerprint="t", vocab_size=VOCAB)
    with (
        TrafficLearner.open(tmp_path / "u", fingerprint="u", vocab_size=VOCAB) as learner,
        pytest.raises(FingerprintError),
    ):
        learner.view(base)
    open_learner(tmp_path).close()  # none of them left a lock behind


def test_a_torn_tail_costs_the_last_document_only(tmp_path: Path) -> None:
    with open_learner(tmp_path) as learner:
        for n in range(5):
            learner.offer([], [n, n, END])
    log = tmp_path / "learned" / "delta-0.log"
    log.write_bytes(log.read_bytes()[:-3])
    with open_learner(tmp_path) as learner:
        assert learner.stats()["documents"] == 4
        learner.offer([], [9, END])
    assert stored(tmp_path) == [[n, n, END] for n in range(4)] + [[9, END]]


def test_a_full_disk_costs_what_could_not_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_learner(tmp_path) as learner:
        learner.offer([], SECRET)
        learner.flush()

        def full(*_: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        for name, place in (("_write", corpus_log.LogWriter), ("fsync", corpus_log.os)):
            with monkeypatch.context() as patch:
                patch.setattr(place, name, full)
                assert learner.offer([], [3, 4, END])
                with pytest.raises(PackError, match="could not be written"):
                    learner.flush()
        learner.flush()
        assert learner.stats()["dropped"] == 2
        assert learner.offer([], [5, 6, END])
        learner.flush()
    assert stored(tmp_path)[0] == SECRET
    assert stored(tmp_path)[-1] == [5, 6, END]


OTHER_SERVER = """
import sys
from pathlib import Path
from tascade.index.corpus import CorpusIndex
from tascade.draft.ngram.drafter import NgramDrafter
from tascade.index.traffic import TrafficLearner
base = CorpusIndex.open(sys.argv[1])
learner = TrafficLearner.open(Path(sys.argv[2]), fingerprint="t", vocab_size=base.vocab_size)
view = learner.view(base)
for line in sys.stdin:
    learner.offer([], [int(word) for word in line.split()])
    learner.flush()
    documents = sum(int((s.tokens == -1).sum()) - 1 for s in view.shards)
    print(documents + int((view.delta_tokens == -1).sum()) - 1, flush=True)
"""


def start_server(base: Path, folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", OTHER_SERVER, str(base), str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_two_servers_share_a_pack_and_a_dead_ones_lock_is_taken_over(tmp_path: Path) -> None:
    base = base_index(tmp_path)

    def digest() -> dict[str, str]:
        files = (path for path in base.path.rglob("*") if path.is_file())
        return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}

    before = digest()
    with open_learner(tmp_path / "mine") as learner, start_server(base.path, tmp_path / "learned") as other:  # fmt: skip  # noqa: E501
        assert other.stdin is not None
        assert other.stdout is not None
        view = learner.view(base)
        for n in range(20):
            other.stdin.write(f"{n + 1} {n} 700\n")
            other.stdin.flush()
            learner.offer([], [n, n + 1, 800])
            learner.flush()
            assert int(other.stdout.readline()) == 3 + n + 1
            assert sum(visible(view).values()) == 3 + n + 1
        with pytest.raises(PackError, match="another process owns"):
            open_learner(tmp_path)
        other.send_signal(signal.SIGKILL)
        other.wait()
    with open_learner(tmp_path) as learner:
        assert learner.stats()["documents"] == 20
    assert stored(tmp_path) == [[n + 1, n, 700] for n in range(20)]
    assert stored(tmp_path / "mine") == [[n, n + 1, 800] for n in range(20)]
    assert digest() == before


# --- the command line -----------------------------------------------------------------------------


def run_cli(*words: object) -> str:
    result = CliRunner().invoke(
        cli.app, ["learned", *(str(w) for w in words)], catch_exceptions=False
    )
    assert result.exit_code == 0, result.output
    return result.stdout


def test_the_command_line_shows_and_forgets(tmp_path: Path) -> None:
    with open_learner(tmp_path) as learner:
        for n in range(4):
            learner.offer([], [n, 900 + n, END])
        learner.flush()
        folder = tmp_path / "learned"
        assert "4 documents, 12 tokens" in run_cli(folder)  # also while a server owns it
        with pytest.raises(PackError, match="another process owns"):
            run_cli(folder, "--forget", 0)
    said = json.loads(run_cli(folder, "--forget", 1, "--forget", 3, "--forget", 99, "--json"))
    assert (said["forgotten"], said["documents"], said["tokens"]) == (2, 2, 6)
    assert stored(tmp_path) == [[0, 900, END], [2, 902, END]]
    assert on_disk(folder, [1, 901, END]) == []
    assert json.loads(run_cli(folder, "--forget-all", "--json"))["forgotten"] == 2
    assert stored(tmp_path) == []
    base = base_index(tmp_path)
    for words in ((base.path,), (base.path, "--forget-all")):
        with pytest.raises(PackError, match="not learned"):
            run_cli(*words)
    assert base.n_documents == 3


# --- against a plain list -------------------------------------------------------------------------

CAP = 60
ANSWERS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=7), min_size=1, max_size=8)


class LearnerMachine(RuleBasedStateMachine):
    """Offers, forgetting, compaction and reopening against a list of what was taken."""

    @initialize()
    def start(self) -> None:
        self.place = tempfile.TemporaryDirectory()
        self.path = Path(self.place.name)
        self.base = base_index(self.path)
        self.kept: list[list[int]] = []
        self.held: list[tuple[np.ndarray, np.ndarray]] = []
        self.learner = open_learner(self.path, CAP)
        self.view = self.learner.view(self.base)

    @rule(answers=ANSWERS)
    def offer(self, answers: list[list[int]]) -> None:
        with self.learner._disk:  # the thread must not evict between one offer and the next
            for answer in answers:
                expected = self.kept.count(answer) < learned.COPIES
                assert self.learner.offer([], answer) == expected
                if expected:
                    self.kept.append(answer)
        self.learner.flush()
        now = stored(self.path)
        taken, self.kept = self.kept, self.kept[len(self.kept) - len(now) :]
        if len(now) < len(taken):
            assert sum(map(len, taken)) > CAP
            assert sum(map(len, now)) >= CAP - 2 * 7  # no more left than had to

    @precondition(lambda self: self.kept)
    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        ids = [number for number, _ in CorpusIndex.open(self.path / "learned").documents()]
        at = data.draw(st.sets(st.sampled_from(range(len(ids))), max_size=3))
        assert self.learner.forget([ids[i] for i in at] + [10**6]) == len(at)
        self.kept = [answer for i, answer in enumerate(self.kept) if i not in at]

    @rule()
    def forget_all(self) -> None:
        assert self.learner.forget() == len(self.kept)
        self.kept = []

    @rule()
    def compact(self) -> None:
        self.learner._store._compact()
        self.learner._publish()

    @rule()
    def reopen(self) -> None:
        self.learner.close()
        self.learner = open_learner(self.path, CAP)
        self.view = self.learner.view(self.base)

    @rule()
    def hold(self) -> None:
        arrays = [a for s in self.learner.snapshot.shards for a in s] + [self.view.delta_tokens]
        self.held += [(array, array.copy()) for array in arrays]

    @invariant()
    def all_agree(self) -> None:
        if not hasattr(self, "learner"):
            return
        assert stored(self.path) == self.kept
        assert visible(self.view) - visible(self.base) == Counter(map(tuple, self.kept))
        found = self.learner.stats()
        assert (found["documents"], found["tokens"]) == (
            len(self.kept),
            sum(map(len, self.kept)),
        )
        assert found["tokens"] <= CAP
        assert len(self.learner.snapshot.shards) <= learned.LEARNED_SHARDS

    def teardown(self) -> None:
        if hasattr(self, "learner"):
            assert all((array == copy).all() for array, copy in self.held)
            self.learner.close()
            self.place.cleanup()


@pytest.fixture
def _small_deltas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learned, "COMPACT_AT", 25)


@pytest.mark.usefixtures("_small_deltas")
class TestAgainstAList(LearnerMachine.TestCase):  # type: ignore[misc,name-defined]
    settings = settings(max_examples=60, stateful_step_count=15, deadline=None)

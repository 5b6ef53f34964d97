"""The order of the suffix array, exact counts, and the life of documents, against naive models."""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tascade.errors import ConfigError, DataError, PackError
from tascade.index.arrays import DEPTH, FAULTS, find_fault, sort_shard
from tascade.index.corpus import CorpusIndex

VOCAB = 4
short = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=12)
periodic = st.builds(
    lambda unit, n: (unit * 40)[:n],
    st.lists(st.integers(0, 1), min_size=1, max_size=3),
    st.integers(1, 90),
)
corpora = st.lists(short | periodic, min_size=1, max_size=8)


@pytest.fixture(autouse=True, scope="module")
def no_waiting_for_the_disk():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda handle: None)
        yield


def flat(documents):
    return np.array([-1] + [t for d in documents for t in [*d, -1]], np.int32)


def rows_of(tokens):
    starts = np.flatnonzero(tokens == -1)[:-1] + 1
    return np.stack([np.arange(len(starts)), starts], axis=1)


def reversed_context(tokens, p):
    out = []
    for d in range(1, DEPTH + 1):
        out.append(int(tokens[p - d]))
        if out[-1] == -1:
            break
    return out


def naive_order(tokens):
    positions = [p for p in range(1, len(tokens)) if tokens[p] != -1]
    return sorted(positions, key=lambda p: (reversed_context(tokens, p), p))


def naive_count(documents, context):
    context = list(context)[-DEPTH:]
    if -1 in context:
        context = context[len(context) - 1 - context[::-1].index(-1) :]
    found = 0
    for document in documents:
        padded = [-1, *document]
        ends = range(len(context), len(padded)) if context else range(1, len(padded))
        found += sum(padded[p - len(context) : p] == context for p in ends)
    return found


@settings(max_examples=300, deadline=None)
@given(corpora, st.sampled_from([VOCAB, 5, 300, 70_000]))
def test_order_equals_naive_sort(documents, vocab_size):
    tokens = flat(documents)
    order, head = sort_shard(tokens, vocab_size)
    assert order.dtype == head.dtype == np.uint32
    assert order.tolist() == naive_order(tokens)
    assert len(head) == vocab_size + 2
    assert head[0] == 0
    assert head[-1] == len(order)
    for t in range(-1, VOCAB):
        bucket = order[head[t + 1] : head[t + 2]]
        assert set(bucket.tolist()) == {p for p in order.tolist() if tokens[p - 1] == t}
    assert find_fault(tokens, order, head, rows_of(tokens), vocab_size) == 0


@pytest.mark.parametrize("vocab_size", [1, 2, 3, 255, 256, 65_535, 2**22])
def test_order_of_longer_texts(vocab_size):
    rng = np.random.default_rng(vocab_size)
    few = np.unique(rng.integers(0, vocab_size, 3))
    documents = [rng.choice(few, rng.integers(1, 200)).tolist() for _ in range(12)]
    documents += documents[:6] + [d[10:] for d in documents if len(d) > 10]
    tokens = flat(documents)
    order, head = sort_shard(tokens, vocab_size)
    assert order.tolist() == naive_order(tokens)
    assert find_fault(tokens, order, head, rows_of(tokens), vocab_size) == 0


def test_repetitive_corpora_take_linear_time():
    rng = np.random.default_rng(0)
    units = [rng.integers(0, 3, 99).tolist() for _ in range(5)]
    same, few = [units[0]] * 4000, [units[i] for i in rng.integers(0, 5, 4000)]
    one = [[1] * 400_000]
    sort_shard(flat(units), 5)
    for documents in (same, few, one):
        tokens = flat(documents)
        begin = time.perf_counter()
        order, head = sort_shard(tokens, 5)
        assert time.perf_counter() - begin < 3
        assert find_fault(tokens, order, head, rows_of(tokens), 5) == 0


@settings(max_examples=300, deadline=None)
@given(corpora, st.data())
def test_every_altered_value_is_found(documents, data):
    tokens = flat(documents)
    arrays = [tokens, *sort_shard(tokens, VOCAB), rows_of(tokens)]
    arrays[3][:, 0] += 5
    which = data.draw(st.integers(0, 2))
    at = data.draw(st.integers(0, len(arrays[which]) - 1))
    old = arrays[which][at]
    low = 0 if which else -(2**31)
    new = data.draw(st.integers(-2, 20).filter(lambda v: v >= low) | st.integers(low, 2**31 - 1))
    arrays[which][at] = new
    fault = find_fault(*arrays, VOCAB)
    if new == old:
        assert fault == 0
    elif which:  # another token can, by chance, leave the order as it is
        assert FAULTS[fault]
    elif not -1 <= new < VOCAB:
        assert fault in (1, 2)


def test_altered_rows_are_found():
    tokens = flat([[1, 2], [3], [1]])
    order, head = sort_shard(tokens, VOCAB)
    for rows in ([[0, 1], [1, 4]], [[0, 1], [1, 4], [1, 6]], [[0, 1], [1, 3], [2, 6]]):
        assert FAULTS[find_fault(tokens, order, head, np.array(rows), VOCAB)].startswith(
            "documents"
        )


@settings(max_examples=100, deadline=None)
@given(corpora, st.lists(short, max_size=4), st.integers(1, 5), st.data())
def test_count_equals_brute_force(documents, appended, shards, data):
    with tempfile.TemporaryDirectory() as folder:
        CorpusIndex.build(
            f"{folder}/i", documents, vocab_size=VOCAB, fingerprint="f", shards=shards
        )
        with CorpusIndex.open(f"{folder}/i", writable=True) as index:
            index.append(appended, flush=False)
            everything = documents + appended
            for _ in range(10):
                source = [-1, *data.draw(st.sampled_from(everything))]
                end = data.draw(st.integers(0, len(source)))
                begin = data.draw(st.integers(0, end))
                for context in (source[begin:end], [2, *source[:end]], [*source[:end], 1]):
                    assert index.count(context) == naive_count(everything, context)
            assert index.count([VOCAB]) == index.count([-2]) == index.count([0, 2**40]) == 0
            assert index.count([1, -1]) == len(everything)


def test_shards_and_round_trip(tmp_path):
    documents = [[i % 7, 1, 2, i % 5] for i in range(50)]
    index = CorpusIndex.build(
        tmp_path / "i", iter(documents), vocab_size=9, fingerprint="f", shards=7,
        sources={"a.jsonl": "00"}.items(), command="tascade adapt",
    )  # fmt: skip
    assert len(index.shards) == 7
    assert [(i, d.tolist()) for i, d in index.documents()] == list(enumerate(documents))
    assert (index.n_documents, index.n_tokens, index.vocab_size) == (50, 200, 9)
    assert (index.fingerprint, index.manifest.command) == ("f", "tascade adapt")
    assert index.manifest.sources == (("a.jsonl", "00"),)
    assert index.n_bytes == sum(f.stat().st_size for f in index.path.rglob("*") if f.is_file())
    for tokens, order, head in index.shards:
        assert [a.dtype.name for a in (tokens, order, head)] == ["int32", "uint32", "uint32"]
        assert type(tokens) is np.ndarray
        assert not tokens.flags.writeable
        assert order.tolist() == naive_order(tokens)
    assert index.delta_tokens.tolist() == [-1]


def test_an_empty_index_grows(tmp_path):
    index = CorpusIndex.build(tmp_path / "i", [], vocab_size=5, fingerprint="f")
    assert (index.n_documents, index.n_tokens, index.shards, index.count([])) == (0, 0, (), 0)
    with CorpusIndex.open(tmp_path / "i", writable=True) as writer:
        assert writer.append([[1, 2], np.array([3], np.int64)]) == [0, 1]
        writer.compact()
        writer.delete([0, 1])
        writer.compact()
        assert (writer.n_documents, writer.shards) == (0, ())
        assert writer.append([[4]]) == [2]


@pytest.mark.parametrize(
    ("document", "shown"),
    [
        ([], "no tokens"),
        ([1, 9], "9 at index 1"),
        ([-1], "-1 at index 0"),
        ([2**40], str(2**40)),
        ([2**70], str(2**70)),
        ([1.0], "1.0"),
        ([True], "True"),
        (["a"], "a"),
        ([[1]], "shape [1, 1]"),
        ([[1], [1, 2]], "sequence"),
        (3, "shape []"),
        (None, "shape []"),
    ],
)
def test_bad_documents_are_refused_and_named(tmp_path, document, shown):
    with pytest.raises(DataError) as caught:
        CorpusIndex.build(tmp_path / "i", [[1], document], vocab_size=9, fingerprint="f")
    assert "document 1" in str(caught.value)
    assert shown in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    CorpusIndex.build(tmp_path / "i", [[1]], vocab_size=9, fingerprint="f")
    with CorpusIndex.open(tmp_path / "i", writable=True) as index:
        with pytest.raises(DataError, match="document 1"):
            index.append([[1], document])
        assert index.n_documents == 1


@pytest.mark.parametrize("option", ["vocab_size", "shards"])
@pytest.mark.parametrize("value", [0, -1, 2**31])
def test_options_out_of_range(tmp_path, option, value):
    options = {"vocab_size": 5, "fingerprint": "f", option: value}
    with pytest.raises(ConfigError, match=option):
        CorpusIndex.build(tmp_path / "i", [[1]], **options)
    assert list(tmp_path.iterdir()) == []


def test_refresh_sees_what_a_writer_did(tmp_path):
    CorpusIndex.build(tmp_path / "i", [[1, 2], [3]], vocab_size=5, fingerprint="f")
    reader = CorpusIndex.open(tmp_path / "i")
    with CorpusIndex.open(tmp_path / "i", writable=True) as writer:
        assert not writer.refresh()
        assert not reader.refresh()
        before = reader.delta_tokens
        writer.append([[4, 4]], flush=False)
        assert reader.refresh()
        writer.append([[i % 5] * 9 for i in range(500)])
        assert reader.refresh()
        assert before.tolist() == [-1]
        assert reader.delta_tokens.tolist() == writer.delta_tokens.tolist()
        assert reader.delta_tokens[:4].tolist() == [-1, 4, 4, -1]
        with pytest.raises(ValueError, match="read-only"):
            reader.delta_tokens[0] = 1
        writer.delete([0, 2])
        assert reader.refresh()
        assert reader.delta_tokens.tolist() == flat([[i % 5] * 9 for i in range(500)]).tolist()
        assert [s.tolist() for s in reader.deleted_spans()] == [[[1, 3]]]
        old = reader.shards[0]
        writer.compact()
        assert old.tokens.tolist() == [-1, 1, 2, -1, 3, -1]
        assert reader.refresh()
        assert reader.delta_tokens.tolist() == [-1]
        assert reader.n_documents == writer.n_documents == 501


def test_compact_keeps_large_shards_below_the_limit(tmp_path):
    documents = [[1, 2, 3]] * 4
    CorpusIndex.build(tmp_path / "i", documents * 2, vocab_size=5, fingerprint="f", shards=2)
    with CorpusIndex.open(tmp_path / "i", writable=True) as index:
        large = [entry.name for entry in index.manifest.shards]
        assert len(large) == 2
        index.append([[1]])
        index.compact(max_shards=3)
        assert [entry.name for entry in index.manifest.shards][:2] == large
        index.append([[2]])
        index.compact(max_shards=3)
        assert [len(s.order) for s in index.shards] == [12, 12, 2]
        index.compact(max_shards=2)
        assert len(index.shards) == 2
        index.compact()
        assert len(index.shards) == 1
        index.compact()
        assert [d.tolist() for _, d in index.documents()] == [*documents, *documents, [1], [2]]
        with pytest.raises(ConfigError, match="max_shards"):
            index.compact(0)


class Documents(RuleBasedStateMachine):
    """The index against a dict of id -> tokens."""

    @initialize(documents=st.lists(short, max_size=5), shards=st.integers(1, 5))
    def build(self, documents, shards):
        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name) / "index"
        CorpusIndex.build(self.path, documents, vocab_size=VOCAB, fingerprint="f", shards=shards)
        self.index = CorpusIndex.open(self.path, writable=True)
        self.reader = CorpusIndex.open(self.path)
        self.model, self.used = dict(enumerate(documents)), len(documents)

    @rule(documents=st.lists(short, max_size=4), flush=st.booleans())
    def append(self, documents, flush):
        ids = self.index.append(documents, flush=flush)
        assert ids == list(range(self.used, self.used + len(documents)))
        self.used += len(documents)
        self.model.update(zip(ids, documents, strict=True))

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def delete(self, data):
        ids = data.draw(st.lists(st.sampled_from(sorted(self.model)), max_size=3))
        self.index.delete(ids)
        for number in set(ids):
            del self.model[number]

    @rule(number=st.integers(-2, 40))
    def delete_unknown(self, number):
        if number not in self.model:
            with pytest.raises(PackError, match=str(number)):
                self.index.delete([*self.model, number])

    @rule(max_shards=st.integers(1, 3))
    def compact(self, max_shards):
        self.index.compact(max_shards)
        assert len(self.index.shards) <= max_shards or not self.index.manifest.tombstones

    @rule(verify=st.booleans())
    def reopen(self, verify):
        self.index.close()
        self.index = CorpusIndex.open(self.path, writable=True, verify=verify)

    @rule()
    def refresh(self):
        self.reader.refresh()
        self.same(self.reader)

    @invariant()
    def writer_is_right(self):
        if hasattr(self, "index"):
            self.same(self.index)

    def same(self, index):
        assert {i: d.tolist() for i, d in index.documents()} == self.model
        assert [i for i, _ in index.documents()] == sorted(self.model)
        assert index.n_documents == len(self.model)
        assert index.n_tokens == sum(map(len, self.model.values()))
        if not any(len(spans) for spans in index.deleted_spans()):
            for context in ([], [1], [-1, 0], [2, 2]):
                assert index.count(context) == naive_count(self.model.values(), context)

    def teardown(self):
        if hasattr(self, "index"):
            self.index.close()
            self.folder.cleanup()


TestDocuments = Documents.TestCase
TestDocuments.settings = settings(max_examples=40, stateful_step_count=15, deadline=None)

OTHER_PROCESS = """
import sys
from tascade.index.corpus import CorpusIndex
index = CorpusIndex.open(sys.argv[1])
print("open", flush=True)
rounds, last = 0, None
for line in sys.stdin:
    wanted = int(line)
    index.refresh()
    while index.n_documents < wanted:
        index.refresh()
        rounds += 1
    fresh = CorpusIndex.open(sys.argv[1], verify=True)
    ids = [i for i, _ in fresh.documents()]
    assert ids == list(range(fresh.n_documents)), ids
    assert index.count([1]) >= wanted and index.count([-1]) >= wanted
    print(index.n_documents, flush=True)
"""


def test_another_process_reads_while_this_one_compacts(tmp_path):
    CorpusIndex.build(tmp_path / "i", [[1, 2]] * 300, vocab_size=5, fingerprint="f")
    command = [sys.executable, "-c", OTHER_PROCESS, str(tmp_path / "i")]
    with (
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as other,
        CorpusIndex.open(tmp_path / "i", writable=True) as index,
    ):
        assert other.stdout.readline() == "open\n"
        for _ in range(8):
            other.stdin.write(f"{index.n_documents}\n")
            other.stdin.flush()
            for _ in range(10):  # the other one opens meanwhile
                index.append([[1, 3]] * 5)
                index.compact()
            assert int(other.stdout.readline()) >= 300
        other.stdin.close()
        assert other.wait(30) == 0

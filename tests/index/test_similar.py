"""The index of similar examples: against a naive one, on disk, damaged."""

import itertools
import json
import math
import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tascade.errors import ConfigError, DataError, FingerprintError, PackError
from tascade.index import similar_kernels
from tascade.index.corpus import CorpusIndex
from tascade.index.similar import COPIES, MANIFEST, SimilarIndex
from tascade.index.similar_kernels import MAX_SHARE, SimilarArrays, features_of
from tascade.index.store import checksum

FILES = [f"{name}.npy" for name in SimilarArrays._fields]


@pytest.fixture(autouse=True, scope="module")
def no_waiting_for_the_disk():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda handle: None)
        yield


def naive_features(prompt):
    return set(prompt) | set(itertools.pairwise(prompt))


def naive_scores(prompts, request):
    """Score of every example, as the module's docstring says; None without a shared feature."""
    df = Counter(x for prompt in prompts for x in naive_features(prompt))
    idf = {
        x: math.log(len(prompts) / n)
        for x, n in df.items()
        if n < MAX_SHARE * len(prompts) or n == 1
    }
    found = []
    for prompt in prompts:
        kept = naive_features(prompt).intersection(idf)
        total = sum(idf[x] for x in kept.intersection(naive_features(request)))
        norm = math.sqrt(sum(idf[x] ** 2 for x in kept))
        found.append(total / norm if total > 0 else None)
    return found


def build(path, prompts, **options):
    return SimilarIndex.build(path, enumerate(prompts), fingerprint="tok", **options)


def outputs_of(prompts):
    return [np.array([i + 100, 1], np.int32) for i in range(len(prompts))]


words = st.lists(st.integers(0, 12), max_size=12)


@settings(deadline=None, max_examples=60)
@given(st.lists(words, max_size=30), words, st.integers(1, 40))
def test_ranks_as_the_naive_index_does(tmp_path_factory, prompts, request_, top):
    index = build(tmp_path_factory.mktemp("index") / "similar", prompts)
    ids, scores = index.rank(request_, top)
    wanted = naive_scores(prompts, request_)
    found = {i: s for i, s in enumerate(wanted) if s is not None}
    assert len(ids) == len(set(ids.tolist())) == min(top, len(found))
    assert all(s == pytest.approx(found[i], rel=1e-5) for i, s in zip(ids, scores, strict=True))
    best = sorted(found.values(), reverse=True)[:top]
    assert scores.tolist() == pytest.approx(best, rel=1e-5)
    again = index.rank(request_, top)
    assert again[0].tolist() == ids.tolist()
    assert again[1].tolist() == scores.tolist()


@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(0, 2**31 - 1), max_size=40))
def test_features_are_each_token_and_pair_once(prompt):
    found = features_of(np.array(prompt, np.int32))
    assert len(found) == len(naive_features(prompt))
    assert (np.diff(found.astype(np.int64)) > 0).all()


@settings(deadline=None, max_examples=50)
@given(st.sets(st.integers(0, 2**32 - 1), max_size=80), st.integers(0, 2**32 - 1))
def test_finds_every_feature(hashes, other):
    features = np.array(sorted(hashes), np.uint32)
    found = [similar_kernels._find(features, np.uint32(h)) for h in sorted(hashes)]
    assert found == list(range(len(hashes)))
    if other not in hashes:
        assert similar_kernels._find(features, np.uint32(other)) == -1


def test_keeps_the_rarest_features_of_a_long_prompt(tmp_path):
    prompts = [[2000 + e, 1000 + e // 2, 900 + e // 5, 800 + e // 9, 1] for e in range(100)]
    arrays = build(tmp_path / "similar", prompts, max_features=3)._arrays
    df = Counter(x for prompt in prompts for x in naive_features(prompt))
    kept = [[] for _ in prompts]
    for i, idf in enumerate(arrays.idf.tolist()):
        for example in arrays.postings[arrays.offsets[i] : arrays.offsets[i + 1]]:
            kept[example].append(round(100 / math.exp(idf)))
    for example, prompt in enumerate(prompts):
        assert sorted(kept[example]) == sorted(df[x] for x in naive_features(prompt))[:3]
        norm = math.sqrt(sum(math.log(100 / n) ** 2 for n in kept[example]))
        assert arrays.norms[example] == pytest.approx(norm)


def test_reads_the_rarest_features_first_and_then_stops(tmp_path, monkeypatch):
    monkeypatch.setattr("tascade.index.similar.MAX_VISITS", 1)
    prompts = [[1, 10 + i] for i in range(4)] + [[2, 100 + i] for i in range(40)]
    index = build(tmp_path / "similar", prompts)
    assert index.rank([1, 7, 12])[0].tolist() == [2]


def test_the_nearly_identical_prompt_comes_last(tmp_path):
    rng = np.random.default_rng(0)
    prompts = [[7, 7, 7, *rng.integers(10, 400, 30).tolist(), 8] for _ in range(200)]
    outputs = outputs_of(prompts)
    index = build(tmp_path / "similar", prompts, fetch=outputs.__getitem__)
    request = prompts[42].copy()
    request[9] = 9
    found = index.lookup(request)
    assert found[-1].tolist() == outputs[42].tolist()
    assert index.lookup(request, top=1)[0].tolist() == outputs[42].tolist()
    assert [o.tolist() for o in index.lookup(request)] == [o.tolist() for o in found]
    assert index.lookup([7, 7, 7, 8]) == []  # what every prompt has
    assert index.lookup([]) == []
    assert index.lookup([5, 6]) == []
    assert index.lookup(request, top=0) == []


def test_of_equals_the_later_example_is_more_similar(tmp_path):
    index = build(tmp_path / "similar", [[1, 2], [3], [1, 2], [4], [5], [6], [1, 2], *[[9]] * 9])
    assert index.rank([1, 2])[0].tolist() == [6, 2, 0]
    assert index.rank([1, 2], 2)[0].tolist() == [6, 2]


def test_caps_tokens_and_copies_and_skips_what_is_gone(tmp_path):
    prompts = [[1, 20 + i] for i in range(8)] + [[2]] * 40
    outputs = {i: np.array([5, 5, i // 4], np.int32) for i in range(8)}
    index = build(tmp_path / "similar", prompts, fetch=outputs.get)
    assert [o[-1] for o in index.lookup([1])] == [0] * COPIES + [1] * COPIES
    assert [o[-1] for o in index.lookup([1], max_tokens=8)] == [1] * COPIES
    assert index.lookup([1], max_tokens=2) == []
    for gone in range(5):
        del outputs[gone]
    assert [o[-1] for o in index.lookup([1])] == [1, 1]


def test_gives_the_documents_of_a_corpus_index(tmp_path):
    outputs = [[3 + i, i, 0] for i in range(60)]
    CorpusIndex.build(tmp_path / "corpus", outputs, vocab_size=99, fingerprint="tok", shards=3)
    with CorpusIndex.open(tmp_path / "corpus", writable=True) as corpus:
        late = corpus.append([[i, 1, 0] for i in range(5)])
        corpus.delete([0, 17, 59, late[2]])
        everything = dict(corpus.documents())
        for i in range(-2, 70):
            document = corpus.document(i)
            assert (document is None) == (i not in everything)
            assert document is None or document.tolist() == everything[i].tolist()
        prompts = [[i, 7] for i in range(60)]
        build(tmp_path / "similar", prompts)
        index = SimilarIndex.open(tmp_path / "similar", fetch=corpus.document)
        assert [o.tolist() for o in index.lookup([16])] == [outputs[16]]
        assert index.lookup([17]) == []


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    path = tmp_path_factory.mktemp("sound") / "similar"
    build(path, [[i % 7, 10 + i, 3, 3] for i in range(40)])
    return path


@pytest.fixture
def copy(sound, tmp_path):
    return Path(shutil.copytree(sound, tmp_path / "similar"))


def test_is_the_same_bytes_each_time(sound, tmp_path):
    build(tmp_path / "again", [[i % 7, 10 + i, 3, 3] for i in range(40)])
    for name in [*FILES, MANIFEST]:
        assert (sound / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["again"]
    SimilarIndex.open(sound, fetch=None, verify=True)


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
@pytest.mark.parametrize("damage", ["missing", "empty", "short", "long", "folder"])
def test_refuses_damaged_files(copy, name, damage):
    raw = (copy / name).read_bytes()
    (copy / name).unlink()
    if damage == "folder":
        (copy / name).mkdir()
    elif damage != "missing":
        changed = {"empty": b"", "short": raw[:-3], "long": raw + b"more"}
        (copy / name).write_bytes(changed[damage])
    with pytest.raises(PackError):
        SimilarIndex.open(copy, fetch=None)


@pytest.mark.parametrize(
    ("name", "at", "value"),
    [
        ("features", 3, 0),
        ("offsets", 0, 1),
        ("offsets", 4, 2**40),
        ("offsets", 4, -5),
        ("offsets", -1, 1),
        ("postings", 5, 40),
        ("idf", 2, np.nan),
        ("idf", 2, np.inf),
        ("idf", 2, -1),
        ("norms", 0, 0),
        ("norms", 0, np.nan),
        ("documents", 1, -1),
    ],
)
def test_refuses_values_that_would_lead_astray(copy, name, at, value):
    array = np.load(copy / f"{name}.npy")
    array[at] = value
    np.save(copy / f"{name}.npy", array)
    with pytest.raises(PackError, match=name):
        SimilarIndex.open(copy, fetch=None)


def test_notices_any_change_when_asked(copy):
    array = np.load(copy / "documents.npy")
    array[1] = 5
    np.save(copy / "documents.npy", array)
    SimilarIndex.open(copy, fetch=None)
    with pytest.raises(PackError, match="sha256"):
        SimilarIndex.open(copy, fetch=None, verify=True)


@pytest.mark.parametrize(
    "change",
    [
        {"format": "other"},
        {"version": 2},
        {"version": True},
        {"examples": -1},
        {"examples": 2**70},
        {"examples": 41},
        {"features": "7"},
        {"postings": 1.0},
        {"fingerprint": None},
        {"sha256": {}},
        {"sha256": 3},
    ],
)
def test_refuses_manifests_it_never_writes(copy, change):
    body = json.loads((copy / MANIFEST).read_text()) | change
    (copy / MANIFEST).write_text(json.dumps(body))
    with pytest.raises(PackError):
        SimilarIndex.open(copy, fetch=None)
    del body["checksum"]
    body["checksum"] = checksum(body)
    (copy / MANIFEST).write_text(json.dumps(body))
    with pytest.raises(PackError):
        SimilarIndex.open(copy, fetch=None)


@pytest.mark.parametrize("raw", [b"[]", b"null", b"{", b"\xff", b"[" * 100_000])
def test_refuses_what_is_no_manifest(copy, raw):
    (copy / MANIFEST).write_bytes(raw)
    with pytest.raises(PackError):
        SimilarIndex.open(copy, fetch=None)


def test_refuses_pickles(copy):
    np.save(copy / "idf.npy", np.array([{}], object), allow_pickle=True)
    with pytest.raises(PackError):
        SimilarIndex.open(copy, fetch=None)


def test_refuses_another_tokenizer(sound):
    with pytest.raises(FingerprintError):
        SimilarIndex.open(sound, fetch=None, fingerprint="another")
    assert SimilarIndex.open(sound, fetch=None, fingerprint="tok").fingerprint == "tok"


def test_replaces_only_an_index_and_only_when_asked(copy, tmp_path):
    with pytest.raises(PackError, match="already"):
        build(copy, [[1]])
    assert build(copy, [[1], [2]], overwrite=True).n_examples == 2
    (copy / "notes.txt").write_text("mine")
    with pytest.raises(PackError, match=r"notes\.txt"):
        build(copy, [[1]], overwrite=True)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(PackError):
        build(tmp_path / "file", [[1]], overwrite=True)
    assert sorted(os.listdir(tmp_path)) == ["file", "similar"]


def test_leaves_nothing_behind_when_it_fails(tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tascade.index.similar.write_atomic", refuse)
    with pytest.raises(PackError, match="No space"):
        build(tmp_path / "similar", [[1]])
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("prompt", [[-1], [2**31], [0.5], [[1]], ["a"], 3, [[1], [1, 2]]])
def test_refuses_prompts_that_are_no_token_ids(tmp_path, prompt):
    with pytest.raises(DataError, match="document 0"):
        build(tmp_path / "similar", [prompt])
    assert os.listdir(tmp_path) == []


def test_refuses_bad_options(tmp_path):
    with pytest.raises(ConfigError):
        build(tmp_path / "similar", [[1]], max_features=0)
    with pytest.raises(DataError):
        SimilarIndex.build(tmp_path / "similar", [(-1, [1])], fingerprint="tok")
    with pytest.raises(ConfigError, match="fetch"):
        build(tmp_path / "similar", [[1]]).lookup([1])


@pytest.mark.parametrize("prompts", [[], [[]], [[], [1]], [[1]]])
def test_holds_few_examples_or_none(tmp_path, prompts):
    index = build(tmp_path / "similar", prompts, fetch=lambda i: np.array([i, 0], np.int32))
    assert index.n_examples == len(prompts)
    assert len(index.lookup([1, 2])) == (len(prompts) == 2)

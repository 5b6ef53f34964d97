"""The mixing drafter: what it proposes, and what it learns."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tascade.core import Drafter, Source
from tascade.draft.ngram.drafter import NgramDrafter
from tascade.draft.ngram.mixer_calibration import Calibration
from tascade.errors import PackError
from tascade.index.corpus import CorpusIndex

END = 1


def index(path: Path, documents: list[list[int]], shards: int = 1) -> CorpusIndex:
    return CorpusIndex.build(
        path / "index", documents, vocab_size=64, fingerprint="t", shards=shards
    )


def ids(*tokens: int) -> np.ndarray:
    return np.array(tokens, np.int32)


def chain_of(drafter: Drafter, limit: int = 16) -> list[int]:
    tree = drafter.propose(limit)
    path, at = [], -1
    for i, parent in enumerate(tree.parents.tolist()):
        if parent == at:
            path.append(int(tree.tokens[i]))
            at = i
    return path


@pytest.mark.parametrize("shards", [1, 3])
def test_follows_the_corpus_from_the_start_of_an_output(tmp_path: Path, shards: int) -> None:
    drafter = NgramDrafter(index(tmp_path, [[5, 6, 7, 8, END]] * 9, shards), end_tokens=[END])
    drafter.start(ids(40, 41))
    assert chain_of(drafter) == [5, 6, 7, 8, END]
    drafter.commit(ids(5, 6), 0, ())
    assert chain_of(drafter) == [7, 8, END]


DOCUMENTS = st.lists(
    st.lists(st.integers(5, 8), min_size=1, max_size=30).map(lambda d: [*d, END]),
    min_size=1,
    max_size=12,
)


@given(DOCUMENTS, st.integers(1, 3), st.data())
def test_every_drafted_step_was_seen_in_the_corpus(
    tmp_path_factory: pytest.TempPathFactory,
    documents: list[list[int]],
    shards: int,
    data: st.DataObject,
) -> None:
    # Votes are handed down from node to child: whoever votes must stand behind the same tokens.
    corpus = index(tmp_path_factory.mktemp("seen"), documents * 3, shards)
    drafter = NgramDrafter(corpus, end_tokens=[END], use_context=False)
    said = data.draw(st.sampled_from(documents))
    said = said[: data.draw(st.integers(0, len(said) - 1))]
    drafter.start(ids(40))
    drafter.commit(ids(*said), 0, ())
    tree = drafter.propose(48)
    seen = {pair for document in documents for pair in pairwise([-1, *document])}
    for token, parent in zip(tree.tokens.tolist(), tree.parents.tolist(), strict=True):
        before = int(tree.tokens[parent]) if parent >= 0 else (said[-1] if said else -1)
        assert (before, token) in seen


def test_branches_where_the_corpus_does(tmp_path: Path) -> None:
    documents = [[5, 6, 7, END]] * 6 + [[5, 9, 7, END]] * 4
    drafter = NgramDrafter(index(tmp_path, documents), end_tokens=[END])
    drafter.start(ids(40))
    tree = drafter.propose(16)
    below = {int(t) for t, p in zip(tree.tokens, tree.parents, strict=True) if p == 0}
    assert {6, 9} <= below


def test_copies_from_the_request_without_a_corpus() -> None:
    drafter = NgramDrafter(None)
    drafter.start(ids(10, 11, 12, 13, 14, 20))
    drafter.commit(ids(10, 11), 0, ())
    tree = drafter.propose(8)
    assert chain_of(drafter)[:3] == [12, 13, 14]
    assert tree.source[0] == Source.CONTEXT


def test_similar_examples_tip_the_balance(tmp_path: Path) -> None:
    documents = [[5, 6, 7, END], [5, 9, 7, END]] * 10

    class Similar:
        def lookup(self, prompt: np.ndarray) -> list[np.ndarray]:
            return [ids(5, 9, 7, END)] * 2

    for similar, expected in ((None, {6, 9}), (Similar(), {9})):
        drafter = NgramDrafter(index(tmp_path / str(expected), documents), similar=similar)
        drafter.start(ids(40))
        drafter.commit(ids(5), 0, ())
        assert chain_of(drafter, 1)[0] in expected


def test_new_documents_are_drafted_after_a_refresh(tmp_path: Path) -> None:
    index(tmp_path, [[5, 6, END]] * 3).close()
    with CorpusIndex.open(tmp_path / "index", writable=True) as corpus:
        drafter = NgramDrafter(corpus)
        corpus.append([[30, 31, 32, END]] * 2)
        drafter.refresh()
        drafter.start(ids(40))
        drafter.commit(ids(30, 31), 0, ())
        assert chain_of(drafter)[0] == 32


def test_nothing_of_a_request_is_left_for_the_next() -> None:
    drafter = NgramDrafter(None)
    drafter.start(ids(10, 11, 12, 13))
    drafter.propose(8)
    drafter.commit(ids(10, 11, 12), 0, ())
    drafter.start(ids(50, 51))
    drafter.commit(ids(10, 11), 0, ())
    assert len(drafter.propose(8)) == 0


def test_learns_that_a_source_is_wrong(tmp_path: Path) -> None:
    drafter = NgramDrafter(index(tmp_path, [[5, 6, END]] * 9))
    drafter.start(ids(40))
    before = float(drafter.propose(4).survival[0])
    for _ in range(60):
        drafter.start(ids(40))
        drafter.propose(4)
        drafter.commit(ids(33), 0, ())
    drafter.start(ids(40))
    after = drafter.propose(4)
    assert len(after) == 0 or float(after.survival[0]) < before / 2


def test_without_adapting_nothing_is_learned(tmp_path: Path) -> None:
    calibration = Calibration()
    drafter = NgramDrafter(index(tmp_path, [[5, 6, END]] * 9), calibration=calibration, adapt=False)
    drafter.start(ids(40))
    drafter.propose(4)
    drafter.commit(ids(33), 0, ())
    fresh = Calibration()
    for mine, theirs in zip(calibration.arrays(), fresh.arrays(), strict=True):
        assert (mine == theirs).all()


@given(
    documents=st.lists(st.lists(st.integers(2, 9), min_size=1, max_size=12), max_size=8),
    prompt=st.lists(st.integers(2, 9), max_size=12),
    limit=st.integers(0, 70),
    floor=st.floats(0, 0.2),
    output=st.lists(st.lists(st.integers(2, 9), min_size=1, max_size=4), max_size=5),
)
def test_every_proposal_is_a_best_first_tree(
    tmp_path_factory: pytest.TempPathFactory,
    documents: list[list[int]],
    prompt: list[int],
    limit: int,
    floor: float,
    output: list[list[int]],
) -> None:
    corpus = index(tmp_path_factory.mktemp("i"), documents) if documents else None
    drafter = NgramDrafter(corpus)
    drafter.start(ids(*prompt))
    for tokens in output:
        tree = drafter.propose(limit, floor)
        n = len(tree)
        assert n <= limit
        assert (tree.parents < np.arange(n)).all()
        assert (tree.parents >= -1).all()
        assert (np.diff(tree.survival) <= 1e-6).all()
        assert ((tree.survival > 0) & (tree.survival <= 1)).all()
        children = list(zip(tree.parents.tolist(), tree.tokens.tolist(), strict=True))
        assert len(set(children)) == n
        drafter.commit(ids(*tokens), n, ())


def test_a_calibration_survives_saving_and_refuses_junk(tmp_path: Path) -> None:
    calibration = Calibration()
    calibration.cells[1, 2, 3] = (3.5, 9.0)
    calibration.save(tmp_path / "c.json")
    loaded = Calibration.load(tmp_path / "c.json")
    assert np.allclose(loaded.cells, calibration.cells)
    text = (tmp_path / "c.json").read_text()
    for junk in (
        "",
        "[]",
        "{}",
        text[:-20],
        text.replace("9.0", "-9.0"),
        text.replace("3.5", "NaN"),
    ):
        (tmp_path / "c.json").write_text(junk)
        with pytest.raises(PackError):
            Calibration.load(tmp_path / "c.json")

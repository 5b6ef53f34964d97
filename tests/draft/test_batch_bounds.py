"""What an engine hands to the batch drafter is checked: kernels write where it says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tascade.draft.ngram.batch import BatchDrafter
from tascade.draft.ngram.sources import Task
from tascade.errors import ConfigError
from tascade.index.corpus import CorpusIndex
from tascade.index.similar import SimilarIndex

END, ROWS, LENGTH, VOCABULARY = 1, 4, 40, 64
DOCUMENTS = [[5, 6, 7, 8, END]] * 9


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> CorpusIndex:
    path = tmp_path_factory.mktemp("bounds") / "index"
    return CorpusIndex.build(path, DOCUMENTS, vocab_size=VOCABULARY, fingerprint="t")


def drafter(*corpora: CorpusIndex | None) -> BatchDrafter:
    tasks = [Task(corpus) for corpus in corpora]
    return BatchDrafter(tasks, end_tokens=[END], requests=ROWS, length=LENGTH, most=8)


@pytest.fixture(scope="module")
def drafting(corpus: CorpusIndex) -> BatchDrafter:
    return drafter(corpus)


def batch(*rows: list[int], width: int = LENGTH) -> tuple[Any, Any]:
    """(lengths, ids) of rows of tokens."""
    ids = np.zeros((max(len(rows), 1), width), np.int32)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
    return np.array([len(row) for row in rows], np.int32), ids


GOOD = [40, 5]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (lambda n, ids: ([[5]] * (ROWS + 1), np.repeat(n, 5), np.repeat(ids, 5, 0)), "requests"),
        (lambda n, ids: ([[5], [5]], n, ids), "rows"),
        (lambda n, ids: ([[5], [5]], np.repeat(n, 2), ids), "rows"),
        (lambda n, ids: ([[5]], n.astype(np.int64), ids), "int32"),
        (lambda n, ids: ([[5]], n, ids.astype(np.int64)), "int32"),
        (lambda n, ids: ([[5]], n, ids[0]), "int32"),
        (lambda n, ids: ([[5]], n[None], ids), "int32"),
        (lambda n, ids: ([[5]], n.tolist(), ids), "int32"),
        (lambda n, ids: ([[5]], n, ids.tolist()), "int32"),
        (lambda n, ids: ([[5]], n * 0 + LENGTH + 1, ids), "tokens"),
        (lambda n, ids: ([[5]], np.full(1, 2**31 - 1, np.int32), ids), "tokens"),
        (lambda n, ids: ([[5]], n * 0 - 1, ids), "tokens"),
        (lambda n, ids: ([[5, 5, 5]], n, ids), "tokens"),
        (lambda n, ids: ([[5]], n * 0, ids), "tokens"),
    ],
)
def test_a_batch_that_cannot_be_is_refused(drafting: BatchDrafter, given: Any, said: str) -> None:
    sampled, lengths, ids = given(*batch(GOOD))
    with pytest.raises(ConfigError, match=said):
        drafting.propose(sampled, lengths, ids)
    assert drafting.propose([[5]], *batch(GOOD)) == [[6, 7, 8, END]]  # and it goes on


@pytest.mark.parametrize("task", [2, 2**40, 2**80])
def test_a_task_that_is_not_there_is_refused(corpus: CorpusIndex, task: int) -> None:
    with pytest.raises(ConfigError, match="task"):
        drafter(corpus, corpus).propose([[5]], *batch(GOOD), lambda row: task)


def test_a_row_of_no_task_is_not_drafted(corpus: CorpusIndex) -> None:
    lengths, ids = batch(GOOD, GOOD)
    found = drafter(corpus, corpus).propose([[5], [5]], lengths, ids, lambda row: row - 1)
    assert found == [[], [6, 7, 8, END]]


def test_a_row_that_is_too_long_is_not_drafted(drafting: BatchDrafter) -> None:
    # An engine's rows may be wider than the longest request.
    lengths, ids = batch(GOOD, [40, *[9] * LENGTH, 5], GOOD, width=2 * LENGTH)
    found = drafting.propose([[5]] * 3, lengths, ids)
    assert found == [[6, 7, 8, END], [], [6, 7, 8, END]]


@pytest.mark.parametrize("strange", [-1, -2, VOCABULARY, 2**31 - 1, -(2**31)])
def test_a_row_of_tokens_that_are_none_is_not_drafted(drafting: BatchDrafter, strange: int) -> None:
    # An engine keeps such for what has no token id, or none yet: embeddings, tokens to come.
    for row in ([strange, 5], [40, strange, 5], [40, strange]):
        lengths, ids = batch(row, GOOD)
        assert drafting.propose([[row[-1]], [5]], lengths, ids) == [[], [6, 7, 8, END]]
    lengths, ids = batch([44, 41, 5], GOOD)
    assert drafting.propose([[5], [5]], lengths, ids)[0] == [6, 7, 8, END]
    for end in ([6, strange], [6, strange, 5], [6, 7, strange, 5, 6]):  # met on the way
        row = [44, 41, 5, *end]
        lengths, ids = batch(row, GOOD)
        assert drafting.propose([end, [5]], lengths, ids)[0] == []


def test_rows_left_alone_may_hold_anything(drafting: BatchDrafter) -> None:
    lengths, ids = batch([-5] * LENGTH, GOOD)
    lengths[0] = 2**31 - 1
    assert drafting.propose([[], [5]], lengths, ids) == [[], [6, 7, 8, END]]


FUZZ = f"""
import sys
import numpy as np
from tascade.draft.ngram.batch import BatchDrafter
from tascade.index.corpus import CorpusIndex
from tascade.index.similar import SimilarIndex
from tascade.draft.ngram.sources import Task
from tascade.errors import ConfigError

folder = sys.argv[1]
corpora = [CorpusIndex.open(f"{{folder}}/{{i}}") for i in range(2)]
similar = SimilarIndex.open(f"{{folder}}/similar", fetch=corpora[0].document)
told = []
drafter = BatchDrafter(
    [Task(corpora[0], similar), Task(corpora[1])], end_tokens=[{END}], requests={ROWS},
    length={LENGTH}, most=8, threads=1, on_end=lambda p, o: told.append((p, o)),
)
rng = np.random.default_rng(0)
ids = np.zeros(({ROWS} + 2, {LENGTH} + 3), np.int32)
lengths = np.zeros({ROWS} + 2, np.int32)
strange = [-1, -2, {VOCABULARY}, {VOCABULARY} + 1, 2**31 - 1, -(2**31), 1 << 20]
refused = drafted = 0
for step in range(4000):
    rows = int(rng.integers(1, {ROWS} + 1 + (rng.random() < 0.05)))
    sampled = []
    for b in range({ROWS} + 2):
        if lengths[b] > {LENGTH} - 8 or lengths[b] < 0 or rng.random() < 0.1:
            ids[b] = rng.integers(2, {VOCABULARY}, ids.shape[1])
            lengths[b] = rng.integers(1, 9)
        new = [int(t) for t in rng.choice([5, 6, 7, 8, 9, {END}], int(rng.integers(0, 6)))]
        at = int(lengths[b])
        ids[b, at : at + len(new)] = new
        lengths[b] += len(new)
        sampled.append(new)
    spoilt, spoilt_ids, kind = lengths.copy(), ids.copy(), rng.integers(12)
    row = int(rng.integers(rows))
    if kind == 0:
        spoilt[row] = rng.choice([-1, 0, {LENGTH} + 1, {LENGTH} + 3, {LENGTH} + 4, 2**31 - 1])
    elif kind < 4:
        at = rng.integers(0, ids.shape[1], 3)
        spoilt_ids[row, at] = rng.choice(strange, 3)
    elif kind == 4:
        sampled[row] = [5] * int(rng.integers(0, 90))
    elif kind == 5:
        spoilt_ids = spoilt_ids[: int(rng.integers(0, rows + 1)), : int(rng.integers(1, {LENGTH}))]
    elif kind == 6:
        spoilt = spoilt[: int(rng.integers(0, rows + 1))]
    bad_task = int(rng.choice([-1, 2, 2**40])) if kind == 7 and rng.random() < 0.2 else None
    task_of = (lambda r: (r + step // 50) % 2 if bad_task is None else bad_task)
    try:
        found = drafter.propose(sampled[:rows], spoilt, spoilt_ids, task_of)
    except ConfigError:
        refused += 1
        continue
    assert len(found) == rows
    for draft in found:
        assert len(draft) <= 8 and all(0 <= token < {VOCABULARY} for token in draft), draft
    drafted += sum(map(len, found))
for prompt, output in told:
    for tokens in (prompt, output):
        assert not len(tokens) or (0 <= tokens.min() and tokens.max() < {VOCABULARY})
assert refused > 100 and drafted > 1000 and told, (refused, drafted, len(told))
"""


@pytest.mark.slow
def test_no_batch_whatever_ends_the_process(tmp_path: Path) -> None:
    documents = [[5, 6, 7, 8, END], [5, 6, 9, END], [7, 8, 9, 9, END]] * 9
    for i in range(2):
        CorpusIndex.build(tmp_path / str(i), documents, vocab_size=VOCABULARY, fingerprint="t")
    prompts = [(i, [40 + i % 20, 41, 42 + i % 7]) for i in range(len(documents))]
    SimilarIndex.build(tmp_path / "similar", prompts, fingerprint="t")
    done = subprocess.run(
        [sys.executable, "-c", FUZZ, str(tmp_path)], capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-2000:]

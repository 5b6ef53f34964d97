"""Drafts for a whole batch: whose they are, what they are made from, how many are worth it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tascade.draft.costs import CostTable
from tascade.draft.ngram import batch as batch_module
from tascade.draft.ngram.batch import BatchDrafter
from tascade.draft.ngram.batch_budget import BatchBudget
from tascade.draft.ngram.batch_kernels import SURVIVAL_BINS
from tascade.draft.ngram.sources import Task
from tascade.errors import ConfigError
from tascade.index.corpus import CorpusIndex
from tascade.index.traffic import AppendedWatch

END = 1
ROWS, LENGTH, MOST = 6, 200, 8


def index(path: Path, documents: list[list[int]]) -> CorpusIndex:
    return CorpusIndex.build(path / "index", documents, vocab_size=4096, fingerprint="t")


def drafter(*corpora: CorpusIndex | None, **options: Any) -> BatchDrafter:
    tasks = [Task(corpus) for corpus in corpora or (None,)]
    sizes = {"requests": ROWS, "length": LENGTH, "most": MOST} | options
    return BatchDrafter(tasks, end_tokens=[END], **sizes)


class Host:
    """Plays an engine: rows of tokens, which move when a request ends."""

    def __init__(self, drafting: BatchDrafter, task_of: Any = None) -> None:
        self.drafter, self.task_of = drafting, task_of
        self.ids = np.zeros((ROWS, LENGTH), np.int32)
        self.lengths = np.zeros(ROWS, np.int32)
        self.names: list[int] = []
        self.drafts: dict[int, list[int]] = {}

    def add(self, name: int, prompt: list[int]) -> None:
        row = len(self.names)
        self.ids[row, : len(prompt)] = prompt
        self.lengths[row] = len(prompt)
        self.names.append(name)

    def end(self, name: int) -> None:
        """The last row takes the place of the ended one, as in vLLM."""
        row, last = self.names.index(name), len(self.names) - 1
        self.ids[row], self.lengths[row] = self.ids[last], self.lengths[last]
        self.names[row] = self.names[last]
        self.names.pop()

    def swap(self, a: int, b: int) -> None:
        self.ids[[a, b]] = self.ids[[b, a]]
        self.lengths[[a, b]] = self.lengths[[b, a]]
        self.names[a], self.names[b] = self.names[b], self.names[a]

    def step(self, said: dict[int, list[int]]) -> dict[int, list[int]]:
        sampled = []
        for row, name in enumerate(self.names):
            new = said.get(name, [])
            n = self.lengths[row]
            self.ids[row, n : n + len(new)] = new
            self.lengths[row] += len(new)
            sampled.append(new)
        found = self.drafter.propose(sampled, self.lengths, self.ids, self.task_of)
        self.drafts = dict(zip(self.names, found, strict=True))
        return self.drafts


def test_a_batch_is_drafted_ragged_from_the_corpus(tmp_path: Path) -> None:
    host = Host(drafter(index(tmp_path, [[5, 6, 7, 8, END]] * 9 + [[15, 16, END]] * 9)))
    host.add(0, [40, 41])
    host.add(1, [42])
    host.add(2, [43, 44, 45])
    assert host.step({0: [5], 1: [], 2: [15]}) == {0: [6, 7, 8, END], 1: [], 2: [16, END]}
    assert host.step({0: [6, 7], 1: [15], 2: [16, END]}) == {0: [8, END], 1: [16, END], 2: []}


def test_a_draft_never_reaches_beyond_the_longest_request(tmp_path: Path) -> None:
    host = Host(drafter(index(tmp_path, [list(range(5, 40))] * 9)))
    host.add(0, [99] * (LENGTH - 5))
    assert host.step({0: [5]})[0] == [6, 7, 8]


def test_requests_of_several_tasks_draw_on_their_own_corpus(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    one = index(tmp_path / "a", [[5, 6, 7, END]] * 9)
    two = index(tmp_path / "b", [[5, 16, 17, END]] * 9)
    host = Host(drafter(one, two))
    host.task_of = lambda row: host.names[row]
    host.add(0, [40])
    host.add(1, [40])
    assert host.step({0: [5], 1: [5]}) == {0: [6, 7, END], 1: [16, 17, END]}
    host.end(0)  # the other moves to row 0, and stays with its task
    assert host.step({1: [16]}) == {1: [17, END]}


@pytest.mark.parametrize("packs", [1, 2, 3])
def test_documents_appended_to_any_pack_are_drafted(tmp_path: Path, packs: int) -> None:
    paths = [tmp_path / str(i) for i in range(packs)]
    for path in paths:
        path.mkdir()
    corpora = [index(path, [[900, 901, END]] * 3) for path in paths]
    host = Host(drafter(*corpora))
    host.task_of = lambda row: host.names[row]
    watch = AppendedWatch(corpora, every=0.0)

    def drafts(said: int = 5) -> list[list[int]]:
        for i in range(packs):
            host.add(i, [40 + i])
        found = host.step({i: [said] for i in range(packs)})
        for i in range(packs):
            host.end(i)
        return [found[i] for i in range(packs)]

    def append(pack: int, document: list[int], times: int, *, compact: bool = False) -> None:
        with CorpusIndex.open(paths[pack] / "index", writable=True) as writer:
            writer.append([document] * times)
            if compact:
                writer.compact()
        assert watch.refresh_due()
        host.drafter.refresh()

    assert drafts() == [[]] * packs
    for i in range(packs):  # of different lengths, each for its own requests alone
        append(i, [5, 10 * i + 6, 10 * i + 7, END], 9 + 20 * i)
    assert drafts() == [[10 * i + 6, 10 * i + 7, END] for i in range(packs)]
    append(0, [5, 8, 8, END], 200)
    assert drafts()[0] == [8, 8, END]
    assert drafts()[1:] == [[10 * i + 6, 10 * i + 7, END] for i in range(1, packs)]
    append(packs - 1, [30, 9, END], 9, compact=True)
    assert drafts(30) == [[]] * (packs - 1) + [[9, END]]
    assert not watch.refresh_due()


def test_packs_opened_with_appended_documents_draft_from_them(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    for name, token in (("a", 6), ("b", 16)):
        index(tmp_path / name, [[900, END]])
        with CorpusIndex.open(tmp_path / name / "index", writable=True) as writer:
            writer.append([[5, token, END]] * 9)
    opened = [CorpusIndex.open(tmp_path / name / "index") for name in ("a", "b")]
    host = Host(drafter(*opened))
    host.task_of = lambda row: host.names[row]
    host.add(0, [40])
    host.add(1, [40])
    assert host.step({0: [5], 1: [5]}) == {0: [6, END], 1: [16, END]}


def test_an_index_that_is_gone_stays_in_use(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    corpus = index(tmp_path, [[5, 6, 7, END]] * 9)
    host = Host(drafter(corpus))
    watch = AppendedWatch([corpus], every=0.0)
    (tmp_path / "index").rename(tmp_path / "elsewhere")
    assert not watch.refresh_due()
    assert not watch.refresh_due()
    assert len(caplog.records) == 1
    host.add(0, [40])
    assert host.step({0: [5]}) == {0: [6, 7, END]}
    (tmp_path / "elsewhere").rename(tmp_path / "index")
    with CorpusIndex.open(tmp_path / "index", writable=True) as writer:
        writer.append([[5, 8, END]])
    assert watch.refresh_due()


@pytest.mark.parametrize("budget", [None, BatchBudget(MOST)])
def test_a_request_of_no_task_is_left_alone(budget: BatchBudget | None, tmp_path: Path) -> None:
    drafting = drafter(index(tmp_path, [[5, 6, 7, END]] * 9), budget=budget)
    host = Host(drafting, task_of=lambda row: -host.names[row])
    host.add(0, [40])
    host.add(1, [40])
    assert budget is not None or host.step({0: [5], 1: [5]}) == {0: [6, 7, END], 1: []}
    for _ in range(30):
        assert host.step({0: [6], 1: [6]})[1] == []
    assert drafting.stats.requests == 1
    # It is a row of the batch nonetheless: what a step of two rows costs is learned.
    assert budget is None or budget.costs.curve(2) is not None


EVENTS = st.lists(
    st.tuples(st.sampled_from(["add", "end", "swap", "step", "step", "step"]), st.integers(0, 99)),
    min_size=5,
    max_size=60,
)


def play(drafting: BatchDrafter, events: list[tuple[str, int]]) -> list[tuple[int, int]]:
    """Requests that each speak an alphabet of their own, in patterns that repeat. Returns every
    drafted token that its request never said, as (request, token).
    """
    host, born, leaks = Host(drafting), 0, []
    for event, number in events:
        if event == "add" and len(host.names) < ROWS:
            # The prompts' last tokens are common to all, so that they lead anywhere.
            base = 100 + 10 * born
            host.add(born, [base + i % 4 for i in range(9)] + [7, 8, 9])
            born += 1
        elif event == "end" and host.names:
            host.end(host.names[number % len(host.names)])
        elif event == "swap" and len(host.names) > 1:
            host.swap(number % len(host.names), (number + 1) % len(host.names))
        elif event == "step" and host.names:
            said = {}
            for i, name in enumerate(host.names):
                draft = host.drafts.get(name, []) if name in host.drafts else []
                base = 100 + 10 * name
                own = [7, 8, 9, base, base + 1, base + 2][: 1 + (number + i) % 6]
                said[name] = draft[:1] + own if (number + i) % 7 else []
            room = all(n + 8 < LENGTH for n in host.lengths[: len(host.names)])
            if not room:
                break
            for name, draft in host.step(said).items():
                row = host.names.index(name)
                mine = set(host.ids[row, : host.lengths[row]].tolist())
                leaks += [(name, token) for token in draft if token not in mine]
    return leaks


_SHARED = drafter(budget=None)


@given(EVENTS)
@settings(max_examples=60)
def test_no_request_drafts_from_anothers_context(events: list[tuple[str, int]]) -> None:
    assert play(_SHARED, events) == []


def test_a_drafter_that_trusts_row_numbers_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = batch_module.match_rows

    def trusting(ids, lengths, fresh, wanted, slots, last, claimed, out, outcome):  # type: ignore[no-untyped-def]
        missing = whole(ids, lengths, fresh, wanted, slots, last, claimed, out, outcome)
        for b in range(len(fresh)):
            if fresh[b] and out[b] == -1 and last[b] >= 0 and not claimed[last[b]]:
                out[b], claimed[last[b]], missing = last[b], 1, missing - 1
        return missing

    monkeypatch.setattr(batch_module, "match_rows", trusting)
    events = [("add", 0), ("add", 1), ("step", 3), ("step", 3), ("end", 0), ("step", 4)] * 6
    assert play(drafter(), events)


def test_a_request_that_comes_back_is_known_again(tmp_path: Path) -> None:
    drafting = drafter(index(tmp_path, [[5, 6, 7, 8, END]] * 9))
    host = Host(drafting)
    host.add(0, [40, 41])
    host.add(1, [50, 51])
    host.step({0: [5], 1: [5]})
    row = host.ids[0].copy()
    host.end(0)  # preempted
    host.step({1: [6]})
    host.add(0, row[:3].tolist())
    assert host.step({0: [6], 1: [7]}) == {0: [7, 8, END], 1: [8, END]}
    assert drafting.stats.requests == 2


def test_ended_requests_are_told(tmp_path: Path) -> None:
    told: list[tuple[list[int], list[int]]] = []
    drafting = drafter(
        index(tmp_path, [[5, 6, 7, END]] * 9),
        on_end=lambda prompt, output: told.append((prompt.tolist(), output.tolist())),
    )
    host = Host(drafting)
    host.add(0, [40, 41])
    host.add(1, [42])
    host.step({0: [5], 1: [9]})
    host.step({0: [6, 7, END], 1: [8]})
    assert told == [([40, 41], [5, 6, 7, END])]


def test_out_of_range_drafts_are_refused() -> None:
    with pytest.raises(ConfigError, match="num_speculative_tokens"):
        drafter(most=65)


def teach(costs: CostTable, rows: int, seconds: dict[int, float]) -> None:
    for extra, each in seconds.items():
        for _ in range(9):
            costs.observe(rows, extra, each)


def sure(nodes: int) -> tuple[Any, Any]:
    counts, sums = np.zeros(SURVIVAL_BINS, np.int64), np.zeros(SURVIVAL_BINS)
    counts[2], sums[2] = nodes, 0.95 * nodes
    return counts, sums


def test_tokens_are_verified_where_they_are_cheap_and_not_where_they_are_dear() -> None:
    cheap, dear = BatchBudget(8), BatchBudget(8)
    teach(cheap.costs, 4, {0: 0.010, 32: 0.012})
    teach(dear.costs, 4, {0: 0.010, 32: 0.200})
    assert cheap.choose(4, *sure(32)) > 0
    assert dear.choose(4, *sure(32)) == 0


def test_costs_need_not_be_monotone() -> None:
    budget = BatchBudget(8)
    teach(budget.costs, 1, {0: 0.010, 1: 0.030, 2: 0.040, 8: 0.012})
    counts, sums = np.zeros(SURVIVAL_BINS, np.int64), np.zeros(SURVIVAL_BINS)
    counts[:8], sums[:8] = 1, 0.9
    assert budget.choose(1, counts, sums) == 8


def test_unsure_tokens_are_left_when_each_costs() -> None:
    budget = BatchBudget(8)
    teach(budget.costs, 8, {0: 0.010, 8: 0.0148, 16: 0.0196, 64: 0.0484})
    counts, sums = np.zeros(SURVIVAL_BINS, np.int64), np.zeros(SURVIVAL_BINS)
    counts[1], sums[1] = 8, 0.97 * 8
    counts[40], sums[40] = 40, 0.35 * 40
    assert 0 < budget.choose(8, counts, sums) <= 40


def test_drafting_stops_when_nothing_comes_true_and_resumes_when_it_does(tmp_path: Path) -> None:
    budget = BatchBudget(MOST)
    drafting = drafter(index(tmp_path, [[5, 6, 7, 8, 9, 10, 11, 12]] * 20), budget=budget)
    host = Host(drafting)
    rng = np.random.default_rng(0)

    def phase(predictable: bool, steps: int) -> float:
        before, said = drafting.stats.drafted, 0
        for _ in range(steps):
            if not host.names:
                host.add(0, [int(rng.integers(1000, 4000))])
                host.drafts = {0: []}
                new = [5]
            else:
                at = int(host.ids[0, host.lengths[0] - 1])
                truth = list(range(at + 1, 13))
                draft, n = host.drafts[0], 0
                while predictable and n < len(draft) and n < len(truth) and draft[n] == truth[n]:
                    n += 1
                new = [*draft[:n], truth[n] if n < len(truth) else END]
                if not predictable:
                    new = [int(rng.integers(1000, 4000)), 5]
            budget.costs.observe(1, len(host.drafts.get(0, [])), 0.01)
            drafting._ended = 0.0  # the made-up times are not to be unlearned
            host.step({0: new})
            said += len(new)
            if host.lengths[0] > LENGTH - 20 or new[-1] == END:
                host.end(0)
        return (drafting.stats.drafted - before) / steps

    first = phase(True, 60)
    phase(False, 200)
    noise = phase(False, 200)
    phase(True, 150)
    again = phase(True, 60)
    assert first > 2
    assert noise < 0.25 * first
    assert again > 0.5 * first

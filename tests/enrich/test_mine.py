"""The choice of tokens: exact counts through all merges, the same twice, better with pruning."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tascade.enrich.tokens.counts import BARRIER, Documents, NgramCounts
from tascade.enrich.tokens.curve import best_at, best_curve, choose_among
from tascade.enrich.tokens.merger import TokenMerger
from tascade.enrich.tokens.mine import MiningRules, OutputCounts, choose
from tascade.errors import ConfigError

FIRST = 1000


def naive(documents: Documents, items: int) -> Counter[tuple[int, ...]]:
    """Non-overlapping n-grams of the documents as they stand, counted from scratch."""
    found: Counter[tuple[int, ...]] = Counter()
    d = documents
    for begin, length, weight in zip(d.starts, d.lengths, d.weights, strict=False):
        ids = d.flat[begin : begin + length].tolist()
        for n in range(2, items + 1):
            ends: dict[tuple[int, ...], int] = {}
            for i in range(len(ids) - n + 1):
                gram = tuple(ids[i : i + n])
                if BARRIER not in gram and ends.get(gram, 0) <= i:
                    ends[gram] = i + n
                    found[gram] += int(weight)
    return found


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.integers(-1, 3), max_size=30), min_size=1, max_size=12),
    st.integers(1, 4),
    st.data(),
)
def test_counts_stay_exact_through_merges(
    documents: list[list[int]], least: int, data: st.DataObject
) -> None:
    held = Documents(
        [np.array(d, np.int32) for d in documents], [1 + len(d) % 3 for d in documents]
    )
    counts = NgramCounts(held, 4, least)
    for new in range(4):
        wanted = {g: n for g, n in naive(held, 4).items() if n >= least}
        found = {
            tuple(counts.items_of(node)): int(counts.counts[node])
            for node in range(len(counts))
            if counts.depth[node] > 1 and counts.counts[node] >= least
        }
        assert found == wanted
        if not wanted:
            break
        gram = data.draw(st.sampled_from(sorted(wanted)))
        node = next(n for n in range(len(counts)) if tuple(counts.items_of(n)) == gram)
        counts.merge(node, FIRST + new)


def templates(rng: np.random.Generator, n: int) -> list[list[int]]:
    """Answers of a made-up task: fixed phrases with slots between them."""
    phrases = [rng.integers(0, 300, rng.integers(3, 9)).tolist() for _ in range(12)]
    rows = []
    for _ in range(n):
        row: list[int] = []
        for k in rng.integers(0, 12, 4):
            row += [*phrases[k], *rng.integers(300, 900, rng.integers(1, 3)).tolist()]
        rows.append(row)
    return rows


@pytest.fixture(scope="module")
def task() -> tuple[OutputCounts, OutputCounts]:
    rows = templates(np.random.default_rng(0), 1200)
    return OutputCounts(rows[:1000]), OutputCounts(rows[1000:])


def fewer(chosen: list[tuple[int, ...]], test: OutputCounts) -> float:
    return (test.n_ids + test.n_outputs) / test.steps(TokenMerger(chosen, FIRST))


def test_pruning_beats_the_paper_and_the_paper_beats_flat(
    task: tuple[OutputCounts, OutputCounts],
) -> None:
    train, test = task
    gains = {
        method: fewer(choose(train, FIRST, MiningRules(tokens=20, method=method)), test)
        for method in ("pruned", "paper", "flat")
    }
    assert gains["pruned"] >= gains["paper"] > gains["flat"] > 1.0


def test_choice_is_deterministic_and_whatever_the_order(
    task: tuple[OutputCounts, OutputCounts],
) -> None:
    rows = templates(np.random.default_rng(1), 300)
    rules = MiningRules(tokens=30, least=5)
    once = choose(OutputCounts(rows), FIRST, rules)
    assert once == choose(OutputCounts(rows[::-1]), FIRST, rules)


def test_fewer_tokens_are_the_start_of_more(task: tuple[OutputCounts, OutputCounts]) -> None:
    train, test = task
    chosen = choose(train, FIRST, MiningRules(tokens=40))
    gains = [fewer(chosen[:n], test) for n in range(1, 41)]
    assert gains == sorted(gains)
    assert gains[4] > 1.2


def test_nearly_every_token_is_used_after_pruning(task: tuple[OutputCounts, OutputCounts]) -> None:
    train, _ = task
    chosen = choose(train, FIRST, MiningRules(tokens=60, least=5, method="pruned"))
    weights = np.array(train.weights, np.int64)
    _, uses = TokenMerger(chosen, FIRST).usage(train.flat, train.starts, weights)
    assert len(chosen) >= 12  # the phrases
    assert np.mean(uses > 0) >= 0.95


def test_rules_of_a_choice_hold(task: tuple[OutputCounts, OutputCounts]) -> None:
    train, _ = task
    refused = (train.kinds[0][0],)
    for method in ("pruned", "paper", "flat"):
        rules = MiningRules(tokens=50, longest=5, method=method)
        chosen = choose(
            train, FIRST, rules, lambda e: None if refused[0] in e else ",".join(map(str, e))
        )
        assert 1 < len(chosen) <= 50
        assert all(2 <= len(e) <= 5 and refused[0] not in e for e in chosen)


def test_no_token_reaches_across_a_barrier() -> None:
    rows = [[1, 2, BARRIER, 3, 4]] * 50
    chosen = choose(OutputCounts(rows), FIRST, MiningRules(tokens=10))
    assert sorted(chosen) == [(1, 2), (3, 4)]


def test_nothing_to_choose_from() -> None:
    assert choose(OutputCounts([]), FIRST, MiningRules()) == []
    assert choose(OutputCounts([[1, 2, 3]]), FIRST, MiningRules()) == []


@pytest.mark.parametrize(
    "rules",
    [{"tokens": 0}, {"items": 1}, {"longest": 99}, {"overgenerate": 0.5}, {"method": "other"}],
)
def test_rules_out_of_range(rules: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="out of range"):
        choose(OutputCounts([[1, 2]]), FIRST, MiningRules(**rules))  # type: ignore[arg-type]


def test_held_out_outputs_settle_how_to_choose(task: tuple[OutputCounts, OutputCounts]) -> None:
    train, test = task
    choices = choose_among(train, test, FIRST, MiningRules(tokens=60), repr)
    steps = best_curve(choices)
    assert {choice.rules.method for choice in choices} == {"pruned", "paper"}
    for size in steps.sizes:
        assert steps.at(size) == min(round(choice.curve.at(size)) for choice in choices)
    only = choose_among(train, test, FIRST, MiningRules(tokens=60, method="flat"), repr)
    assert [choice.rules.method for choice in only] == ["flat"]
    assert best_at(choices + only, 20).rules.method != "flat"

"""Merging is exact, shortest, and never longer with more tokens."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tascade.enrich.tokens.merger import TokenMerger
from tascade.errors import ConfigError

FIRST = 100
ids = st.lists(st.integers(0, 4), max_size=40)
expansions = st.lists(
    st.lists(st.integers(0, 4), min_size=2, max_size=6).map(tuple), max_size=12, unique=True
)


def shortest(base: list[int], tokens: list[tuple[int, ...]]) -> int:
    """By trying everything, in plain Python."""
    best = [0] * (len(base) + 1)
    for i in range(len(base) - 1, -1, -1):
        ways = [best[i + len(t)] for t in tokens if tuple(base[i : i + len(t)]) == t]
        best[i] = 1 + min([best[i + 1], *ways])
    return best[0]


def greedy(base: list[int], tokens: list[tuple[int, ...]]) -> int:
    i = n = 0
    while i < len(base):
        fits = [len(t) for t in tokens if tuple(base[i : i + len(t)]) == t]
        i += max(fits, default=1)
        n += 1
    return n


@settings(max_examples=300, deadline=None)
@given(ids, expansions)
def test_merging_is_undone_and_shortest(base: list[int], tokens: list[tuple[int, ...]]) -> None:
    merger = TokenMerger(tokens, FIRST)
    merged = merger.merge(base)
    assert merger.unmerge(merged).tolist() == base
    assert len(merged) == shortest(base, tokens) <= min(len(base), greedy(base, tokens))
    assert merger.merge(base).tolist() == merged.tolist()


@settings(max_examples=200, deadline=None)
@given(ids, expansions, st.data())
def test_one_more_token_never_makes_longer(
    base: list[int], tokens: list[tuple[int, ...]], data: st.DataObject
) -> None:
    some = tokens[: data.draw(st.integers(0, len(tokens)))]
    assert len(TokenMerger(tokens, FIRST).merge(base)) <= len(TokenMerger(some, FIRST).merge(base))


def test_of_equal_ways_the_longest_token_comes_first() -> None:
    merger = TokenMerger([(1, 2), (2, 3), (1, 2, 3), (3, 4)], FIRST)
    assert merger.merge([1, 2, 3, 4]).tolist() == [FIRST + 2, 4]


def test_uses_and_costs() -> None:
    import numpy as np

    merger = TokenMerger([(1, 2), (3, 4), (1, 2, 3, 4)], FIRST)
    flat, starts = np.array([1, 2, 3, 4, 1, 2], np.int32), np.array([0, 4, 6])
    total, uses = merger.usage(flat, starts, np.array([5, 7]))
    assert (total, uses.tolist()) == (5 + 7, [7, 0, 5])
    assert merger.cost_without(np.ones(3, bool)).tolist() == [2, 2, 2]
    assert merger.cost_without(np.array([False, True, True])).tolist()[2] == 3


@pytest.mark.parametrize(
    "bad", [[(1,)], [(1, FIRST)], [(1, 2), (1, 2)], [(-1, 2)], [tuple(range(65))]]
)
def test_expansions_must_make_sense(bad: list[tuple[int, ...]]) -> None:
    with pytest.raises(ConfigError, match="new token"):
        TokenMerger(bad, FIRST)

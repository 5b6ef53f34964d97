"""The sampling that other tests are parametrized by."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest

from all_pairs import Case, all_pairs, sampled

USES: dict[str, tuple[list[Any], Callable[..., bool]]] = {
    "equality": ([range(9), range(2), range(3), range(2)], lambda a, b, *_: a not in (3, 4) or b),
    "flags": ([range(2)] * 8 + [range(4)], lambda *case: not (case[0] and case[-1] == 3)),
    "tight": ([range(3)] * 4, lambda *case: sum(case) < 3),
    "two": ([range(9), range(6)], lambda *_: True),
}


def pairs_of(case: Case) -> set[Any]:
    return set(itertools.combinations(enumerate(case), 2))


@pytest.mark.parametrize("name", USES)
def test_every_pair_of_an_allowed_case_is_there(name: str) -> None:
    values, allowed = USES[name]
    every = [case for case in itertools.product(*values) if allowed(*case)]
    made = all_pairs(*values, allowed=allowed)
    assert set(made) <= set(every)
    assert set().union(*map(pairs_of, made)) == set().union(*map(pairs_of, every))
    for place in range(len(values)):
        assert {case[place] for case in made} == {case[place] for case in every}
    assert made == all_pairs(*values, allowed=allowed)


def test_few_cases_are_enough() -> None:
    assert len(all_pairs(range(9), range(2), range(3), range(2))) <= 30
    assert len(all_pairs(*[range(2)] * 12, range(4))) <= 16


def test_all_cases_where_they_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    given = range(3), range(2), "ab"
    monkeypatch.delenv("TASCADE_TEST_FULL", raising=False)
    assert sampled(*given) == all_pairs(*given)
    monkeypatch.setenv("TASCADE_TEST_FULL", "1")
    assert sampled(*given) == [*itertools.product(*given)]

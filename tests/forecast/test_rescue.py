"""What a trained drafter could add: bounds from the steps of a replay."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tascade.core import Generation, StepStats
from tascade.forecast.rescue import CALL, SHARES, misses, rescues

steps = st.lists(st.integers(0, 8).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n))))


def generation(drawn: list[tuple[int, int]]) -> Generation:
    made = [StepStats(drafted, taken, taken + 1, 0.0, 0.0) for drafted, taken in drawn]
    count = sum(step.committed for step in made)
    return Generation([0] * (count + 1), steps=made, forwards=len(made), stepped_tokens=count)


@given(st.lists(steps, min_size=1, max_size=6))
def test_all_rescued_is_one_step_an_output(drawn: list[list[tuple[int, int]]]) -> None:
    said = [generation(one) for one in drawn]
    curve = np.linspace(1.0, 3.0, 1 + sum(n + 1 for one in drawn for n, _ in one), dtype=np.float32)
    everything = rescues(said, curve)[-1]
    assert everything.share == 1.0
    some = [one for one in drawn if one]
    stepped = sum(made.stepped_tokens for made in said)
    assert everything.tokens_per_step == pytest.approx(stepped / max(1, len(some)))
    before = sum(float(curve[n]) for one in some for n, _ in one) + len(said)
    together = (float(curve[sum(n for n, _ in one) + len(one) - 1]) for one in some)
    after = sum(seconds + CALL for seconds in together) + len(said)
    assert everything.speedup == pytest.approx(before / after, rel=1e-4)
    for made, one in zip(said, drawn, strict=True):
        assert len(misses(made)) == max(0, len(one) - 1)
        assert all(1 <= place < len(made.tokens) - 1 for place in misses(made))


@given(st.lists(steps, min_size=1, max_size=6), st.integers(9, 40))
def test_more_rescues_never_take_more_steps(drawn: list[list[tuple[int, int]]], limit: int) -> None:
    said = [generation(one) for one in drawn]
    found = rescues(said, np.ones(limit, np.float32), 0.5)
    assert tuple(r.share for r in found) == SHARES
    rates = [r.tokens_per_step for r in found]
    assert rates == sorted(rates)
    plain = sum(m.stepped_tokens for m in said) / max(1, sum(m.forwards for m in said))
    assert rates[0] >= plain or not plain
    for r in found:
        assert r.low <= r.speedup * 1.0001
        assert r.speedup <= r.high * 1.0001


def test_a_step_stays_within_the_budget() -> None:
    said = [generation([(4, 4)] * 10)]
    assert rescues(said, np.ones(9, np.float32))[-1].tokens_per_step == 5.0  # 4 + 1 + 4 is too many
    assert rescues(said, np.ones(10, np.float32))[-1].tokens_per_step == 10.0


def test_what_ends_an_output_is_no_miss() -> None:
    assert misses(generation([(3, 3)])) == misses(generation([])) == []
    assert misses(generation([(3, 3), (2, 0), (4, 1)])) == [4, 5]  # behind the prefill's token
    once = rescues([generation([(3, 3)])], np.ones(9, np.float32))
    assert all(r.tokens_per_step == 4.0 and r.speedup < 1.0 for r in once)


def test_half_of_them_is_half_of_them() -> None:
    said = [generation([(0, 0)] * 400) for _ in range(20)]
    half = rescues(said, np.ones(1000, np.float32))[2]
    assert half.tokens_per_step == pytest.approx(2.0, rel=0.03)
    assert half.low < half.speedup < half.high

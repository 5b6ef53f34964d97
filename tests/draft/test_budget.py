"""The budget: how many nodes are worth verifying."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tascade.draft.budget import Budget
from tascade.draft.costs import SIZES, Backoff, CostTable


def budget(*seconds: float) -> Budget:
    return Budget(CostTable((1, 2, 4, 8, 16, 32, 64), seconds))


FLAT = (1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0)
STEEP = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)


def test_takes_all_when_a_step_costs_the_same_whatever_its_size() -> None:
    assert budget(*FLAT).choose(np.full(20, 0.3, np.float32)) == 20


def test_takes_none_when_every_token_costs_a_step() -> None:
    assert budget(*STEEP).choose(np.full(20, 0.5, np.float32)) == 0


def test_sees_past_a_bump_in_the_curve() -> None:
    # Two tokens cost more than eight: one node never pays here, seven do.
    bumpy = budget(1.0, 2.2, 1.9, 1.1, 3.0, 6.0, 12.0)
    assert bumpy.choose(np.full(20, 0.5, np.float32)) == 7


@given(
    survival=st.lists(st.floats(0.01, 1.0), min_size=1, max_size=40),
    steps=st.lists(st.floats(0.2, 3.0), min_size=7, max_size=7),
)
def test_chooses_the_best_rate_of_all(survival: list[float], steps: list[float]) -> None:
    s = np.sort(np.array(survival, np.float32))[::-1]
    b = budget(*np.cumsum(steps))
    chosen = b.choose(s)
    curve = b.cost.upto(len(s) + 1)
    rates = (1 + np.concatenate(([0], np.cumsum(s)))) / curve
    if chosen:
        assert rates[chosen] >= rates.max() * (1 - 1e-5)
    else:
        assert rates.max() * curve[0] <= b.margin * (1 + 1e-5)


def test_rests_longer_and_longer_where_nothing_is_proposed() -> None:
    b, asked = budget(*FLAT), []
    for step in range(200):
        if b.plan()[0]:
            asked.append(step)
            b.choose(np.empty(0, np.float32))
    gaps = np.diff(asked)
    assert gaps[0] < gaps[-1] <= b.max_pause + 1
    assert len(asked) < 20


def serve(b: Budget, steps: int, promise: float, truth: float, rng: np.random.Generator) -> int:
    """Steps in which nodes were verified, where a node's true survival is ``truth``."""
    verified = 0
    for _ in range(steps):
        limit, _ = b.plan()
        if not limit:
            continue
        survival = promise ** np.arange(1, min(limit, 12) + 1)
        chosen = b.choose(survival.astype(np.float32))
        verified += chosen > 0
        wins = rng.random(12) < truth
        accepted = min(chosen, int(wins.argmin()) if not wins.all() else 12)
        b.judge(accepted)
    return verified


def test_broken_promises_end_verification_and_kept_ones_bring_it_back() -> None:
    rng = np.random.default_rng(0)
    b = budget(1.0, 1.02, 1.05, 1.1, 1.2, 1.5, 2.0)
    assert serve(b, 100, 0.7, 0.7, rng) > 90
    serve(b, 60, 0.7, 0.0, rng)
    assert serve(b, 200, 0.7, 0.0, rng) <= 10
    serve(b, 150, 0.7, 0.7, rng)
    assert serve(b, 100, 0.7, 0.7, rng) > 90


def test_measuring_keeps_the_shape_and_drops_what_is_too_dear() -> None:
    table = CostTable.measure(lambda n: 1.0 if n < 8 else 0.3 * n, sizes=SIZES, seconds=0.001)
    assert table.seconds[0] == 1.0
    assert table.limit < SIZES[-1]
    assert table.upto(6).tolist() == [1.0] * 6


@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize("seed", range(8))
def test_a_burst_of_other_work_leaves_no_mark_on_what_was_measured(quick: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    now, bursts = 0.0, np.cumsum(rng.exponential(1.0, 8))

    def step(n: int) -> float:
        nonlocal now
        busy = bool((abs(now - bursts) < 0.25).any())
        took = (0.005 if quick else 0.05) * (1.0 + 0.05 * n) * (rng.uniform(4, 12) if busy else 1.0)
        now += took
        return float(took)

    table = CostTable.measure(step, sizes=SIZES, seconds=2.0)
    true = (1.0 + 0.05 * table.sizes) / 1.05
    assert np.allclose(table.seconds / table.seconds[0], true, rtol=0.3)


def test_a_machine_on_which_two_tokens_cost_more_than_four_is_believed() -> None:
    cost = {1: 1.0, 2: 1.6, 3: 2.0, 4: 1.4, 6: 1.6, 8: 1.6}
    table = CostTable.measure(lambda n: cost[n], sizes=tuple(cost), seconds=1.0)
    assert table.seconds.tolist() == list(cost.values())


def test_a_size_that_turns_dear_is_seen_and_a_pause_of_the_machine_is_not() -> None:
    table = CostTable((1, 8, 64), (1.0, 1.0, 1.0))
    for _ in range(200):
        table.observe(1, 0, 1.0)
        table.observe(1, 7, 2.0)
    one, *_, eight = table.upto(8)
    assert one < 1.2
    assert eight > 1.7
    before = table.upto(64).copy()
    for _ in range(20):
        table.observe(1, 0, 60.0)
    assert (table.upto(64) == before).all()


def test_a_step_between_two_sizes_that_costs_what_the_curve_says_changes_nothing() -> None:
    table = CostTable((1, 64), (1.0, 2.0))
    before = table.upto(64).copy()
    for drafted in (0, 10, 20, 40, 50) * 20:
        table.observe(1, drafted, float(before[drafted]))
    assert np.allclose(table.upto(64), before, rtol=1e-5)


def test_a_machine_that_slows_down_slows_all_sizes_down() -> None:
    table = CostTable((1, 8, 64), (1.0, 1.5, 4.0))
    for _ in range(100):
        table.observe(1, 0, 2.0)
        table.observe(1, 7, 3.0)
    assert np.allclose(table.upto(64)[[0, 7, 63]], (2.0, 3.0, 8.0), rtol=0.1)
    assert table.copy().upto(64)[63] == pytest.approx(4.0)  # as measured


def test_an_engines_table_is_learned_from_its_steps() -> None:
    table, rng = CostTable(), np.random.default_rng(0)

    def step(rows: int, drafted: int) -> float:
        return 0.010 + 0.0005 * rows + 0.0001 * drafted

    assert table.curve(4) is None
    for _ in range(400):
        rows = int(rng.integers(1, 33))
        drafted = int(rng.integers(0, 4 * rows + 1)) * int(rng.integers(0, 2))
        table.observe(rows, drafted, step(rows, drafted) * rng.uniform(0.95, 1.1))
    for rows in (1, 3, 8, 20, 32, 48):  # the last was never met
        curve = table.curve(rows)
        assert curve is not None
        for drafted in (0, rows, 3 * rows):
            assert np.interp(drafted, *curve) == pytest.approx(step(rows, drafted), rel=0.15)


def test_tries_grow_rarer_and_those_that_cost_are_made_up_for() -> None:
    def tries(lost: float, steps: int) -> list[int]:
        waits, found = Backoff(32), []
        for step in range(steps):
            if not waits.rests():
                found.append(step)
                waits.failed(lost)
        return found

    cheap = np.diff(tries(0.0, 400))
    assert list(cheap[:3]) == [2, 4, 8]
    assert cheap.max() == 33
    for lost in (2.0, 40.0):
        assert lost * (len(tries(lost, 10_000)) - 1) <= 0.02 * 10_000


class Caller:
    """A drafter that costs ``seconds`` a call and gives ``right`` of four tokens."""

    def __init__(self, seconds: float, right: int) -> None:
        self.seconds, self.right, self.calls = seconds, right, 0

    def serve(self, b: Budget, steps: int) -> float:
        """Seconds lost against plain decoding, which takes one a token."""
        lost = 0.0
        chain, none = np.full(4, 0.8, np.float32) ** np.arange(1, 5), np.empty(0, np.float32)
        for _ in range(steps):
            limit, _ = b.plan()
            offer = none
            if limit and b.worth_a_call(chain, np.full(4, self.seconds, np.float32), none):
                self.calls += 1
                lost += self.seconds
                b.called(self.seconds, none)
                offer = chain
            n = b.choose(offer) if limit else 0
            accepted = min(n, self.right)
            b.judge(accepted)
            lost += float(b.cost.upto(1 + n)[-1]) - (1 + accepted)
        return lost


def test_a_drafter_whose_calls_pay_is_called_and_one_whose_do_not_costs_little() -> None:
    curve = (1.0, 1.02, 1.05, 1.1, 1.2, 1.5, 2.0)
    good = Caller(0.5, 3)
    assert good.serve(budget(*curve), 200) < -400
    for seconds in (0.0, 0.2, 1.0, 30.0):
        bad = Caller(seconds, 0)
        assert bad.serve(budget(*curve), 2000) < 0.03 * 2000 + 2 * (seconds + 1)
    late, b = Caller(0.2, 0), budget(*curve)
    late.serve(b, 500)
    late.right = 4
    assert late.serve(b, 500) < -800


def test_a_call_is_not_made_where_what_is_there_promises_more() -> None:
    b = budget(*FLAT)
    chain, seconds = np.full(8, 0.7, np.float32) ** np.arange(1, 9), np.full(8, 0.1, np.float32)
    b.plan()
    assert b.worth_a_call(chain, seconds, np.empty(0, np.float32))
    assert not b.worth_a_call(chain, seconds, np.full(8, 0.9, np.float32))
    assert not b.worth_a_call(chain, np.full(8, 9.0, np.float32), np.full(1, 0.5, np.float32))

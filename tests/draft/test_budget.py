"""The budget: how many nodes are worth verifying."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tascade.draft.budget import SIZES, Budget, CostTable


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


def test_observing_moves_one_size_and_not_for_a_pause_of_the_machine() -> None:
    table = CostTable((1, 8, 64), (1.0, 1.0, 1.0))
    for _ in range(200):
        table.observe(8, 2.0, drift=1.0)
    assert table.seconds[1] > 1.5
    assert table.seconds[0] == table.seconds[2] == 1.0
    table.observe(1, 60.0, drift=1.0)
    assert table.seconds[0] == 1.0

"""How many guesses there are before a check."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from tascade.decode.deferral import Deferral
from tascade.decode.lacking import Lacking

PLAIN = (5.0, -0.1)


def play(
    deferral: Deferral,
    rounds: int,
    full: float,
    *,
    small: float = 1.0,
    missing: float = 0.0,
    check: Callable[[int], float] | None = None,
    seed: int = 0,
) -> list[int]:
    """Decode with steps and checks that cost this, and a share of tokens missing, whose signs are
    those of all others: how many guesses there were each time; 0 for a step with the full head.
    """
    rng, made = np.random.default_rng(seed), []
    for _ in range(rounds):
        most = deferral.plan()
        made.append(0)
        if not most:
            deferral.stepped(1, full, int(rng.random() < missing))
            continue
        sure = 1.0
        while made[-1] < most and not deferral.enough([sure] if made[-1] else []):
            deferral.guessed(1, small)
            sure *= 1 - deferral.doubt.chance(PLAIN)
            made[-1] += 1
        wrong = np.flatnonzero(rng.random(made[-1]) < missing)
        right = int(wrong[0]) if len(wrong) else made[-1]
        spent = (check or deferral.check)(made[-1])
        signs = [PLAIN] * (right + bool(len(wrong)))
        deferral.checked(signs, bool(len(wrong)), made[-1], spent)
    return made


def usual(plans: list[int]) -> int:
    """What it plans in most rounds of the last hundred."""
    return int(np.median(plans[-100:]))


def flat(rows: int) -> float:
    """A check that costs as much as three steps, and hardly more for many states."""
    return 3.0 + 0.01 * rows


def test_the_rarer_the_misses_the_more_is_guessed() -> None:
    shares = (0.0, 0.02, 0.1, 0.3, 1.0)
    plans = [usual(play(Deferral(flat, most=64), 2000, 4.0, missing=m)) for m in shares]
    assert plans[0] > 40
    assert plans == sorted(plans, reverse=True)
    assert plans[1] > plans[3]
    assert plans[-1] <= 1


def test_nothing_is_guessed_where_the_full_head_costs_next_to_nothing() -> None:
    for each in (0.001, 1.0):
        cost = lambda rows, each=each: each * rows  # noqa: E731
        plans = play(Deferral(cost, most=64), 2000, 1.0 + each, missing=0.05)
        assert plans[:6] == [0] * 6  # what a step with the full head costs is found out first
        assert sum(plan > 0 for plan in plans) < 200  # looks, ever rarer
        assert usual(plans) == 0


def test_it_guesses_again_when_misses_have_become_rare() -> None:
    deferral = Deferral(flat, most=32)
    plans = play(deferral, 2000, 4.0, missing=0.95)
    assert plans[-1000:] == [0] * 1000
    assert usual(play(deferral, 4000, 4.0)) > 4
    assert deferral.again().rate == 0.01


def test_one_slow_step_is_not_what_steps_cost() -> None:
    deferral = Deferral(flat, most=32)
    usually = usual(play(deferral, 500, 4.0, missing=0.01))
    deferral.guessed(1, 500.0)
    assert usual(play(deferral, 10, 4.0, missing=0.01)) > usually - 4 > 4


def test_a_machine_that_slows_down_slows_both_ways() -> None:
    deferral = Deferral(flat, most=32)
    for times in (1.0, 1.5, 0.7, 2.0):
        slow = lambda rows, times=times: times * flat(rows)  # noqa: E731
        plans = play(deferral, 300, 1.4 * times, small=times, check=slow)
        assert plans.count(0) < 60


def test_the_full_head_is_timed_again_now_and_then() -> None:
    deferral = Deferral(flat, most=32)
    assert usual(play(deferral, 500, 4.0)) > 8
    plans = play(deferral, 3000, 1.02)  # the full head has become cheap
    assert 3 < plans[:100].count(0) < 10
    assert plans[-300:].count(0) > 290


def test_guessing_is_tried_again_where_it_once_seemed_slow() -> None:
    deferral = Deferral(flat, most=32)
    play(deferral, 6, 2.0)
    plans = play(deferral, 1, 2.0, small=6.0)  # something else had the machine
    assert 1 < plans[0] <= 8
    plans = play(deferral, 3000, 2.0)
    assert plans[:40].count(0) >= 12
    assert plans[-100:].count(0) < 10


def test_checks_that_cost_more_than_foretold_are_done_less_often() -> None:
    plans = []
    for times in (1.0, 6.0):
        deferral = Deferral(flat, most=64)
        cost = lambda rows, times=times: times * flat(rows)  # noqa: E731
        plans.append(usual(play(deferral, 1500, 8.0, missing=0.03, check=cost)))
    assert 0 < plans[0] < plans[1]


@pytest.mark.parametrize(("missing", "guesses"), [(0.03, False), (0.001, True)])
def test_drafts_give_a_step_as_many_tokens_with_either_head(missing: float, guesses: bool) -> None:
    """A step's tokens vary far more than what the heads save: they are not to decide by chance."""
    rng = np.random.default_rng(3)
    deferral = Deferral(lambda states: 0.3 + 0.02 * states, most=32, rate=missing)
    plans = []
    for _ in range(2000):
        plans.append(deferral.plan())
        made = int(rng.integers(1, 12))
        if not plans[-1]:
            deferral.stepped(made, 5.5, int((rng.random(made) < missing).sum()))
            continue
        deferral.guessed(made, 5.0)
        while made < plans[-1]:
            step = int(rng.integers(1, 12))
            made += step
            deferral.guessed(step, 5.0)
        right = int(min(rng.geometric(missing) - 1, made))
        signs = [PLAIN] * min(right + 1, made)
        deferral.checked(signs, right < made, made, 0.3 + 0.02 * made)
    assert (np.mean(np.asarray(plans[200:]) > 0) > 0.7) == guesses
    assert (np.mean(np.asarray(plans[200:]) == 0) > 0.7) == (not guesses)


def test_what_was_lacking_longest_ago_goes_first() -> None:
    lacking = Lacking(most=3)
    lacking.add([1, 2, 3])
    lacking.saw([1, 7])
    lacking.add([4])
    assert lacking.tokens == [3, 1, 4]
    lacking.add([3, 5])
    assert lacking.tokens == [4, 3, 5]


def test_no_guesses_where_none_are_allowed() -> None:
    assert Deferral(flat, most=0).plan() == 0

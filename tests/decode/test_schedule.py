"""How many guesses there are before a check, and which of them may be misses."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from tascade.tailor.schedule import CheckSchedule, MissPredictor, logsumexp_rows

PLAIN = 5.0
Seconds = Callable[[int], float]


def flat(states: int) -> float:
    """A full head whose time hardly depends on the number of states: most is reading its rows."""
    return 3.0 + 0.01 * states


def nothing(states: int) -> float:
    return 0.0


def guesses(count: int, telling: bool, missing: float = 0.05, seed: int = 0) -> list:
    """Guesses of which a share are misses, whose logsumexp is lower where that is telling."""
    rng, made = np.random.default_rng(seed), []
    for _ in range(count):
        wrong = bool(rng.random() < missing)
        made.append((20.0 + rng.normal() - 3.0 * (wrong and telling), wrong))
    return made


def play(
    schedule: CheckSchedule, coming: list, *, small: float = 1.0, slower: float = 1.0
) -> tuple[list[int], int]:
    """Decode what is coming, steps and checks taking so long: how many guesses there were in each
    round, 0 for a step with the full head; and how many of them were behind a miss.
    """
    made, at, behind = [], 0, 0
    while at < len(coming):
        made.append(0)
        most = min(schedule.plan(), len(coming) - at)
        if not most:
            schedule.full_step()
            at += 1
            continue
        right = 1.0
        while made[-1] < most and not (made[-1] and schedule.should_check([right])):
            schedule.small_step(slower * small)
            right *= 1 - schedule.predictor.chance(coming[at + made[-1]][0])
            made[-1] += 1
        outcome = coming[at : at + made[-1]]
        wrong = next((i for i, (_, missed) in enumerate(outcome) if missed), None)
        passed = made[-1] if wrong is None else wrong + 1
        sums = [value for value, _ in outcome[:passed]]
        seconds = slower * schedule.full(made[-1])
        schedule.checked([(sums, wrong is not None)], made[-1], seconds, seconds)
        at, behind = at + passed, behind + made[-1] - passed
    return made, behind


def usual(rounds: list[int]) -> int:
    """Guesses in most of the last hundred rounds."""
    return int(np.median(rounds[-100:]))


# --- how many -----------------------------------------------------------------------------------


def test_the_rarer_the_misses_the_more_is_guessed():
    plans = []
    for missing in (0.0, 0.02, 0.1, 0.3, 1.0):
        schedule = CheckSchedule(flat, nothing, 64)
        plans.append(usual(play(schedule, guesses(6000, False, missing))[0]))
    assert plans[0] > 40
    assert plans == sorted(plans, reverse=True)
    assert plans[1] > plans[3]
    assert plans[-1] <= 1


def test_nothing_is_guessed_where_the_full_head_costs_next_to_nothing():
    for each in (0.001, 1.0):
        full: Seconds = lambda states, each=each: each * states  # noqa: E731
        rounds, _ = play(CheckSchedule(full, nothing, 64), guesses(4000, False))
        assert sum(made > 0 for made in rounds) < 200  # looks, ever more rarely
        assert usual(rounds) == 0


def test_it_guesses_again_when_misses_have_become_rare():
    schedule = CheckSchedule(flat, nothing)
    rounds, _ = play(schedule, guesses(3000, False, 0.95))
    assert rounds[-1000:].count(0) > 900
    assert usual(play(schedule, guesses(6000, False, 0.0))[0]) > 4
    assert schedule.fresh().plan() == CheckSchedule(flat, nothing).plan() > 0


def test_a_machine_that_slows_down_slows_both_ways():
    schedule = CheckSchedule(flat, nothing)
    for slower in (1.0, 1.5, 0.7, 4.0):
        coming = guesses(2000, False, 0.01, seed=int(10 * slower))
        assert play(schedule, coming, slower=slower)[0].count(0) < 200


def test_one_slow_step_or_check_is_not_what_they_cost():
    schedule = CheckSchedule(flat, nothing)
    play(schedule, guesses(2000, False, 0.01))
    schedule.small_step(100.0)
    assert usual(play(schedule, guesses(400, False, 0.01))[0]) > 4
    schedule.small_step(1.0)
    schedule.checked([([PLAIN], False)], 1, 100.0, 100.0)
    assert usual(play(schedule, guesses(400, False, 0.01))[0]) > 4


def test_going_back_is_a_cost_as_well():
    def left(rewinding: float) -> int:
        schedule, full_steps = CheckSchedule(flat, nothing), 0
        for i in range(400):
            if not schedule.plan():
                schedule.full_step()
                full_steps += 1
                continue
            for _ in range(8):
                schedule.small_step(1.0)
            missed = i % 4 == 0
            schedule.checked([([PLAIN] * 8, missed)], 8, flat(8) + rewinding * missed, flat(8))
        return full_steps

    assert left(0.0) == 0
    assert left(200.0) > 200


def test_keeping_guesses_is_a_cost_as_well():
    """A small model saves little by a small head, and keeping guesses takes time."""

    def left(beside: float) -> int:
        schedule, full_steps = CheckSchedule(flat, nothing), 0
        for _ in range(400):
            if not schedule.plan():
                schedule.full_step()
                full_steps += 1
                continue
            for _ in range(8):
                schedule.small_step(10.0, 1, beside)
            schedule.checked([([PLAIN] * 8, False)], 8, flat(8), flat(8))
        return full_steps

    assert left(0.0) == 0
    assert left(2.6) > 200


@pytest.mark.parametrize(("missing", "pays"), [(0.05, False), (0.001, True)])
def test_drafts_give_a_step_as_many_tokens_with_either_head(missing: float, pays: bool):
    """A step's tokens vary far more than what the heads save: they are not to decide by chance."""
    rng = np.random.default_rng(3)
    schedule = CheckSchedule(lambda states: 0.3 + 0.02 * states, nothing, 32, missing)
    plans = []
    for _ in range(2000):
        plans.append(schedule.plan())
        if not plans[-1]:
            schedule.full_step()
            continue
        made, right = 0, 1.0
        while made < plans[-1] and not (made and schedule.should_check([right])):
            step = int(rng.integers(1, 12))
            schedule.small_step(5.0, 12)
            right *= (1 - schedule.predictor.chance(PLAIN)) ** step
            made += step
        right_ones = int(min(rng.geometric(missing) - 1, made))
        sums = [PLAIN] * min(right_ones + 1, made)
        schedule.checked(
            [(sums, right_ones < made)], made, schedule.full(made), schedule.full(made)
        )
    assert (np.mean(np.asarray(plans[200:]) > 0) > 0.7) == pays
    assert (np.mean(np.asarray(plans[200:]) == 0) > 0.7) == (not pays)


def test_a_doubtful_guess_ends_a_round():
    """What the logsumexp tells saves guesses behind misses, and no more checks pay for it."""
    (rounds, behind), (before, blind) = (
        play(CheckSchedule(flat, nothing, 64), guesses(6000, telling, seed=3))
        for telling in (True, False)
    )
    assert behind < 0.6 * blind
    assert len(rounds) < 1.2 * len(before)


def test_of_many_requests_the_mean_counts():
    schedule = CheckSchedule(flat, nothing)
    assert not schedule.should_check([])
    assert not schedule.should_check([0.75, 0.97])
    assert schedule.should_check([0.6, 0.97])


def test_no_guesses_where_none_are_allowed():
    assert CheckSchedule(flat, nothing, 0).plan() == 0


def test_the_latest_misses_are_remembered():
    schedule = CheckSchedule(flat, nothing)
    schedule.lacked(range(300))
    schedule.lacked([50, 900])
    assert schedule.recent_misses == [*range(45, 50), *range(51, 300), 50, 900]
    assert schedule.fresh().recent_misses == []


# --- which --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_rows_logsumexp(dtype: torch.dtype, device: str):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    logits = (30 * torch.randn(5, 70, generator=torch.Generator().manual_seed(0))).to(dtype)
    logits[2, 3:] = -torch.inf
    found = logsumexp_rows(logits.to(device))
    assert found == pytest.approx(torch.logsumexp(logits.double(), -1).tolist(), rel=1e-4)


def taught(seen: list, rate: float = 0.01) -> MissPredictor:
    """What one makes of these, checked eight at a time up to the first miss."""
    predictor, coming = MissPredictor(rate), list(seen)
    while coming:
        length = next((i + 1 for i, (_, wrong) in enumerate(coming[:8]) if wrong), 8)
        checked, coming = coming[:length], coming[length:]
        predictor.learn([value for value, _ in checked], checked[-1][1])
    return predictor


def loss(chances: list[float], outcomes: list[bool]) -> float:
    """Bits that outcomes come as a surprise, each."""
    pairs = zip(chances, outcomes, strict=True)
    return -float(np.mean([math.log2(p if wrong else 1 - p) for p, wrong in pairs]))


@pytest.mark.parametrize(("telling", "most"), [(True, 0.7), (False, 1.1)])
def test_what_the_logsumexp_tells_is_learned(telling: bool, most: float):
    predictor = taught(guesses(1500, telling))
    later = guesses(2000, telling, seed=1)
    chances, outcomes = [predictor.chance(v) for v, _ in later], [wrong for _, wrong in later]
    assert loss(chances, outcomes) < most * loss([0.05] * 2000, outcomes)
    assert sum(chances) == pytest.approx(sum(outcomes), rel=0.3)  # calibrated


def test_before_anything_was_checked_the_rate_is_what_the_profile_expects():
    for value in (20.0, -5.0):
        assert MissPredictor(0.03).chance(value) == pytest.approx(0.03)
    assert 0 < MissPredictor(0.0).chance(1.0) < MissPredictor(7.0).chance(1.0) < 1


def test_what_is_no_number_is_doubtful_and_teaches_nothing():
    predictor, other = taught(guesses(300, True)), taught(guesses(300, True))
    for broken in (math.nan, math.inf, -math.inf):
        assert predictor.chance(broken) == 1.0
        predictor.learn([broken], missed=True)
    assert predictor.chance(17.0) == other.chance(17.0)


def test_equal_logsumexps_say_no_more_than_the_rate():
    predictor = MissPredictor(0.01)
    for i in range(1000):
        predictor.learn([PLAIN], missed=i % 10 == 0)
    assert predictor.chance(PLAIN) == pytest.approx(0.1, abs=0.05)

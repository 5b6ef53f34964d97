"""Which guesses may be misses."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tascade.decode.deferral import Deferral
from tascade.decode.doubt import Doubt, Signs, signs_of


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_signs_are_the_logits_own(dtype: torch.dtype, device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    logits = (30 * torch.randn(5, 70, generator=torch.Generator().manual_seed(0))).to(dtype)
    logits[2, 3:] = -torch.inf
    wide = logits.double()
    sums = torch.logsumexp(wide, -1)
    wanted = list(zip(sums.tolist(), (wide.amax(-1) - sums).tolist(), strict=True))
    for found, right in zip(signs_of(logits.to(device)), wanted, strict=True):
        assert found == pytest.approx(right, rel=1e-4, abs=1e-4)


def guesses(count: int, telling: bool, seed: int = 0) -> list[tuple[Signs, bool]]:
    """Guesses of which a twentieth are misses, whose sums are lower where signs are telling."""
    rng, made = np.random.default_rng(seed), []
    for _ in range(count):
        wrong = bool(rng.random() < 0.05)
        low = 3.0 * (wrong and telling)
        made.append(((20.0 + rng.normal() - low, -abs(rng.normal())), wrong))
    return made


def taught(seen: list[tuple[Signs, bool]], rate: float = 0.01) -> Doubt:
    """What one makes of these, checked eight at a time up to the first miss."""
    doubt, coming = Doubt(rate), list(seen)
    while coming:
        length = next((i + 1 for i, (_, wrong) in enumerate(coming[:8]) if wrong), 8)
        checked, coming = coming[:length], coming[length:]
        doubt.learn([signs for signs, _ in checked], checked[-1][1])
    return doubt


def loss(chances: list[float], outcomes: list[bool]) -> float:
    """Bits that outcomes come as a surprise, each."""
    pairs = zip(chances, outcomes, strict=True)
    return -float(np.mean([math.log2(p if wrong else 1 - p) for p, wrong in pairs]))


def test_low_sums_are_learned_to_be_misses() -> None:
    doubt = taught(guesses(800, telling=True))
    later = guesses(2000, telling=True, seed=1)
    chances, outcomes = [doubt.chance(s) for s, _ in later], [wrong for _, wrong in later]
    assert loss(chances, outcomes) < 0.7 * loss([0.05] * 2000, outcomes)
    assert sum(chances) == pytest.approx(sum(outcomes), rel=0.3)  # calibrated


def test_signs_that_tell_nothing_leave_the_rate() -> None:
    doubt = taught(guesses(1024, telling=False))
    later = guesses(2000, telling=False, seed=1)
    chances, outcomes = [doubt.chance(s) for s, _ in later], [wrong for _, wrong in later]
    assert loss(chances, outcomes) < 1.05 * loss([0.05] * 2000, outcomes)


def test_before_anything_was_checked_the_rate_is_what_the_profile_expects() -> None:
    for signs in ((20.0, -0.1), (-5.0, -3.0)):
        assert Doubt(0.03).chance(signs) == pytest.approx(0.03)
    assert 0 < Doubt(0.0).chance((1.0, -1.0)) < Doubt(7.0).chance((1.0, -1.0)) < 1


def test_signs_that_are_no_numbers_are_doubtful_and_teach_nothing() -> None:
    seen = guesses(300, telling=True)
    doubt, other = taught(seen), taught(seen)
    for broken in ((math.nan, -1.0), (math.inf, -1.0), (1.0, -math.inf)):
        assert doubt.chance(broken) == 1.0
        doubt.learn([broken], missed=True)
    for _ in range(64):
        doubt.learn([(20.0, -0.5)], missed=False)
        other.learn([(20.0, -0.5)], missed=False)
    assert doubt.chance((17.0, -0.5)) == pytest.approx(other.chance((17.0, -0.5)), abs=0.02)


def test_signs_that_are_all_alike_say_no_more_than_the_rate() -> None:
    doubt = Doubt(0.01)
    for i in range(400):
        doubt.learn([(5.0, -0.1)], missed=i % 10 == 0)
    assert doubt.chance((5.0, -0.1)) == pytest.approx(0.1, abs=0.02)


def test_what_was_long_ago_is_forgotten() -> None:
    doubt = Doubt(0.01, memory=200)
    for i in range(400):
        doubt.learn([(5.0 + i % 3, -0.1)], missed=i % 2 == 0)
    assert doubt.chance((5.0, -0.1)) > 0.3
    for i in range(200):
        doubt.learn([(5.0 + i % 3, -0.1)], missed=False)
    assert doubt.chance((5.0, -0.1)) < 0.02


def wasted(telling: bool) -> tuple[int, int]:
    """Guesses behind a miss, and checks, over 4,000 guesses or so of which a twentieth are wrong.

    A check costs a step and a half, a step with the full head twice one with the small.
    """
    deferral, coming = Deferral(lambda states: 1.5 + 0.01 * states, most=64), 0
    sequence = guesses(20_000, telling, seed=3)
    behind = checks = 0
    while coming < 4000:
        most = deferral.plan()
        if not most:
            deferral.stepped(1, 2.0, int(sequence[coming][1]))
            coming += 1
            continue
        made, sure = 0, 1.0
        while made < most and not (made and deferral.enough([sure])):
            deferral.guessed(1, 1.0)
            sure *= 1 - deferral.doubt.chance(sequence[coming + made][0])
            made += 1
        round_ = sequence[coming : coming + made]
        right = next((i for i, (_, wrong) in enumerate(round_) if wrong), made)
        taken = min(right + 1, made)
        deferral.checked([s for s, _ in round_[:taken]], right < made, made, 1.5 + 0.01 * made)
        coming, behind, checks = coming + taken, behind + made - taken, checks + 1
    return behind, checks


def test_a_doubtful_guess_ends_a_round() -> None:
    """What signs tell saves guesses behind misses, and no more checks pay for it."""
    (behind, checks), (blind, before) = wasted(telling=True), wasted(telling=False)
    assert behind < 0.6 * blind
    assert checks < 1.2 * before


def test_of_many_requests_the_mean_counts() -> None:
    deferral = Deferral(lambda states: 1.0, most=8)
    deferral._least = 0.5
    assert not deferral.enough([])
    assert not deferral.enough([0.1, 0.95])
    assert deferral.enough([0.1, 0.8])

"""Sampling: the noise, the warpers, the errors."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from tascade.decode.sampling import Sampler, SamplingParams, gumbel
from tascade.errors import ConfigError

IDS = torch.arange(4000)
PINNED = [0.0563340427801246, 1.0365257378842194, -1.1199938042896644]


def noise(seed, position, ids=IDS):
    return gumbel(seed, position, ids).numpy()


@given(st.integers(-(2**70), 2**70), st.integers(0, 10**6), st.permutations(list(range(20))))
def test_noise_depends_on_seed_position_and_id_alone(seed, position, order):
    together = noise(seed, position, torch.arange(20))
    assert np.array_equal(noise(seed, position, torch.tensor(order)), together[order])
    assert noise(seed, position, torch.tensor([7]))[0] == together[7]
    assert np.isfinite(together).all()


def test_noise_is_the_same_on_every_machine():
    assert noise(42, 3, torch.tensor([0, 1, 151_000])).tolist() == pytest.approx(PINNED, abs=1e-12)


@pytest.mark.parametrize("axis", ["id", "position", "seed"])
def test_noise_is_gumbel_along_every_axis(axis):
    n = 20_000
    if axis == "id":
        values = noise(5, 17, torch.arange(n))
    elif axis == "position":
        values = np.concatenate([noise(5, p, IDS[:20]) for p in range(n // 20)])
    else:
        values = np.concatenate([noise(s, 3, IDS[:20]) for s in range(n // 20)])
    assert stats.kstest(values, "gumbel_r").pvalue > 0.001


@pytest.mark.parametrize("lag", [1, 2, 64, 1024])
def test_neighbours_are_not_correlated(lag):
    base = noise(9, 100)
    pairs = {
        "position": noise(9, 100 + lag),
        "seed": noise(9 + lag, 100),
        "id": noise(9, 100, IDS + lag),
        "seed for position": noise(100, 9),
        "diagonal": noise(9, 100 + lag, IDS + lag),
    }
    for name, other in pairs.items():
        ranks = stats.spearmanr(base, other)
        assert ranks.pvalue > 0.0005, name
        assert not np.array_equal(base, other), name


def test_greedy_is_argmax_and_sampling_at_almost_zero_is_too():
    logits = torch.randn(50, generator=torch.Generator().manual_seed(0))
    empty = torch.empty(1, 0, dtype=torch.long)
    greedy = Sampler(SamplingParams())
    cold = Sampler(SamplingParams(temperature=1e-4))
    assert greedy.is_argmax
    assert not cold.is_argmax
    assert greedy.choose(logits, empty, 0) == cold.choose(logits, empty, 0) == int(logits.argmax())


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        ({"top_k": 3}, {0, 1, 2}),
        ({"top_p": 0.6}, {0, 1}),
        ({"min_p": 0.4}, {0, 1}),
        ({"top_k": 3, "top_p": 0.3}, {0}),
    ],
)
def test_nothing_is_drawn_outside_the_warpers_choice(fields, kept):
    logits = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05]).log()
    empty = torch.empty(1, 0, dtype=torch.long)
    drawn = {
        Sampler(SamplingParams(temperature=1.0, seed=s, **fields)).choose(logits, empty, 0)
        for s in range(200)
    }
    assert drawn == kept


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", 1.0),
        ("min_p", -0.5),
        ("repetition_penalty", 0.0),
        ("max_new_tokens", 0),
        ("stop", ("a", "")),
    ],
)
def test_values_out_of_range_are_named(field, value):
    with pytest.raises(ConfigError, match=f"{field} is out of range"):
        SamplingParams(**{field: value})

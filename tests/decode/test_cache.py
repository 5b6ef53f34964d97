"""The rewindable cache against plain concatenation and gathering."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tascade.decode.cache import RewindableCache

LAYERS, HEADS, DIM = 2, 2, 3


def states(rng: torch.Generator, n: int) -> torch.Tensor:
    return torch.randn(1, HEADS, n, DIM, generator=rng)


@st.composite
def steps(draw):
    """What a step brings, and which of its slots are kept."""
    n = draw(st.integers(1, 60))
    first = draw(st.integers(1, n))
    kept = sorted(draw(st.sets(st.integers(0, n - first - 1), max_size=12))) if first < n else []
    return n, first, kept


@settings(max_examples=80)
@given(st.lists(steps(), min_size=1, max_size=25), st.integers(0, 9))
def test_keep_truncate_and_growth_equal_a_naive_gather(script, seed):
    rng = torch.Generator().manual_seed(seed)
    cache = RewindableCache()
    naive = [(torch.empty(1, HEADS, 0, DIM), torch.empty(1, HEADS, 0, DIM))] * LAYERS
    for n, first, kept in script:
        base = cache.length + first
        for layer in range(LAYERS):
            keys, values = states(rng, n), states(rng, n)
            seen = cache.update(keys, values, layer)
            old = naive[layer]
            full = (torch.cat([old[0], keys], 2), torch.cat([old[1], values], 2))
            assert all(torch.equal(a, b) for a, b in zip(seen, full, strict=True))
            rows = [*range(base), *(base + slot for slot in kept)]
            naive[layer] = (full[0][:, :, rows], full[1][:, :, rows])
        cache.keep(base, kept)
        assert cache.length == base + len(kept) == cache.get_seq_length()
        for layer, (keys, values) in zip(cache.layers, naive, strict=True):
            assert torch.equal(layer.keys[:, :, : layer.length], keys)
            assert torch.equal(layer.values[:, :, : layer.length], values)


def test_buffers_survive_requests_and_grow_by_doubling():
    cache = RewindableCache()
    assert cache.length == 0
    rng = torch.Generator().manual_seed(0)
    cache.update(states(rng, 5), states(rng, 5), 0)
    layer = cache.layers[0]
    buffer = layer.keys.data_ptr()
    cache.truncate(0)
    cache.update(states(rng, 512), states(rng, 512), 0)
    assert layer.keys.data_ptr() == buffer
    cache.update(states(rng, 1), states(rng, 1), 0)
    assert layer.keys.shape[2] == 1024
    assert layer.get_mask_sizes(3) == (516, 0)
    layer.crop(-13)
    assert layer.get_seq_length() == 500
    layer.reset()
    assert (layer.length, layer.keys.shape[2], layer.get_max_length()) == (0, 1024, -1)


def test_a_chain_in_place_moves_nothing():
    cache = RewindableCache()
    rng = torch.Generator().manual_seed(0)
    cache.update(states(rng, 10), states(rng, 10), 0)
    before = cache.layers[0].keys._version
    cache.keep(4, [0, 1, 2])
    assert cache.layers[0].keys._version == before
    assert cache.length == 7


@pytest.mark.parametrize("kept", [[], [5], [1, 2, 5], [0, 3]])
def test_values_may_be_narrower_than_keys(kept):
    cache = RewindableCache()
    keys, values = torch.randn(1, 2, 8, 4), torch.randn(1, 1, 8, 2)
    cache.update(keys, values, 0)
    cache.keep(2, kept)
    rows = [0, 1, *(2 + k for k in kept)]
    layer = cache.layers[0]
    assert torch.equal(layer.keys[:, :, : layer.length], keys[:, :, rows])
    assert torch.equal(layer.values[:, :, : layer.length], values[:, :, rows])

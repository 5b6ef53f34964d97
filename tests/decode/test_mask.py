"""Tree masks against a brute-force walk over ancestors and window."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tascade.decode import mask as mask_module
from tascade.decode.mask import MaskBuilder, ancestors, depths

CPU = torch.device("cpu")
BLOCKED = torch.finfo(torch.float32).min


@st.composite
def parents(draw):
    n = draw(st.integers(0, 16))
    return np.asarray([draw(st.integers(-1, i - 1)) for i in range(n)], np.int32)


def line(tree, node):
    """The node and its ancestors, nearest first."""
    out = []
    while node >= 0:
        out.append(node)
        node = int(tree[node])
    return out


def by_hand(past, tree, window):
    """Mask of the last committed token and the nodes of a tree: who is within whose past."""
    n = 1 + len(tree)
    rows = torch.full((n, past + n), BLOCKED)
    for node in range(-1, len(tree)):
        path = [*range(past + 1), *(past + 1 + a for a in reversed(line(tree, node)))]
        for column in path[-window:] if window else path:
            rows[node + 1, column] = 0
    return rows


@given(parents())
def test_depths_and_ancestors(tree):
    seen = ancestors(tree)
    for node in range(len(tree)):
        assert depths(tree)[node] == len(line(tree, node))
        assert sorted(line(tree, node)) == np.flatnonzero(seen[node]).tolist()


@settings(max_examples=150)
@given(parents(), st.integers(0, 30), st.sampled_from([None, 1, 2, 5, 17]))
def test_a_tree_mask_is_its_ancestors_within_the_window(tree, past, window):
    rows = MaskBuilder(torch.float32, CPU, window).tree(past, ancestors(tree), depths(tree))
    assert rows.shape == (1, 1, 1 + len(tree), past + 1 + len(tree))
    assert torch.equal(rows[0, 0], by_hand(past, tree, window))


@given(st.integers(0, 40), st.integers(1, 20), st.sampled_from([None, 1, 3, 12]))
def test_a_causal_mask_is_the_mask_of_a_chain(past, n, window):
    chain = np.arange(-1, n - 2, dtype=np.int32)
    rows = MaskBuilder(torch.float32, CPU, window).causal(past, n)
    assert torch.equal(rows[0, 0], by_hand(past, chain, window))


@pytest.mark.parametrize("window", [None, 7])
def test_long_and_short_causal_masks_agree(monkeypatch, window):
    short = MaskBuilder(torch.float32, CPU, window)
    wanted = {(p, n): short.causal(p, n).clone() for p, n in [(0, 9), (30, 1), (600, 5), (3, 700)]}
    monkeypatch.setattr(mask_module, "_TRIANGLE", 4)
    for (past, n), rows in wanted.items():
        assert torch.equal(MaskBuilder(torch.float32, CPU, window).causal(past, n), rows)


def test_memory_of_a_long_context_is_one_row_a_token():
    builder = MaskBuilder(torch.float32, CPU)
    assert builder.causal(100_000, 2).shape == (1, 1, 2, 100_002)
    assert builder._triangle.numel() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_blocked_stays_finite_in_every_dtype(dtype):
    for rows in (
        MaskBuilder(dtype, CPU, 3).causal(5, 4),
        MaskBuilder(dtype, CPU, 3).tree(5, ancestors(np.asarray([-1, -1])), np.asarray([1, 1])),
    ):
        assert rows.dtype == dtype
        assert bool(torch.isfinite(rows).all())

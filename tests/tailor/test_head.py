"""The tailored head: rows come and go, and nothing of a request stays."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tascade.decode.lm_head import SmallLogits
from tascade.decode.sampling import argmax_of, argmax_rows
from tascade.errors import ConfigError
from tascade.tailor.head import RequestHead
from tascade.tailor.offload.table import RowTable

V, D = 5000, 24


def table(dtype: torch.dtype = torch.float32) -> RowTable:
    rows = torch.randn(V, D, generator=torch.Generator().manual_seed(1))
    return RowTable.from_tensor(rows.to(dtype))


def states(n: int = 3, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(n, D, generator=torch.Generator().manual_seed(2)).to(dtype)


def wide(head: RequestHead, hidden: torch.Tensor) -> torch.Tensor:
    return head.spread(head(hidden))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("biased", [False, True])
def test_logits_by_token_id_are_the_full_heads(dtype: torch.dtype, biased: bool) -> None:
    full, kept = table(dtype), [4999, 7, 7, 0, 311]
    bias = torch.arange(V, dtype=dtype) / V if biased else None
    head = RequestHead(full, kept, bias=bias)
    head.begin(np.asarray([12, 7, 4998], np.int32))
    wanted = torch.nn.functional.linear(states(dtype=dtype), full.rows, bias)
    found = wide(head, states(dtype=dtype))
    has = sorted({*kept, 12, 4998})
    assert sorted(head.union.ids.tolist()) == has
    torch.testing.assert_close(found[:, has], wanted[:, has].float(), rtol=1e-2, atol=1e-2)
    rest = np.setdiff1d(np.arange(V), has)
    assert (found[:, rest] == -torch.inf).all()


def test_a_request_costs_the_rows_it_adds_and_the_next_one_nothing() -> None:
    full = table()
    head = RequestHead(full, range(3000))
    assert full.rows_read == 3000
    head.begin(np.arange(2900, 3400, dtype=np.int32))
    rows = head.union._rows
    buffers = rows.matrix.data_ptr(), rows.ids.data_ptr()
    for turn in range(5):
        before = full.rows_read
        head.begin(np.arange(2900 + turn, 3400 + turn, dtype=np.int32))
        assert full.rows_read - before <= 1  # the others lie where they lay
        assert head.extend([3399 + turn, 3400 + turn, 3401 + turn, 5]) == 2
        assert full.rows_read - before <= 3
        assert head.union.length == 3402 + turn
    head.begin(np.empty(0, np.int32))
    assert head.union.length == head.union.static == 3000
    found = rows.matrix.data_ptr(), rows.ids.data_ptr()
    assert found == buffers  # nothing was allocated
    assert 3400 not in head
    assert 2999 in head


def test_more_rows_than_there_was_room_for() -> None:
    full = table()
    head = RequestHead(full, [1, 2])
    head.begin(np.arange(0, V, dtype=np.int32))
    wanted = states() @ full.rows.T
    torch.testing.assert_close(wide(head, states()), wanted)
    head.begin(np.asarray([3], np.int32))
    assert sorted(head.union.ids.tolist()) == [1, 2, 3]


def test_room_grows_with_what_requests_bring_and_not_with_the_list() -> None:
    head = RequestHead(table(), range(4000))
    head.begin(np.arange(4000, 4200, dtype=np.int32))
    rows = head.union._rows
    assert 4200 <= rows.capacity < 4600
    before = rows.matrix.data_ptr()
    head.begin(np.arange(4100, 4300, dtype=np.int32))
    assert rows.matrix.data_ptr() == before


@pytest.mark.parametrize("bad", [[-1], [V], [3, V + 7]])
def test_an_id_that_is_not_of_the_table_changes_nothing(bad: list[int]) -> None:
    head = RequestHead(table(), [1, 2])
    with pytest.raises(ConfigError, match="not of this vocabulary"):
        head.extend(bad)
    assert head.union.ids.tolist() == [1, 2]
    assert 3 not in head
    with pytest.raises(ConfigError, match="not of this vocabulary"):
        RequestHead(table(), bad)


def test_what_lies_in_the_room_is_not_seen() -> None:
    head = RequestHead(table(), [1, 2])
    head.begin(np.asarray([70], np.int32))
    high = wide(head, states())[:, 70]
    head.begin(np.asarray([71], np.int32))
    assert (wide(head, states())[:, 70] == -torch.inf).all()
    assert (high > -torch.inf).all()


def test_room_made_while_checking_serves_later_requests_too() -> None:
    # A check runs in inference mode, whose tensors nobody outside may write to.
    head = RequestHead(table(), [1, 2])
    with torch.inference_mode():
        head.extend(np.arange(2000))
    head.begin(np.asarray([3, 4], np.int32))
    assert sorted(head.union.ids.tolist()) == [1, 2, 3, 4]
    torch.testing.assert_close(wide(head, states())[:, 1:5], (states() @ table().rows.T)[:, 1:5])


def test_a_bias_that_is_a_parameter_is_not_recorded_for_a_backward_pass() -> None:
    bias = torch.nn.Parameter(torch.arange(V, dtype=torch.float32))
    head = RequestHead(table(), [1, 2], bias=bias)
    for _ in range(3):
        head.begin(np.arange(50, dtype=np.int32))
    assert not head(states()).requires_grad


def test_of_a_small_heads_logits_rows_are_widened_one_by_one() -> None:
    head = RequestHead(table(), [9, 1, 2, 4000])
    head.begin(np.asarray([70, 9], np.int32))
    values = head(states(6))
    values[3, :] = 1.0  # all equal: the lowest id
    rows = SmallLogits(head, values)
    wanted = head.spread(values)
    assert len(rows) == 6
    assert all(torch.equal(rows[i], wanted[i]) for i in (0, 3, 5, -1))
    assert rows.argmax_rows() == argmax_rows(wanted)
    best = argmax_of(rows)
    assert [best(i) for i in range(6)] == argmax_rows(wanted)
    assert best(3) == 1

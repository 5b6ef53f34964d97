"""The rows of a table, bit by bit, wherever it lies."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from tascade.errors import ConfigError
from tascade.tailor.offload.checkpoint import WEIGHTS
from tascade.tailor.offload.table import RowTable

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BITS = {4: torch.int32, 2: torch.int16}
V, D = 700, 12


def noise(dtype: torch.dtype, rows: int = V, seed: int = 0) -> torch.Tensor:
    """Every bit pattern may occur, NaNs among them."""
    kind = BITS[dtype.itemsize]
    limits = torch.iinfo(kind)
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(limits.min, limits.max, (rows, D), generator=draw, dtype=kind).view(dtype)


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal in every bit."""
    assert one.dtype == other.dtype
    kind = BITS[one.element_size()]
    return torch.equal(one.contiguous().view(kind), other.contiguous().view(kind))


@pytest.fixture(params=DTYPES, ids=str)
def both(request, tmp_path):
    """A tensor, and tables over it: mapped from a checkpoint, and in memory."""
    rows = noise(request.param)
    odd = torch.ones(3, dtype=torch.uint8)  # shifts what follows off every boundary but its own
    save_file({"a": torch.ones(5, 2), "table": rows, "z": odd}, tmp_path / WEIGHTS)
    return rows, [RowTable.from_checkpoint(tmp_path, "table"), RowTable.from_tensor(rows)]


def test_rows_are_those_of_the_checkpoint_bit_by_bit(both):
    rows, tables = both
    ids = torch.tensor([3, V - 1, 0, 3, 699, 5])
    for table in tables:
        assert (table.shape, table.dtype, table.nbytes) == ((V, D), rows.dtype, rows.nbytes)
        for given_ids in (ids, ids.tolist(), ids.numpy(), ids.to(torch.int32), tuple(ids.tolist())):
            assert same(table.gather(given_ids), rows[ids])
        out = torch.zeros(6, D, dtype=rows.dtype)
        assert table.gather(ids, out) is out
        assert same(out, rows[ids])
        assert same(table.gather([]), rows[:0])
        assert same(table.rows, rows)


@given(ids=st.lists(st.integers(0, V - 1), max_size=40))
def test_any_ids_give_their_rows(ids):
    rows = noise(torch.bfloat16)
    table = RowTable.from_tensor(rows)
    assert same(table.gather(ids), rows[ids] if ids else rows[:0])
    assert table.rows_read == len(ids)


def test_rows_are_counted_and_a_copy_is_a_copy(both):
    rows, tables = both
    for table in tables:
        got = table.gather([1, 1, 2])
        got.zero_()
        assert same(table.gather([1, 2]), rows[[1, 2]])
        assert table.rows_read == 5


@pytest.mark.parametrize(
    "ids",
    [
        [-1],
        [V],
        [0, 1, V],
        [0, -V],
        [1 << 40],
        [1 << 70],
        [0.0],
        [True],
        ["0"],
        [[0, 1]],
        [[0], [0, 1]],
        3,
        np.array([2**63], np.uint64),
        torch.tensor([0, -1]),
    ],
    ids=str,
)
def test_bad_ids_are_refused_and_nothing_is_read(both, ids):
    for table in both[1]:
        with pytest.raises(ConfigError, match=f"0 to {V - 1}"):
            table.gather(ids)
        assert table.rows_read == 0


def test_an_out_that_does_not_fit_is_refused(both):
    rows, tables = both
    other = torch.float16 if rows.dtype != torch.float16 else torch.float32
    for table in tables:
        for out in (
            torch.empty(1, D, dtype=rows.dtype),
            torch.empty(2, D, dtype=other),
            torch.empty(D, 2, dtype=rows.dtype).t(),
            torch.empty(2, D, dtype=rows.dtype, device="meta"),
        ):
            with pytest.raises(ConfigError, match="out"):
                table.gather([0, 1], out)


@pytest.mark.parametrize("size", [1, 7, 100, V, V + 1])
def test_blocks_are_views_of_all_rows(both, size):
    rows, tables = both
    for table in tables:
        at = 0
        for start, block in table.blocks(size):
            assert start == at
            assert len(block) <= size
            assert block.data_ptr() == table.rows[start:].data_ptr()
            assert same(block, rows[start : start + size])
            at += len(block)
        assert at == V
        with pytest.raises(ConfigError):
            next(table.blocks(0))


def test_a_table_cannot_be_written_into_its_file(tmp_path):
    save_file({"table": noise(torch.float16)}, tmp_path / WEIGHTS)
    before = (tmp_path / WEIGHTS).read_bytes()
    RowTable.from_checkpoint(tmp_path, "table").rows.zero_()
    assert (tmp_path / WEIGHTS).read_bytes() == before


def test_what_cannot_be_a_table_is_refused():
    for tensor in (
        torch.ones(3),
        torch.ones(3, 2, 2),
        torch.ones(0, 2),
        torch.ones(3, 2, dtype=torch.int8),
        torch.ones(3, 2, dtype=torch.float64),
        torch.ones(2, 3).t(),
        torch.ones(3, 2, device="meta"),
    ):
        with pytest.raises(ConfigError, match="vocabulary table"):
            RowTable.from_tensor(tensor)


def test_a_deep_copy_shares_the_rows():
    table = RowTable.from_tensor(noise(torch.float32))
    assert copy.deepcopy({"table": table})["table"] is table

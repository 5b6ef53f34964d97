"""The self-test of half precision: which planted ways of rounding it lets count as alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tascade.decode.row_counts import KEY_BLOCK, TESTED, RowCounts, row_counts


class Model:
    """What the self-test asks of one."""

    dtype = torch.bfloat16

    def __init__(self, room: int = 4096) -> None:
        text = SimpleNamespace(vocab_size=50, max_position_embeddings=room)
        self.config: Any = SimpleNamespace(
            _attn_implementation="sdpa", get_text_config=lambda: text
        )


def rounding(by: Callable[[int, int], float]) -> Any:
    """Logits that shift by what is given of the rows of a pass and the keys that it shows."""

    def logits(ids: list[int], past: int, counts: Sequence[int]) -> dict[int, torch.Tensor]:
        rows = torch.tensor(ids[past:], dtype=torch.float32)[:, None].expand(-1, 3)
        keys = {n: -(-(past + n) // KEY_BLOCK) * KEY_BLOCK for n in counts}
        return {n: rows[:n] + by(n, keys[n]) for n in counts}

    return logits


def test_where_nothing_matters_all_counts_agree() -> None:
    assert row_counts(Model(), rounding(lambda n, keys: 0.0)) == RowCounts(TESTED)


def test_counts_from_another_kernel_on_are_left_out() -> None:
    found = row_counts(Model(), rounding(lambda n, keys: float(n > 24)))
    assert found == RowCounts(tuple(n for n in TESTED if n <= 24))
    found = row_counts(Model(), rounding(lambda n, keys: float(n < 4)))
    assert found == RowCounts(TESTED[1:])


@pytest.mark.parametrize("from_keys", [96, 224, 288, 416, 544, 1056])
def test_where_the_number_of_keys_matters_nothing_is_promised(from_keys: int) -> None:
    """As on CPUs without instructions for bfloat16: from 224 keys on in one case that was met."""
    assert row_counts(Model(), rounding(lambda n, keys: float(keys >= from_keys))) is None


def test_a_model_with_little_room_is_looked_at_as_far_as_it_goes() -> None:
    tight = Model(room=100)
    assert row_counts(tight, rounding(lambda n, keys: float(keys >= 224))) == RowCounts(TESTED)
    assert row_counts(Model(room=32), rounding(lambda n, keys: 0.0)) is None

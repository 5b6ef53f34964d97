"""What a list of tokens is said to save, against heads and models as they are."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tascade.core import IntArray
from tascade.tailor.counts import Row, count_documents
from tascade.tailor.head import BatchHead, RequestHead
from tascade.tailor.offload.table import RowTable
from tascade.tailor.profile import Profile, build_profile
from tascade.tailor.savings import head_savings
from tascade.testing import byte_tokenizer, tiny_model

V = 2000


def ids(*numbers: int) -> IntArray:
    return np.asarray(numbers, np.int32)


def profile(held_out: list[Row] | None = None) -> Profile:
    rows: list[Row] = [(ids(300, 301), ids(300, 400, 401)), (None, ids(402))]
    return build_profile(
        count_documents(rows), byte_tokenizer(), (256,), vocab_size=V, held_out=held_out
    )


def real_head(model: Any, made: Profile, prompt: IntArray) -> BatchHead:
    full = model.get_output_embeddings()
    table = RowTable.from_tensor(full.weight.detach())
    head = RequestHead(table, made.ids, bias=full.bias, dtype=model.dtype)
    head.begin(prompt)
    return head.union


@pytest.mark.parametrize(("family", "tied"), [("llama", False), ("llama", True), ("phi", False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_those_of_the_model_and_of_a_real_head(
    family: str, tied: bool, dtype: torch.dtype
) -> None:
    model = tiny_model(family, vocab_size=V, tie_word_embeddings=tied).to(dtype)
    made = profile()
    gain = head_savings(model, made, [(ids(5, 300, 1999), ids(400))])
    table = model.get_input_embeddings().weight
    assert gain.full_bytes == (1 if tied else 2) * V * table.shape[1] * dtype.itemsize
    assert gain.model_bytes == sum(p.numel() for p in model.parameters()) * dtype.itemsize
    assert gain.tailored_bytes == real_head(model, made, ids(5, 300, 1999)).nbytes
    rest = gain.model_bytes - gain.full_bytes + gain.tailored_bytes
    assert gain.model_saved == pytest.approx(1 - rest / gain.model_bytes)
    assert 0 < gain.model_saved < gain.saved == 1 - gain.tailored_bytes / gain.full_bytes


def test_room_that_prompts_need_is_counted() -> None:
    model, made = tiny_model("llama", vocab_size=V), profile()
    long, short = np.arange(500, 1400, dtype=np.int32), ids(300)
    rare = [(short, ids(400))] * 96 + [(long, ids(400))] * 4
    usual = [(short, ids(400))] * 90 + [(long, ids(400))] * 10
    few, many = (head_savings(model, made, rows) for rows in (rare, usual))
    assert (few.prompt_most, many.prompt_most) == (1, 900)
    assert few.prompt_mean == pytest.approx(0.96 + 0.04 * 900)
    assert many.tailored_bytes == real_head(model, made, long).nbytes > 1.5 * few.tailored_bytes


def test_what_prompts_bring_is_what_the_list_has_not() -> None:
    model = tiny_model("llama", vocab_size=V)
    # 300 is only ever the prompt's own, 400 is listed, and bytes are in every list.
    rows: list[Row] = [(ids(300, 300, 301, 400, 65), ids(402)), (None, ids(403)), (ids(7), ids(9))]
    gain = head_savings(model, profile(rows), rows)
    found = gain.to_json()
    assert found["prompt_tokens"] == {"mean": 1.0, "p95": 2}
    assert found["held_out_missing_per_answer"] == pytest.approx(1 / 3)
    assert "adds 1.0 more on average, 2 or fewer in 95%" in gain.describe()
    alone = head_savings(model, profile(), [(None, ids(403))])
    assert alone.to_json()["prompt_tokens"] is None
    assert alone.to_json()["held_out_covered"] is None
    assert "adds" not in alone.describe()
    assert "held out" not in alone.describe()

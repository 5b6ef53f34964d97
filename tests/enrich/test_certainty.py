"""Decisions are found where the model was not sure, and no new token reaches over them."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from tascade.core import IntArray
from tascade.enrich.tokens.boundaries import firm_shares
from tascade.enrich.tokens.merger import Merger, pieces
from tascade.enrich.train.samples import Pair, merged
from tascade.enrich.uncertain import decisions
from tascade.testing import tiny_model

PROMPT = np.array([3, 4], np.int32)


def ids(*tokens: int) -> IntArray:
    return np.array(tokens, np.int32)


def test_decisions_are_tokens_the_model_found_unlikely() -> None:
    model = tiny_model("llama")
    rng = np.random.default_rng(0)
    rows: list[Pair] = []
    for length in (3, 5, 4):
        prompt, answer = rng.integers(3, 96, 4), rng.integers(3, 96, length)
        rows.append((prompt.astype(np.int32), answer.astype(np.int32)))
    for least in (0.0, 0.005, 0.02, 1.1):
        wanted = []
        for prompt, answer in rows:
            assert prompt is not None
            with torch.inference_mode():
                row = torch.tensor([[*prompt.tolist(), *answer.tolist()]])
                said = model(input_ids=row).logits[0].softmax(-1)
            at = range(1, len(answer))
            wanted.append([i for i in at if said[len(prompt) + i - 1, answer[i]] < least])
        assert [found.tolist() for found in decisions(model, rows, least, 64)] == wanted


def test_rows_that_cannot_be_asked_have_no_decisions() -> None:
    rows: list[Pair] = [(None, ids(1, 2, 3)), (PROMPT, ids(*range(3, 20))), (PROMPT, ids(7, 8, 9))]
    found = decisions(tiny_model("llama"), rows, 1.1, 9)
    assert [places.tolist() for places in found] == [[], [], [1, 2]]


answers = st.lists(st.integers(0, 4), min_size=1, max_size=12)


@given(answers, st.sets(st.integers(1, 11)))
def test_no_token_of_a_sample_reaches_over_a_cut(answer: list[int], cuts: set[int]) -> None:
    merger = Merger([(0, 1), (1, 2, 3), (0, 1, 2, 3), (4, 4)], 5)
    places = np.array(sorted(c for c in cuts if c < len(answer)), np.int32)
    (sample,) = merged([(PROMPT, ids(*answer))], merger, 64, [places])
    assert merger.unmerge(sample.answer).tolist() == answer
    assert set(places.tolist()) <= set(sample.starts.tolist())
    free = merger.merge(ids(*answer))
    assert len(sample.answer) >= len(free)
    assert [p.tolist() for p in pieces(ids(*answer), ids())] == [answer]


def test_a_token_is_as_firm_as_its_places_are() -> None:
    merger = Merger([(0, 1), (2, 3, 4), (9, 9)], 10)
    said = [ids(0, 1, 2, 3, 4), ids(0, 1, 5), ids(0, 1), ids(2, 3, 4)]
    cuts = [ids(2, 4), ids(1), ids(), ids()]
    # A cut before a token is no cut inside: of (0, 1) one of three places, of (2, 3, 4) one of two.
    assert np.allclose(firm_shares(merger, said, cuts), [2 / 3, 1 / 2, 1.0])

"""Boundaries: where the model is uncertain or the prompt decides; no new token reaches over."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from tascade.core import IntArray
from tascade.enrich.boundaries import NgramModel, boundary_free_shares, uncertain_positions
from tascade.enrich.tokens.merger import TokenMerger, split_at
from tascade.enrich.train.samples import Pair, make_samples
from tascade.testing import tiny_model

PROMPT = np.array([3, 4], np.int32)


def ids(*tokens: int) -> IntArray:
    return np.array(tokens, np.int32)


def test_uncertain_positions_are_tokens_the_model_found_unlikely() -> None:
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
        assert [found.tolist() for found in uncertain_positions(model, rows, least, 64)] == wanted


def test_rows_that_cannot_be_asked_have_no_uncertain_positions() -> None:
    rows: list[Pair] = [(None, ids(1, 2, 3)), (PROMPT, ids(*range(3, 20))), (PROMPT, ids(7, 8, 9))]
    found = uncertain_positions(tiny_model("llama"), rows, 1.1, 9)
    assert [places.tolist() for places in found] == [[], [], [1, 2]]


answers = st.lists(st.integers(0, 4), min_size=1, max_size=12)


@given(answers, st.sets(st.integers(1, 11)))
def test_no_token_of_a_sample_reaches_over_a_boundary(answer: list[int], cuts: set[int]) -> None:
    merger = TokenMerger([(0, 1), (1, 2, 3), (0, 1, 2, 3), (4, 4)], 5)
    places = np.array(sorted(c for c in cuts if c < len(answer)), np.int32)
    (sample,) = make_samples([(PROMPT, ids(*answer))], merger, 64, [places])
    assert merger.unmerge(sample.answer).tolist() == answer
    lengths = merger.lengths_of(sample.answer)
    assert set(places.tolist()) <= set((np.cumsum(lengths) - lengths).tolist())
    free = merger.merge(ids(*answer))
    assert len(sample.answer) >= len(free)
    assert [p.tolist() for p in split_at(ids(*answer), ids())] == [answer]


def test_the_share_of_places_without_a_boundary() -> None:
    merger = TokenMerger([(0, 1), (2, 3, 4), (9, 9)], 10)
    said = [ids(0, 1, 2, 3, 4), ids(0, 1, 5), ids(0, 1), ids(2, 3, 4)]
    cuts = [ids(2, 4), ids(1), ids(), ids()]
    # A boundary before a token is none inside: of (0, 1) 1 of 3 places, of (2, 3, 4) 1 of 2.
    assert np.allclose(boundary_free_shares(merger, said, cuts), [2 / 3, 1 / 2, 1.0])


FORM = [5, 6, 7]


def answer(value: int) -> IntArray:
    """A form with a value of two tokens in it."""
    return np.array([*FORM, 20 + value, 40 + value, *FORM], np.int32)


def test_the_prompts_part_is_left_to_the_prompt_and_the_rest_is_form() -> None:
    answers = [answer(i % 5) for i in range(60)]
    known = NgramModel(answers)
    # The value's second token follows from its first, and the form from the form.
    assert known.unlikely_positions(answers[0], 0.7, counted=True).tolist() == [3]
    assert known.unlikely_positions(answer(2), 0.7, counted=False).tolist() == [3]
    assert known.unlikely_positions(answers[0], 0.1, counted=True).tolist() == []
    assert known.unlikely_positions(answers[0], 1.1, counted=True).tolist() == list(range(1, 8))


def test_an_answer_does_not_foretell_itself() -> None:
    lone = np.array([1, 2, 3, 4], np.int32)
    known = NgramModel([lone])
    assert known.unlikely_positions(lone, 0.5, counted=True).tolist() == [1, 2, 3]
    assert known.unlikely_positions(lone, 0.5, counted=False).tolist() == []


def test_a_rare_long_context_does_not_hide_a_common_short_one() -> None:
    common = [np.array([i, 1, 2], np.int32) for i in range(30, 60)]
    rare = np.array([70, 1, 3], np.int32)
    known = NgramModel([*common, rare])
    assert known.unlikely_positions(rare, 0.5, counted=True).tolist() == [1, 2]
    assert known.unlikely_positions(common[0], 0.5, counted=True).tolist() == [1]


@given(st.lists(st.lists(st.integers(0, 4), max_size=12), max_size=30), st.floats(0, 1))
def test_more_is_left_to_the_prompt_the_more_is_asked(
    answers: list[list[int]], least: float
) -> None:
    arrays = [np.array(ids, np.int32) for ids in answers]
    known = NgramModel(arrays)
    for ids in arrays:
        found = known.unlikely_positions(ids, least, counted=True)
        assert 0 not in found
        assert set(found) <= set(known.unlikely_positions(ids, 1.0, counted=True))
        assert known.unlikely_positions(ids, 0.0, counted=True).tolist() == []

"""What other answers foretell, and what they leave to the prompt."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tascade.core import IntArray
from tascade.enrich.tokens.ngram_model import Foretelling

FORM = [5, 6, 7]


def answer(value: int) -> IntArray:
    """A form with a value of two tokens in it."""
    return np.array([*FORM, 20 + value, 40 + value, *FORM], np.int32)


def test_the_prompts_part_is_left_to_the_prompt_and_the_rest_is_form() -> None:
    answers = [answer(i % 5) for i in range(60)]
    known = Foretelling(answers)
    # The value's second token follows from its first, and the form from the form.
    assert known.unforeseen(answers[0], 0.7, counted=True).tolist() == [3]
    assert known.unforeseen(answer(2), 0.7, counted=False).tolist() == [3]
    assert known.unforeseen(answers[0], 0.1, counted=True).tolist() == []
    assert known.unforeseen(answers[0], 1.1, counted=True).tolist() == list(range(1, 8))


def test_an_answer_does_not_foretell_itself() -> None:
    lone = np.array([1, 2, 3, 4], np.int32)
    known = Foretelling([lone])
    assert known.unforeseen(lone, 0.5, counted=True).tolist() == [1, 2, 3]
    assert known.unforeseen(lone, 0.5, counted=False).tolist() == []


def test_a_rare_long_context_does_not_hide_a_common_short_one() -> None:
    common = [np.array([i, 1, 2], np.int32) for i in range(30, 60)]
    rare = np.array([70, 1, 3], np.int32)
    known = Foretelling([*common, rare])
    assert known.unforeseen(rare, 0.5, counted=True).tolist() == [1, 2]
    assert known.unforeseen(common[0], 0.5, counted=True).tolist() == [1]


@given(st.lists(st.lists(st.integers(0, 4), max_size=12), max_size=30), st.floats(0, 1))
def test_more_is_left_to_the_prompt_the_more_is_asked(
    answers: list[list[int]], least: float
) -> None:
    arrays = [np.array(ids, np.int32) for ids in answers]
    known = Foretelling(arrays)
    for ids in arrays:
        found = known.unforeseen(ids, least, counted=True)
        assert 0 not in found
        assert set(found) <= set(known.unforeseen(ids, 1.0, counted=True))
        assert known.unforeseen(ids, 0.0, counted=True).tolist() == []

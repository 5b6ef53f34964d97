"""Prompts the model writes: of the task's form, new, and the same for the same seed."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from tascade.core import IntArray
from tascade.enrich.prompts import own_prompts, spliced_prompts
from tascade.testing import tiny_model

STEM, ENDING = [5, 6, 7], [8]


def prompts(count: int = 40, words: int = 80) -> list[IntArray]:
    rng = np.random.default_rng(0)
    made = []
    for _ in range(count):
        middle = rng.integers(10, 10 + words, int(rng.integers(2, 6))).tolist()
        made.append(np.array([*STEM, *middle, *ENDING], np.int32))
    return made


def test_prompts_have_the_tasks_beginning_and_end_and_are_new() -> None:
    model = tiny_model("llama", initializer_range=0.02)  # nearly even chances for every token
    known = prompts()
    found = own_prompts(model, known, 12, seed=1)
    assert len(found) == 12
    assert len({tuple(p) for p in found} - {tuple(p) for p in known}) == 12
    for prompt in found:
        assert prompt[:3].tolist() == STEM
        assert prompt[-1] == ENDING[0]
        assert ENDING[0] not in prompt[3:-1]
        assert len(prompt) <= max(map(len, known)) + 16
    again = own_prompts(model, known, 12, seed=1)
    assert [p.tolist() for p in again] == [p.tolist() for p in found]


def test_nothing_is_written_where_no_end_could_be_known() -> None:
    model = tiny_model("llama")
    assert own_prompts(model, [np.array([1, 2], np.int32), np.array([1, 3], np.int32)], 5) == []
    assert own_prompts(model, prompts(), 0) == []


def test_spliced_prompts_go_on_in_another_where_both_say_the_same() -> None:
    known = prompts(200, words=9)
    found = spliced_prompts(known, 50, seed=2)
    assert len({tuple(p) for p in found} - {tuple(p) for p in known}) == len(found) == 50
    pairs = {pair for p in known for pair in pairwise(p.tolist())}
    for prompt in found:
        assert prompt[:3].tolist() == STEM
        assert prompt[-1] == ENDING[0]
        assert len(prompt) <= max(map(len, known))
        assert set(pairwise(prompt.tolist())) <= pairs  # nothing meets that never met before
    again = spliced_prompts(known, 50, seed=2)
    assert [p.tolist() for p in again] == [p.tolist() for p in found]


def test_nothing_is_spliced_from_nothing() -> None:
    assert spliced_prompts([], 5) == []
    assert spliced_prompts([np.array([1, 2, 3], np.int32)] * 3, 5) == []
    assert spliced_prompts(prompts(), 0) == []

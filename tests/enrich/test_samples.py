"""Batches: every answer token is asked for once, at the place before it."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tascade.config import TuneConfig
from tascade.enrich.tokens.merger import TokenMerger
from tascade.enrich.train import trainer
from tascade.enrich.train.embeddings import init_rows, resize_embeddings
from tascade.enrich.train.lora import wrap
from tascade.enrich.train.samples import IGNORE_INDEX, batches, collate, make_samples, passes
from tascade.enrich.train.trainer import Trainer, answer_loss
from tascade.testing import tiny_model

EXPANSIONS = [(5, 6, 7), (8, 9), (5, 6)]
MERGER = TokenMerger(EXPANSIONS, 20)
IDS = st.lists(st.integers(0, 19), min_size=1, max_size=12)


def rows_of(pairs: list[tuple[list[int], list[int]]]) -> list[tuple[np.ndarray, np.ndarray]]:
    return [(np.array(p, np.int32), np.array(a, np.int32)) for p, a in pairs]


@given(st.lists(st.tuples(IDS, IDS), min_size=1, max_size=6))
def test_every_answer_token_is_asked_for_at_the_place_before_it(
    pairs: list[tuple[list[int], list[int]]],
) -> None:
    samples = make_samples(rows_of(pairs), MERGER, 64)
    batch = collate(samples)
    length = batch.ids.shape[1]
    for row, (sample, (prompt, answer)) in enumerate(zip(samples, pairs, strict=True)):
        assert MERGER.unmerge(sample.answer).tolist() == answer
        assert batch.ids[row, : len(sample)].tolist() == [*prompt, *sample.answer.tolist()]
        assert batch.mask[row].sum() == len(sample)
        asked = [int(t) for t in batch.targets[row] if t != IGNORE_INDEX]
        assert asked == sample.answer.tolist()
        first = len(prompt) - 1 - (length - batch.logits_to_keep)
        assert batch.targets[row, first] == sample.answer[0]


@given(st.integers(1, 70), st.integers(1, 9), st.integers(0, 5))
def test_a_round_takes_every_sample_once(count: int, size: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    pairs = [([1] * int(rng.integers(1, 9)), [i % 20]) for i in range(count)]
    samples = make_samples(rows_of(pairs), MERGER, 64)
    taken = [id(sample) for batch in batches(samples, size, seed) for sample in batch]
    assert sorted(taken) == sorted(map(id, samples))
    again = [id(sample) for batch in batches(samples, size, seed) for sample in batch]
    assert taken == again


@given(st.lists(st.integers(1, 700), min_size=1, max_size=40))
def test_passes_take_every_sample_once_within_their_tokens(lengths: list[int]) -> None:
    samples = make_samples(rows_of([([1] * n, [2]) for n in lengths]), MERGER, 1024)
    groups = passes(samples)
    assert sorted(id(s) for group in groups for s in group) == sorted(map(id, samples))
    for group in groups:
        assert len(group) == 1 or collate(group).ids.numel() <= 1024
    # No two neighbours would have gone into one.
    for one, other in pairwise(groups):
        assert collate([*one, other[0]]).ids.numel() > 1024


def test_a_step_of_several_passes_learns_what_one_of_all_would(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rng = np.random.default_rng(0)
    pairs = [
        (rng.integers(0, 20, n).tolist(), rng.integers(0, 20, 1 + n % 7).tolist())
        for n in range(20, 180, 13)
    ]
    samples = make_samples(rows_of(pairs), TokenMerger((), 20), 1024)
    learned = []
    for together in (False, True):
        if together:
            monkeypatch.setattr(trainer, "passes", lambda samples: [samples])
        assert len(trainer.passes(samples)) == (1 if together else 2)
        model = wrap(tiny_model("llama", vocab_size=20), 20, 0, TuneConfig())
        made = Trainer(model, samples, TuneConfig(batch=len(samples), epochs=2))
        made.run()
        learned.append((made.state.losses, [p.detach() for p in made.lora]))
    (losses, weights), (wanted, others) = learned
    assert np.allclose(losses, wanted, rtol=1e-5)
    for ours, theirs in zip(weights, others, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-3)  # Adam


def test_rows_that_are_too_long_or_have_no_prompt_are_left_out() -> None:
    rows = [*rows_of([([1, 2], [3, 4]), ([1] * 9, [2])]), (None, np.array([1], np.int32))]
    assert [s.prompt.tolist() for s in make_samples(rows, MERGER, 6)] == [[1, 2]]


def test_padding_changes_no_loss() -> None:
    model = tiny_model("llama", vocab_size=20)
    pairs = rows_of([([1, 2, 3], [5, 6, 7, 4]), ([1, 2, 3, 4, 5, 6], [8, 9]), ([3], [5, 6, 11, 2])])
    resize_embeddings(model, 23)
    init_rows(model, EXPANSIONS, 20)
    wrapped = wrap(model, 20, 3, TuneConfig())
    samples = make_samples(pairs, MERGER, 64)
    with torch.inference_mode():
        together = float(answer_loss(wrapped, collate(samples)))
        alone = [float(answer_loss(wrapped, collate([sample]))) for sample in samples]
    weights = [len(sample.answer) for sample in samples]
    assert np.isclose(together, np.average(alone, weights=weights), rtol=1e-4)

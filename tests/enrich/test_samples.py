"""Batches: every answer token is asked for once, at the place before it."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from tascade.config import TuneConfig
from tascade.enrich.tokens.merger import Merger
from tascade.enrich.train.embeddings import make_room, start_rows
from tascade.enrich.train.lora import wrap
from tascade.enrich.train.loss import AnswerLoss
from tascade.enrich.train.samples import NOTHING, batches, collate, merged
from tascade.testing import tiny_model

EXPANSIONS = [(5, 6, 7), (8, 9), (5, 6)]
MERGER = Merger(EXPANSIONS, 20)
IDS = st.lists(st.integers(0, 19), min_size=1, max_size=12)


def rows_of(pairs: list[tuple[list[int], list[int]]]) -> list[tuple[np.ndarray, np.ndarray]]:
    return [(np.array(p, np.int32), np.array(a, np.int32)) for p, a in pairs]


@given(st.lists(st.tuples(IDS, IDS), min_size=1, max_size=6))
def test_every_answer_token_is_asked_for_at_the_place_before_it(
    pairs: list[tuple[list[int], list[int]]],
) -> None:
    samples = merged(rows_of(pairs), MERGER, 64)
    batch = collate(samples, with_base=True)
    assert batch.base is not None
    length = batch.ids.shape[1]
    for row, (sample, (prompt, answer)) in enumerate(zip(samples, pairs, strict=True)):
        assert MERGER.unmerge(sample.answer).tolist() == answer
        assert batch.ids[row, : len(sample)].tolist() == [*prompt, *sample.answer.tolist()]
        assert batch.mask[row].sum() == len(sample)
        asked = [int(t) for t in batch.targets[row] if t != NOTHING]
        assert asked == sample.answer.tolist()
        first = len(prompt) - 1 - (length - batch.kept)
        assert batch.targets[row, first] == sample.answer[0]
        begun = [int(t) for t in batch.base.targets[row] if t != NOTHING]
        heads = [MERGER.unmerge([t])[0] for t in sample.answer]
        assert begun == heads


@given(st.integers(1, 70), st.integers(1, 9), st.integers(0, 5))
def test_a_round_takes_every_sample_once(count: int, size: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    pairs = [([1] * int(rng.integers(1, 9)), [i % 20]) for i in range(count)]
    samples = merged(rows_of(pairs), MERGER, 64)
    taken = [id(sample) for batch in batches(samples, size, seed) for sample in batch]
    assert sorted(taken) == sorted(map(id, samples))
    again = [id(sample) for batch in batches(samples, size, seed) for sample in batch]
    assert taken == again


def test_rows_that_are_too_long_or_have_no_prompt_are_left_out() -> None:
    rows = [*rows_of([([1, 2], [3, 4]), ([1] * 9, [2])]), (None, np.array([1], np.int32))]
    assert [s.prompt.tolist() for s in merged(rows, MERGER, 6)] == [[1, 2]]


def test_padding_changes_no_loss() -> None:
    model = tiny_model("llama", vocab_size=20)
    pairs = rows_of([([1, 2, 3], [5, 6, 7, 4]), ([1, 2, 3, 4, 5, 6], [8, 9]), ([3], [5, 6, 11, 2])])
    make_room(model, 23)
    start_rows(model, EXPANSIONS, 20)
    wrapped = wrap(model, 20, 3, TuneConfig())
    for config in (TuneConfig(), TuneConfig(length_power=1.0), TuneConfig(kl=0.5)):
        loss = AnswerLoss(config, EXPANSIONS, 20)
        samples = merged(pairs, MERGER, 64)
        with torch.inference_mode():
            together = float(loss(wrapped, collate(samples, with_base=True)))
            weights, alone = [], []
            for sample in samples:
                alone.append(float(loss(wrapped, collate([sample], with_base=True))))
                power = config.length_power
                lengths = [1 if t < 20 else len(EXPANSIONS[t - 20]) for t in sample.answer]
                weights.append(sum(n**power for n in lengths))
        assert together == np.average(alone, weights=weights).astype(float) or np.isclose(
            together, np.average(alone, weights=weights), rtol=1e-4
        )


def test_the_drift_from_the_base_is_none_while_nothing_but_the_answers_spelling_differs() -> None:
    # With new rows that nothing chooses, the student is the base model: its next base token is
    # the base's own wherever the answer's tokens so far are base tokens.
    model = tiny_model("llama", vocab_size=20, tie_word_embeddings=False)
    make_room(model, 23)
    with torch.no_grad():
        head = model.get_output_embeddings()
        head.weight[20:] = 0.0
    wrapped = wrap(model, 20, 3, TuneConfig())
    samples = merged(rows_of([([1, 2, 3], [4, 10, 11, 2])]), MERGER, 64)
    batch = collate(samples, with_base=True)
    with torch.inference_mode():
        plain = float(AnswerLoss(TuneConfig(), EXPANSIONS, 20)(wrapped, batch))
        drifted = float(AnswerLoss(TuneConfig(kl=1.0), EXPANSIONS, 20)(wrapped, batch))
    assert 0.0 <= drifted - plain < 0.5

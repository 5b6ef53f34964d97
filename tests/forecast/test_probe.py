"""The probe foresees what can be foreseen, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest

from tascade.core import IntArray
from tascade.errors import ConfigError
from tascade.forecast.inspection import inspect
from tascade.forecast.probe import BEST, Probe, probe
from tascade.testing import byte_tokenizer, tiny_model, toy_examples

VOCAB = 260
Pair = tuple[IntArray, IntArray]


def rows(count: int, seed: int, rule: IntArray | None) -> list[Pair]:
    """Outputs in which each token follows from the last one by a rule; or from nothing."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        output = rng.integers(0, 64, 24).astype(np.int32)
        for i in range(1, len(output)) if rule is not None else ():
            output[i] = rule[output[i - 1]]
        made.append((rng.integers(0, VOCAB, 5).astype(np.int32), output))
    return made


def ask(rule: IntArray | None, missed: list[int], **options: int) -> Probe:
    held_out = rows(10, 1, rule)
    model = tiny_model("llama", 0, vocab_size=VOCAB)
    told: list[tuple[str, int, int | None]] = []
    found = probe(
        model,
        rows(200, 0, rule),
        held_out,
        [missed] * len(held_out),
        lambda *words: told.append(words),
        **options,
    )
    assert [done for _, done, _ in told] == list(range(told[-1][2] or 0))
    return found


def test_what_follows_from_the_last_token_is_foreseen_and_chance_is_not() -> None:
    rule = np.random.default_rng(2).permutation(64).astype(np.int32)
    found = ask(rule, [0, 1, 5, 20])
    assert found.misses == 30  # the first token of an output is nobody's to foresee
    assert found.at_misses[0] > 0.8
    assert found.anywhere[0] > 0.8
    by_chance = ask(None, [1, 5, 20])
    assert by_chance.vocabulary == 64
    assert by_chance.anywhere[0] < 0.1
    assert by_chance.anywhere[2] < 0.3
    for share in (found, by_chance):
        assert list(share.at_misses) == sorted(share.at_misses)
        assert len(share.at_misses) == len(BEST)


def test_it_reads_no_more_than_it_is_given() -> None:
    assert ask(None, [3], tokens=290).learned_from == 10 * 23
    assert ask(None, []).misses == 0


def test_the_same_rows_give_the_same_probe() -> None:
    assert ask(None, [3, 4]) == ask(None, [3, 4])


def test_rows_that_teach_nothing_are_refused_by_name() -> None:
    model = tiny_model("llama", 0, vocab_size=VOCAB)
    alone = [(None, output) for _, output in rows(4, 0, None)]
    with pytest.raises(ConfigError, match="prompts"):
        probe(model, alone, rows(2, 1, None), [[3], [3]], lambda *words: None)


def test_inspect_asks_it_where_drafts_miss() -> None:
    tokenizer = byte_tokenizer()
    model = tiny_model("llama", 0, vocab_size=VOCAB)
    told = {}
    for drafter in (False, True):
        data, held_out = toy_examples(60, 0), toy_examples(20, 1)
        found = inspect(
            data, (model, tokenizer), held_out=held_out, drafter=drafter, progress=False
        )
        told[drafter] = found
    assert told[False].drafter is None
    assert told[False].to_dict()["drafter"] is None
    asked = told[True].drafter
    assert asked is not None
    assert 0 < asked.misses <= told[True].forecast.misses
    assert "foreseen" not in told[False].describe()
    assert f"{asked.at_misses[0]:.0%} by a probe" in told[True].describe()
    assert told[True].to_dict()["drafter"]["misses"] == asked.misses
    assert told[True].to_dict()["misses"] == told[True].forecast.misses

"""The forecast replays references as the decoder would, and says who will not profit."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from tascade.core import IntArray
from tascade.decode.loop import Decoder
from tascade.decode.sampling import SamplingParams
from tascade.decode.target import Target
from tascade.draft.budget import Budget
from tascade.draft.costs import CostTable
from tascade.draft.ngram.drafter import NgramDrafter
from tascade.draft.ngram.mixer_calibration import Calibration
from tascade.errors import ConfigError
from tascade.forecast.replay import Forecast, forecast
from tascade.index.corpus import CorpusIndex
from tascade.testing import byte_tokenizer, tiny_model, toy_examples

END = 256
Pair = tuple[IntArray, IntArray]


def toy_rows(n: int, seed: int) -> list[Pair]:
    tokenizer = byte_tokenizer()

    def ids(text: str) -> IntArray:
        return np.asarray(tokenizer(text).input_ids, np.int32)

    return [
        (ids(str(e.prompt)), np.append(ids(e.completion), END).astype(np.int32))
        for e in toy_examples(n, seed)
    ]


def random_rows(n: int, seed: int) -> list[Pair]:
    rng = np.random.default_rng(seed)
    return [
        (rng.integers(0, 256, 20).astype(np.int32), rng.integers(0, 256, 60).astype(np.int32))
        for _ in range(n)
    ]


def predict(train: list[Pair], held_out: list[Pair], **options: Any) -> Forecast:
    options = {"vocab_size": 260, "end_tokens": (END,), **options}
    return forecast([output for _, output in train], held_out, **options)


def test_a_templated_task_profits() -> None:
    found = predict(toy_rows(120, 0), toy_rows(80, 1))
    assert found.verdict == "profits"
    assert found.tokens_per_step > 3
    assert found.speedup > 1.5
    assert found.calibrated_on == found.replayed == 40
    assert found.output_tokens == sum(len(output) for _, output in toy_rows(80, 1)[40:])
    assert 1.5 < found.low < found.speedup < found.high
    assert sum(found.sources.values()) == pytest.approx(1.0)
    assert found.sources["target"] < 0.5
    assert found.statistics.examples == 120
    assert found.statistics.grams_in_train > 0.9
    assert found.cost.startswith("assumed")


def test_random_outputs_will_not_profit() -> None:
    found = predict(random_rows(80, 0), random_rows(60, 1))
    assert found.verdict == "will not profit"
    assert found.tokens_per_step < 1.1
    assert 0.95 < found.speedup < 1.1
    half = found.rescues[2]
    assert found.misses == found.forwards - found.replayed  # nothing but misses
    assert 1.6 < half.low <= half.speedup <= half.high < 2.1
    assert found.statistics.grams_in_train < 0.01
    assert found.statistics.entropy_bits > 7


def test_a_machine_where_drafts_are_dear_profits_little_or_not_at_all() -> None:
    steep = CostTable((1, 2, 64), (0.01, 0.02, 0.64))
    seconds = steep.seconds.copy()
    found = predict(toy_rows(120, 0), toy_rows(60, 1), cost=steep)
    assert found.cost == "measured"
    assert 0.9 < found.speedup < 1.1
    assert found.verdict == "will not profit"
    assert (steep.seconds == seconds).all()
    flat = predict(toy_rows(120, 0), toy_rows(40, 1), cost=CostTable((1, 64), (0.01, 0.01)))
    assert flat.speedup > found.speedup


def test_a_table_whose_single_token_step_was_disturbed_promises_no_miracles() -> None:
    disturbed = CostTable((1, 2, 64), (0.02, 0.01, 0.01))
    found = predict(toy_rows(120, 0), toy_rows(40, 1), cost=disturbed)
    assert found.speedup <= found.tokens_per_step


def test_the_same_rows_give_the_same_forecast() -> None:
    first, second = (predict(toy_rows(60, 0), toy_rows(20, 1)) for _ in range(2))
    assert first == second
    assert json.loads(json.dumps(first.to_dict())) == first.to_dict()
    assert first.verdict in first.describe()


def test_few_outputs_give_no_verdict_and_a_range() -> None:
    for rows in (2, 20, 58):
        found = predict(toy_rows(120, 0), toy_rows(rows, 1))
        assert found.verdict == "cannot tell"
        told = f"{rows - rows // 2} held-out references ({rows // 2} others calibrate) are too few"
        assert told in found.describe()
    # Of other rows as many: the range holds what they give on average about as often as it says.
    draws = [predict(toy_rows(120, 0), toy_rows(60, seed)) for seed in range(2, 18)]
    usual = float(np.mean([found.speedup for found in draws]))
    assert sum(found.low <= usual <= found.high for found in draws) >= 13
    assert all(found.low < found.high < 1.5 * found.low for found in draws)


def test_who_reads_the_first_line_alone_learns_that_the_model_says_something_else() -> None:
    unlike = [(row, np.tile(output[:5] + 40, 6)) for row, output in toy_rows(20, 1)]
    found = predict(toy_rows(120, 0), toy_rows(20, 1), own=unlike)
    first = found.describe().splitlines()[0]
    assert found.verdict.startswith("profits")  # they repeat themselves
    assert first.startswith(f"{found.verdict}, if this model is to be used as it is: ")
    alike = predict(toy_rows(120, 0), toy_rows(20, 1), own=toy_rows(20, 2))
    assert alike.describe().startswith(f"{alike.verdict}: ")


def test_the_models_own_answers_are_replayed_where_there_are_any() -> None:
    own = random_rows(20, 3)
    found = predict(toy_rows(120, 0), toy_rows(20, 1), own=own)
    assert (found.answers, found.calibrated_on, found.replayed) == ("own answers", 20, 20)
    assert found.output_tokens == sum(len(output) for _, output in own)
    assert found.verdict == "will not profit"
    assert "--answers" not in found.describe()
    assert "--answers 20" in predict(toy_rows(120, 0), toy_rows(80, 1)).describe()


def test_only_the_second_half_is_counted() -> None:
    train, held_out = toy_rows(60, 0), toy_rows(20, 1)
    found = predict(train, held_out)
    other = predict(train, [*random_rows(10, 5), *held_out[10:]])
    assert found.output_tokens == other.output_tokens
    assert found.output_tokens == sum(len(output) for _, output in held_out[10:])


def test_statistics_by_hand() -> None:
    train = [np.asarray(ids, np.int32) for ids in ([1, 2, 3, 4, 5], [1, 2, 3, 4, 6], [9])]
    prompt = np.empty(0, np.int32)
    held_out = [(prompt, train[0]), (prompt, np.asarray([2, 3, 4, 6, 7], np.int32))]
    s = forecast(train, held_out, vocab_size=10).statistics
    assert (s.examples, s.tokens, s.distinct_tokens) == (3, 11, 7)
    assert (s.length_mean, s.length_median) == (pytest.approx(11 / 3), 5)
    assert s.whole_in_train == 0.5
    assert s.grams_in_train == 0.75  # 1234 2345 2346 are known, 3467 is not
    p = np.asarray([2, 2, 2, 2, 1, 1, 1]) / 11
    assert s.entropy_bits == pytest.approx(float(-(p * np.log2(p)).sum()))


def test_too_little_to_predict_from_is_refused() -> None:
    rows = toy_rows(4, 0)
    with pytest.raises(ConfigError, match="held-out"):
        predict(rows, rows[:1])
    with pytest.raises(ConfigError, match="training outputs"):
        predict([], rows)


def test_prompts_make_similar_examples_a_source() -> None:
    train, held_out = toy_rows(300, 0), toy_rows(40, 1)
    without = predict(train, held_out)
    found = predict(train, held_out, train_prompts=[prompt for prompt, _ in train])
    assert found.tokens_per_step > 0.9 * without.tokens_per_step


class SteadyBudget(Budget):
    """A budget whose cost table is not moved by the noise of the machine's clock."""

    def observe(self, nodes: int, seconds: float, draft_seconds: float) -> None:
        expected = float(self.cost.upto(nodes + 1)[-1])
        super().observe(nodes, expected, 0.0)


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_agrees_with_what_the_decoder_measures(family: str, tmp_path: Any) -> None:
    # The model's own answers are the references, so forecast and decoder must count the same.
    model = tiny_model(family, seed=2)
    params = SamplingParams(max_new_tokens=40, end_tokens=(11, 12))
    rng = np.random.default_rng(0)
    shared = rng.integers(0, 96, 3).tolist()
    prompts = [np.asarray([*rng.integers(0, 3, 2).tolist(), *shared], np.int32) for _ in range(40)]

    def decode(decoder: Decoder, chosen: list[IntArray]) -> list[Any]:
        return [decoder.generate(prompt, params) for prompt in chosen]

    target = Target(model)
    plain = Decoder(target, NgramDrafter(None, use_context=False))
    rows = [
        (prompt, np.asarray(result.tokens, np.int32))
        for prompt, result in zip(prompts, decode(plain, prompts), strict=True)
    ]
    train, held_out = [output for _, output in rows[:10]], rows[10:]
    found = forecast(
        train, held_out, cost=CostTable.flat(64), vocab_size=96, end_tokens=params.end_tokens
    )
    corpus = CorpusIndex.build(tmp_path / "corpus", train, vocab_size=96, fingerprint="t")
    drafter = NgramDrafter(corpus, calibration=Calibration(), end_tokens=params.end_tokens)
    decoder = Decoder(target, drafter, SteadyBudget(CostTable.flat(64)))
    decode(decoder, [prompt for prompt, _ in held_out[:15]])
    measured = decode(decoder, [prompt for prompt, _ in held_out[15:]])
    stepped = sum(result.stepped_tokens for result in measured)
    forwards = sum(result.forwards for result in measured)
    assert found.tokens_per_step == pytest.approx(stepped / forwards, rel=0.02)
    assert found.tokens_per_step > 1.5
    assert found.forwards == pytest.approx(forwards, rel=0.02)
    sources = np.bincount([s for result in measured for s in result.sources], minlength=5)
    assert found.sources["target"] == pytest.approx(sources[0] / sources.sum(), abs=0.02)

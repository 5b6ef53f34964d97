"""The hook over a tailored head: exact is plain generate(), masked is generate() with a mask."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import numpy as np
import pytest
import torch
from masked_oracle import ROWS, STATIC, Mask, Recorder, V, ends_of, masking, padded
from transformers import LogitsProcessorList

from tascade.config import VocabConfig
from tascade.core import Drafter, IntArray
from tascade.decode.loop import Decoder
from tascade.decode.target import Target
from tascade.draft.budget import NoDrafter
from tascade.errors import ConfigError
from tascade.integrations.transformers import speculative_generate
from tascade.tailor.exact import DeferredDecoder
from tascade.tailor.schedule import CheckSchedule
from tascade.tailor.tailored import Tailored, tailor_model
from tascade.testing import OracleDrafter, byte_tokenizer, tiny_model

MODELS = ("llama", "phi", "gemma2")
HEADS = ("exact", "masked")
LENGTH = 14


class EveryFifth(CheckSchedule):
    """Checks after so many guesses, come what may."""

    def plan(self) -> int:
        return 5

    def should_check(self, right: Sequence[float]) -> bool:
        return False


@cache
def tailored(kind: str, vocab: int = V) -> Tailored:
    model = tiny_model(kind, seed=3, vocab_size=vocab)
    if kind == "phi":
        torch.nn.init.normal_(model.lm_head.bias, generator=torch.Generator().manual_seed(1))
    return tailor_model(model, STATIC, VocabConfig(head="masked"))


def decoder_of(
    made: Tailored, head: str, drafter: Drafter | None = None, tokenizer: Any = None
) -> Decoder:
    target, drafter = Target(made.target.model, made.head), drafter or NoDrafter()
    if head == "masked":
        return Decoder(target, drafter, tokenizer=tokenizer)
    every = EveryFifth(float, float)
    return DeferredDecoder(target, drafter, made.full, every, tokenizer=tokenizer)


def given(rows: Sequence[Sequence[int]], options: dict[str, Any]) -> dict[str, Any]:
    usual = {"max_new_tokens": LENGTH, "do_sample": False, "pad_token_id": 0}
    return {**padded(rows), **usual, **options}


def wanted(made: Tailored, head: str, rows: Sequence[Sequence[int]], **options: Any) -> Any:
    """What the head promises: the full head's words, masked first if it is masked."""
    call = partial(made.target.model.generate, **given(rows, options))
    if head == "exact":
        return call()
    with masking(made.target.model, Mask(rows, ends_of(options))):
        return call()


def got(made: Tailored, head: str, rows: Sequence[Sequence[int]], **options: Any) -> Any:
    fast = speculative_generate(decoder_of(made, head))
    return made.target.model.generate(**given(rows, options), custom_generate=fast)


def no_threes(row: int, ids: torch.Tensor) -> list[int]:
    return [token for token in range(V) if token % 3]


@cache
def said(kind: str, head: str) -> list[int]:
    """What is said to the first prompt without any option."""
    return wanted(tailored(kind), head, ROWS[:1])[0, len(ROWS[0]) :].tolist()


FEATURES: dict[str, Callable[[list[int]], dict[str, Any]]] = {
    "greedy": lambda said: {},
    "repetition penalty": lambda said: {"repetition_penalty": 2.5},
    "no repeated tokens": lambda said: {"no_repeat_ngram_size": 1},
    "bad words": lambda said: {"bad_words_ids": [said[2:4], said[7:8]]},
    "suppressed": lambda said: {"suppress_tokens": said[3:6]},
    "suppressed at first": lambda said: {"begin_suppress_tokens": said[:1]},
    "bias": lambda said: {
        "sequence_bias": [[said[:1], -9.0], [said[2:4], -30.0], [[9], 2.0], [[95], 1.0]]
    },
    "ends": lambda said: {"eos_token_id": [said[9], said[4]]},
    "min_new_tokens": lambda said: {"eos_token_id": [said[9], said[4]], "min_new_tokens": 8},
    "grammar": lambda said: {"prefix_allowed_tokens_fn": no_threes},
}


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("kind", MODELS)
def test_greedy_words_are_those_of_generate(kind: str, head: str, feature: str) -> None:
    made, options = tailored(kind), FEATURES[feature](said(kind, head))
    plain = wanted(made, head, ROWS[:1], **options)
    assert torch.equal(got(made, head, ROWS[:1], **options), plain)
    if feature != "greedy":
        assert plain[0, len(ROWS[0]) :].tolist() != said(kind, head), "the option changed nothing"


@pytest.mark.parametrize("feature", ["greedy", "repetition penalty", "bad words", "min_new_tokens"])
@pytest.mark.parametrize("head", HEADS)
def test_in_a_batch_too(head: str, feature: str) -> None:
    made = tailored("llama")
    options = {"eos_token_id": int(STATIC[0]), **FEATURES[feature](said("llama", head))}
    assert torch.equal(got(made, head, ROWS, **options), wanted(made, head, ROWS, **options))


def test_the_two_heads_differ_and_the_masked_one_from_the_full() -> None:
    made = tailored("llama")
    assert not torch.equal(wanted(made, "exact", ROWS), wanted(made, "masked", ROWS))


DRAWN = [
    {"temperature": 1.3},
    {"temperature": 0.9, "top_k": 15, "top_p": 0.9, "repetition_penalty": 1.2},
    {"temperature": 1.2, "bad_words_ids": [[int(STATIC[0])]], "eos_token_id": STATIC[:4].tolist()},
]


@pytest.mark.parametrize("options", DRAWN, ids=["plain", "warped", "ended"])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("kind", MODELS)
def test_draws_are_those_of_the_full_head(kind: str, head: str, options: dict[str, Any]) -> None:
    made = tailored(kind)
    full = speculative_generate(Decoder(Target(made.target.model), NoDrafter()))
    options = {**options, "do_sample": True, "seed": 11}
    plain = wanted(made, head, ROWS[:1], **options, custom_generate=full)
    assert torch.equal(got(made, head, ROWS[:1], **options), plain)
    other = got(made, head, ROWS[:1], **{**options, "seed": 12})
    assert not torch.equal(other, plain)


class Counting(OracleDrafter):
    accepted = 0

    def commit(self, tokens: IntArray, verified: int, path: Sequence[int]) -> None:
        super().commit(tokens, verified, path)
        self.accepted += len(path)


@pytest.mark.parametrize("head", HEADS)
def test_with_drafts(head: str) -> None:
    made = tailored("llama")
    plain = wanted(made, head, ROWS[:1], repetition_penalty=1.3)
    drafter = Counting(plain[0, len(ROWS[0]) :].tolist(), 4)
    fast = speculative_generate(decoder_of(made, head, drafter))
    call = given(ROWS[:1], {"repetition_penalty": 1.3})
    assert torch.equal(made.target.model.generate(**call, custom_generate=fast), plain)
    assert drafter.accepted > 3


@pytest.mark.parametrize("head", HEADS)
def test_stop_strings(head: str) -> None:
    made, tokenizer = tailored("llama", 260), byte_tokenizer()
    fast = speculative_generate(decoder_of(made, head, tokenizer=tokenizer))
    generate = partial(made.target.model.generate, **given(ROWS[:1], {"max_new_tokens": 24}))
    whole = generate(custom_generate=fast)
    stop = next(t for t in whole[0, len(ROWS[0]) + 2 : -2].tolist() if 32 < t < 127)
    ended = generate(custom_generate=fast, stop_strings=[chr(stop)], tokenizer=tokenizer)
    at = whole[0].tolist().index(stop, len(ROWS[0])) + 1
    assert torch.equal(ended, whole[:, :at])
    if head == "exact":
        plain = generate(stop_strings=[chr(stop)], tokenizer=tokenizer)
        assert torch.equal(ended, plain)


@pytest.mark.parametrize("head", HEADS)
def test_a_streamer_is_fed_each_token_in_its_turn(head: str) -> None:
    made, ours, theirs = tailored("llama"), Recorder(), Recorder()
    wanted(made, head, ROWS[:1], streamer=theirs)
    got(made, head, ROWS[:1], streamer=ours)
    assert ours.values == theirs.values
    assert len(ours.values) == LENGTH + 2  # the prompt, each token, the end


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("rows", [ROWS[:1], ROWS[1:]], ids=["one", "padded"])
def test_a_callers_processor_sees_each_prefix_once(head: str, rows: list[list[int]]) -> None:
    made = tailored("llama")

    def rolls(seen: list[list[int]]) -> LogitsProcessorList:
        def process(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            seen.extend(ids.tolist())
            return scores.roll(ids.shape[1] % 2, dims=1)

        return LogitsProcessorList([process])

    ours, theirs = [], []
    options = {"repetition_penalty": 1.2, "eos_token_id": 5, "min_new_tokens": LENGTH}
    rows = [[*row, 5] for row in rows]
    plain = wanted(made, head, rows, logits_processor=rolls(theirs), **options)
    assert torch.equal(got(made, head, rows, logits_processor=rolls(ours), **options), plain)
    assert sorted(ours) == sorted(theirs)
    assert plain.shape[1] == max(map(len, rows)) + LENGTH


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(
    "option", [{"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}], ids=["beams", "n"]
)
def test_several_sequences_are_refused_by_name(head: str, option: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"cannot honour {next(iter(option))}"):
        got(tailored("llama"), head, ROWS[:1], **option)


def test_an_end_that_a_masked_head_cannot_say_is_refused() -> None:
    made = tailored("llama")
    missing = next(t for t in range(1, V) if t not in STATIC and t not in ROWS[0])
    ends = {"eos_token_id": [int(STATIC[0]), missing, -1]}
    brings = [[*ROWS[0], missing]]  # whose request is over when the next one is refused
    assert torch.equal(got(made, "masked", brings, **ends), wanted(made, "masked", brings, **ends))
    with pytest.raises(ConfigError, match=rf"cannot honour eos_token_id[\s\S]*\[{missing}\]"):
        got(made, "masked", ROWS[:1], **ends)
    plain = wanted(made, "exact", ROWS[:1], **ends)
    assert torch.equal(got(made, "exact", ROWS[:1], **ends), plain)


@pytest.mark.parametrize("head", HEADS)
def test_an_error_inside_leaves_nothing_of_the_request(head: str) -> None:
    made = tailored("llama")
    before = got(made, head, ROWS[:1])
    plain = made.target.model.generate(**given(ROWS[:1], {}))

    def breaks(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if ids.shape[1] > 12:
            raise RuntimeError("a caller's mistake")
        return scores

    with pytest.raises(RuntimeError, match="mistake"):
        got(made, head, [list(range(40, 50))], logits_processor=LogitsProcessorList([breaks]))
    assert torch.equal(made.target.model.generate(**given(ROWS[:1], {})), plain)
    assert torch.equal(got(made, head, ROWS[:1]), before)
    made.head.begin(np.empty(0, np.int32))
    assert sorted(made.head.union.ids.tolist()) == sorted(STATIC.tolist())

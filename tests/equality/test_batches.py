"""In a batch every request gets what it would get alone, with any head, whoever else is there."""

import dataclasses
import threading
from functools import partial

import pytest
import tailored_parts
from tailored_parts import VOCAB, Mask, every, model, models_and, small_head, static

from tascade.decode.batch import BatchDecoder
from tascade.decode.batch_target import BatchTarget
from tascade.decode.lm_head import finisher, head_override
from tascade.decode.loop import Decoder
from tascade.decode.sampling import SamplingParams
from tascade.decode.target import Target
from tascade.draft.budget import NoDrafter
from tascade.errors import ConfigError, TascadeError, UnsupportedModelError
from tascade.tailor.exact_batch import ExactBatchDecoder
from tascade.tailor.head import BatchHead
from tascade.testing import byte_tokenizer, tiny_model

prompts = partial(tailored_parts.prompts, most=40)
GREEDY = SamplingParams(max_new_tokens=20)
SAMPLED = SamplingParams(max_new_tokens=20, temperature=1.2, seed=3)
PARAMS = {"greedy": GREEDY, "sampled": SAMPLED}
HEADS = ("full", "masked", "exact")


def batch(model, kind="full", share=0.4, size=8, tokens=5, tokenizer=None) -> BatchDecoder:
    target = BatchTarget(model)
    if kind == "full":
        return BatchDecoder(target, tokenizer=tokenizer, size=size)
    full, head = head_override(model).full, small_head(BatchHead, model, share)
    if kind == "masked":
        return BatchDecoder(target, head, tokenizer=tokenizer, size=size)
    finish = finisher(model)
    checks = (lambda states: finish(full(states)), every(tokens))
    return ExactBatchDecoder(target, head, *checks, tokenizer=tokenizer, size=size)


def alone(model, kind, prompt, params, share=0.4, tokenizer=None):
    """What plain decoding says, or for a masked head what it says with the rest ruled out."""
    oracle = [Mask([*static(share), *prompt])] if kind == "masked" else []
    return Decoder(Target(model), NoDrafter(), None, tokenizer).generate(prompt, params, oracle)


# --- equality -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "tied", "kind", "how"), models_and(HEADS, [*PARAMS]))
def test_each_of_a_batch_gets_what_it_gets_alone(family, tied, kind, how):
    asked, params = prompts(7), PARAMS[how]
    made = batch(model(family, tied), kind, size=3).generate(asked, params)
    for prompt, got in zip(asked, made, strict=True):
        wanted = alone(model(family, tied), kind, prompt, params)
        assert got.tokens == wanted.tokens
        assert len(got.sources) == len(got.tokens)
        assert got.stepped_tokens == len(got.tokens) - 1
        assert got.prompt_tokens == len(prompt)
    if kind == "exact":
        assert sum(got.extra["misses"] for got in made) > 8


@pytest.mark.parametrize("kind", HEADS)
def test_batch_mates_and_places_do_not_matter(kind):
    llama = model("llama")
    asked = prompts(33)
    each = [
        dataclasses.replace(
            SAMPLED if i % 3 else GREEDY, seed=i, max_new_tokens=1 + (7 * i) % 23, top_k=i % 5
        )
        for i in range(len(asked))
    ]
    wanted = [g.tokens for g in batch(llama, kind, size=1).generate(asked, each)]
    for size, order in ((8, range(33)), (32, range(33)), (8, reversed(range(33)))):
        order = list(order)
        decoder = batch(llama, kind, size=size)
        made = decoder.generate([asked[i] for i in order], [each[i] for i in order])
        for i, got in zip(order, made, strict=True):
            assert got.tokens == wanted[i]


@pytest.mark.parametrize("tokens", [1, 2, 9, 64])
def test_exact_however_many_guesses_are_checked_together(tokens):
    asked = prompts(9)
    made = batch(model("qwen3"), "exact", 0.7, 4, tokens).generate(asked, GREEDY)
    for prompt, got in zip(asked, made, strict=True):
        assert got.tokens == alone(model("qwen3"), "exact", prompt, GREEDY).tokens


@pytest.mark.parametrize("coverage", [0.5, 0.9, 0.99])
def test_exact_over_many_prompts_at_any_coverage(coverage):
    asked = prompts(200, seed=11)
    short = dataclasses.replace(GREEDY, max_new_tokens=12)
    wanted = batch(model("llama"), size=32).generate(asked, short)
    made = batch(model("llama"), "exact", coverage, 16).generate(asked, short)
    assert [got.tokens for got in made] == [got.tokens for got in wanted]


OPTIONS = {
    "top_k": {"temperature": 0.9, "top_k": 7},
    "top_p": {"temperature": 1.1, "top_p": 0.8},
    "min_p": {"temperature": 1.1, "min_p": 0.05},
    "penalty": {"repetition_penalty": 1.4},
    "penalty and draws": {"repetition_penalty": 1.2, "temperature": 0.8, "top_p": 0.9},
    "ends": {"end_tokens": tuple(range(0, 96, 9))},
}


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_option(kind, options):
    params = SamplingParams(max_new_tokens=24, seed=11, **options)
    asked = prompts(9)
    made = batch(model("llama"), kind, size=4).generate(asked, params)
    for prompt, got in zip(asked, made, strict=True):
        wanted = alone(model("llama"), kind, prompt, params)
        assert (got.tokens, got.finish_reason) == (wanted.tokens, wanted.finish_reason)


@pytest.mark.parametrize("kind", ["full", "exact"])
@pytest.mark.parametrize("tokens", [0, 4])
def test_log_probabilities_are_the_full_distributions(kind, tokens):
    params = dataclasses.replace(GREEDY, logprobs=3)
    asked = prompts(6)
    made = batch(model("llama"), kind, size=4, tokens=tokens).generate(asked, params)
    for prompt, got in zip(asked, made, strict=True):
        wanted = alone(model("llama"), kind, prompt, params)
        assert [p.token for p in got.logprobs] == got.tokens == wanted.tokens
        for ours, theirs in zip(got.logprobs, wanted.logprobs, strict=True):
            assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)
            assert [t for t, _ in ours.top] == [t for t, _ in theirs.top]


@pytest.mark.parametrize("kind", ["full", "exact"])
def test_texts_and_stop_strings(kind):
    tokenizer = byte_tokenizer()
    llama = tiny_model("llama", vocab_size=len(tokenizer), eos_token_id=256)
    asked = prompts(10, 256)
    free = [alone(llama, kind, p, GREEDY, tokenizer=tokenizer).text for p in asked]
    each = [dataclasses.replace(GREEDY, stop=(text[4:6],) if text[4:6] else ()) for text in free]
    made = batch(llama, kind, size=4, tokenizer=tokenizer).generate(asked, each)
    for prompt, params, got in zip(asked, each, made, strict=True):
        wanted = alone(llama, kind, prompt, params, tokenizer=tokenizer)
        assert (got.tokens, got.text, got.finish_reason) == (
            wanted.tokens,
            wanted.text,
            wanted.finish_reason,
        )
    assert sum(got.finish_reason == "stop" for got in made) > 4


def test_a_callers_processor_is_asked_once_a_token():
    seen = []

    def odd_only(ids, scores):
        seen.append(tuple(ids[0].tolist()))
        scores[:, ::2] = -float("inf")
        return scores

    asked = prompts(5)
    made = batch(model("llama"), "exact", size=3).generate(asked, GREEDY, [odd_only])
    assert len(seen) == len(set(seen)) == sum(len(got.tokens) for got in made)
    for prompt, got in zip(asked, made, strict=True):
        wanted = Decoder(Target(model("llama")), NoDrafter()).generate(prompt, GREEDY, [odd_only])
        assert got.tokens == wanted.tokens
        assert got.extra["checks"] == 0


def test_streams_give_each_token_once_and_in_order():
    asked, told = prompts(6), {}
    for index, new, result in batch(model("llama"), "exact", size=2).stream(asked, GREEDY):
        assert new
        told.setdefault(index, []).extend(new)
        assert told[index] == result.tokens
    for index, prompt in enumerate(asked):
        assert told[index] == alone(model("llama"), "exact", prompt, GREEDY).tokens


# --- nothing is left behind ---------------------------------------------------------------------


def test_a_batch_leaves_nothing_behind():
    decoder, asked = batch(model("llama"), "exact"), prompts(6)
    first = len(decoder.head.ids)
    wanted = [got.tokens for got in decoder.generate(asked, GREEDY)]
    stream = decoder.stream(asked, GREEDY)
    next(stream)
    with pytest.raises(TascadeError, match="busy"):
        next(decoder.stream(asked, GREEDY))
    stream.close()  # cancelled half way

    def breaks(ids, scores):
        raise RuntimeError("a caller's mistake")

    with pytest.raises(RuntimeError, match="mistake"):
        decoder.generate(asked, GREEDY, [breaks])
    with pytest.raises(ConfigError, match="no row for a token"):
        decoder.generate([asked[0], [VOCAB + 3]], GREEDY)
    assert len(decoder.head.ids) == first
    assert [got.tokens for got in decoder.generate(asked, GREEDY)] == wanted
    assert alone(model("llama"), "full", asked[0], GREEDY).tokens == wanted[0]


def test_what_lists_lack_is_learned_and_no_list_changes():
    decoder, asked = batch(model("llama"), "exact", size=4), prompts(12)
    rows, misses = len(decoder.head.ids), []
    for _ in range(3):
        made = decoder.generate(asked, SAMPLED)
        misses.append(sum(got.extra["misses"] for got in made))
        for prompt, got in zip(asked, made, strict=True):
            assert got.tokens == alone(model("llama"), "exact", prompt, SAMPLED).tokens
    assert misses[0] > 0
    assert misses[1:] == [0, 0]
    assert len(decoder.head.ids) == rows


def test_batches_of_several_threads_do_not_meet():
    llama, asked = model("llama"), prompts(24)
    wanted = [alone(llama, "exact", prompt, GREEDY).tokens for prompt in asked]
    decoder, lock, made = batch(llama, "exact", size=3), threading.Lock(), {}

    def work(part: int) -> None:
        with lock:  # as TaskModel does
            made[part] = decoder.generate(asked[3 * part : 3 * part + 3], GREEDY)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = [got.tokens for part in range(8) for got in made[part]]
    assert found == wanted


# --- what cannot be done ------------------------------------------------------------------------


def test_what_cannot_be_decoded_is_refused():
    decoder = batch(model("llama"))
    with pytest.raises(ConfigError, match="prompt is empty"):
        decoder.generate([[1], []], GREEDY)
    with pytest.raises(ConfigError, match="params do not fit"):
        decoder.generate([[1], [2]], [GREEDY])
    with pytest.raises(ConfigError, match="a batch has requests"):
        batch(model("llama"), size=0)
    other = tiny_model("llama")
    other.config._attn_implementation = "flash_attention_2"
    with pytest.raises(UnsupportedModelError, match="kernel"):
        BatchTarget(other)
    assert decoder.generate([], GREEDY) == []


def test_a_model_that_turns_by_the_longest_is_decoded_one_by_one():
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    turning = tiny_model("llama", max_position_embeddings=24, rope_parameters=rope)
    # Transformers turns the frequencies back only where a request begins below the first edge.
    decoder, asked = batch(turning, size=4), [prompt[:12] for prompt in prompts(5)]
    assert decoder.size == 1
    for prompt, got in zip(asked, decoder.generate(asked, GREEDY), strict=True):
        assert got.tokens == alone(turning, "full", prompt, GREEDY).tokens


# --- planted bugs -------------------------------------------------------------------------------


def test_a_head_that_all_see_is_caught(monkeypatch):
    add_request, seen = BatchHead.add_request, []

    def shared(self, tokens):
        seen.extend(tokens)
        return add_request(self, seen)

    monkeypatch.setattr(BatchHead, "add_request", shared)
    asked = prompts(12)
    made = batch(model("llama"), "masked", 0.2, size=12).generate(asked, GREEDY)
    wanted = [alone(model("llama"), "masked", prompt, GREEDY, 0.2).tokens for prompt in asked]
    assert [got.tokens for got in made] != wanted


def test_a_cache_that_is_not_rewound_is_caught(monkeypatch):
    settle = ExactBatchDecoder._settle

    def stale(self, rows, checking):
        lengths = list(self.target.cache.lengths)
        settle(self, rows, checking)
        self.target.cache.lengths[:] = lengths

    monkeypatch.setattr(ExactBatchDecoder, "_settle", stale)
    asked = prompts(10)
    made = batch(model("llama"), "exact").generate(asked, GREEDY)
    wanted = [alone(model("llama"), "full", prompt, GREEDY).tokens for prompt in asked]
    assert [got.tokens for got in made] != wanted

"""Masked, a tailored head is the full one with a mask; exact, it is plain decoding."""

import dataclasses

import numpy as np
import pytest
import torch
from tailored_parts import (
    MODELS,
    VOCAB,
    Mask,
    every,
    model,
    models_and,
    plainly,
    prompts,
    small_head,
    static,
)

from all_pairs import sampled
from tascade.config import VocabConfig
from tascade.decode.lm_head import finisher, head_override
from tascade.decode.loop import Decoder
from tascade.decode.sampling import SamplingParams
from tascade.decode.target import Target
from tascade.draft.budget import NoDrafter
from tascade.draft.ngram.drafter import NgramDrafter
from tascade.tailor.exact import ExactHeadDecoder, take_unchecked
from tascade.tailor.head import RequestHead
from tascade.tailor.offload.load import load_offloaded
from tascade.tailor.tailored import tailor_model
from tascade.testing import FAMILIES, OracleDrafter, RandomTreeDrafter, byte_tokenizer, tiny_model

GREEDY = SamplingParams(max_new_tokens=28)
SAMPLED = SamplingParams(max_new_tokens=28, temperature=1.2, seed=3)
PARAMS = {"greedy": GREEDY, "sampled": SAMPLED}


def plain(model, prompt, params, processors=()):
    return Decoder(Target(model), NoDrafter()).generate(prompt, params, processors)


def exact(model, share, drafter=None, schedule=None, tokenizer=None) -> ExactHeadDecoder:
    full, finish = head_override(model).full, finisher(model)
    return ExactHeadDecoder(
        Target(model, small_head(RequestHead, model, share)),
        drafter or NoDrafter(),
        lambda states: finish(full(states)),
        schedule or every(5),
        tokenizer=tokenizer,
    )


# --- masked -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "tied", "how"), models_and([*PARAMS]))
def test_masked_is_the_full_head_with_the_rest_ruled_out(family, tied, how):
    params = PARAMS[how]
    head = small_head(RequestHead, model(family, tied), 0.3)
    decoder = Decoder(Target(model(family, tied), head), NoDrafter())
    differing = 0
    for prompt in prompts(7):
        oracle = Mask([*static(0.3), *prompt])
        wanted = plain(model(family, tied), prompt, params, [oracle]).tokens
        assert decoder.generate(prompt, params).tokens == wanted
        differing += wanted != plainly(family, tied, prompt, params)
    assert differing > 3  # else the mask was hardly tested


@pytest.mark.parametrize(("family", "tied"), MODELS)
def test_a_head_of_all_tokens_changes_nothing(family, tied):
    decoder = Decoder(
        Target(model(family, tied), small_head(RequestHead, model(family, tied), 1.0)), NoDrafter()
    )
    for prompt in prompts(7):
        wanted = plainly(family, tied, prompt, GREEDY)
        assert decoder.generate(prompt, GREEDY).tokens == wanted


def test_masked_and_drafts_say_what_masked_alone_says():
    llama = model("llama")
    alone = Decoder(Target(llama, small_head(RequestHead, llama, 0.4)), NoDrafter())
    for seed, prompt in enumerate(prompts(7)):
        wanted = alone.generate(prompt, GREEDY).tokens
        for drafter in (OracleDrafter(wanted, 5, seed=seed), RandomTreeDrafter(VOCAB, seed)):
            drafted = Decoder(Target(llama, small_head(RequestHead, llama, 0.4)), drafter)
            assert drafted.generate(prompt, GREEDY).tokens == wanted


# --- exact --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "tied", "how", "share"), models_and([*PARAMS], [0.3, 0.9]))
def test_exact_is_plain_decoding(family, tied, how, share):
    decoder, params = exact(model(family, tied), share), PARAMS[how]
    misses = 0
    for prompt in prompts(8):
        decoder.schedule = every(5)  # nothing learned of the others
        got = decoder.generate(prompt, params)
        assert got.tokens == plainly(family, tied, prompt, params)
        assert len(got.sources) == len(got.tokens)
        assert got.stepped_tokens == len(got.tokens) - 1
        misses += got.extra["misses"]
    assert misses > 20 or share > 0.5


@pytest.mark.parametrize(
    ("family", "tied", "how", "tokens", "kind"),
    models_and([*PARAMS], [0, 5], ["none", "random", "together"]),
)
def test_exact_as_packs_have_it_is_plain_decoding(family, tied, how, tokens, kind):
    """Checks and steps with the full head go by the quickest product here, not by the layer's."""
    whole, asked, params = model(family, tied), prompts(6), PARAMS[how]
    ids, config = np.asarray(static(0.6), np.int32), VocabConfig(head="exact")
    made = tailor_model(whole, ids, config)
    wanted = [plainly(family, tied, prompt, params) for prompt in asked]
    if kind == "together":
        decoder = made.batches(4)
        decoder.schedule = every(tokens)
        assert [g.tokens for g in decoder.generate(asked, params)] == wanted
        return
    decoder = made.decoder(NoDrafter() if kind == "none" else RandomTreeDrafter(VOCAB, 1))
    decoder.schedule = every(tokens)
    got = [decoder.generate(prompt, params) for prompt in asked]
    assert [g.tokens for g in got] == wanted
    assert all((g.extra["full_steps"] > 0) == (tokens == 0) for g in got)


@pytest.mark.parametrize("tokens", [1, 2, 3, 7, 64])
def test_exact_however_many_guesses_are_checked_together(tokens):
    decoder = exact(model("qwen3"), 0.6, schedule=every(tokens))
    for prompt in prompts(12):
        got = decoder.generate(prompt, GREEDY)
        assert got.tokens == plain(model("qwen3"), prompt, GREEDY).tokens
        assert got.extra["checks"] >= len(got.tokens) / tokens


DRAFTERS = {
    "trees": lambda said, seed: OracleDrafter(said, 4, branching=1.0, seed=seed),
    "chains": lambda said, seed: OracleDrafter(said, 9, branching=0.0, seed=seed),
    "random": lambda said, seed: RandomTreeDrafter(VOCAB, seed),
    "mixed": lambda said, seed: NgramDrafter(None),
}


@pytest.mark.parametrize(("family", "how", "kind"), sampled(FAMILIES, [*PARAMS], [*DRAFTERS]))
def test_exact_with_drafts_is_plain_decoding(family, how, kind):
    for seed, prompt in enumerate(prompts(6)):
        wanted = plainly(family, False, prompt, PARAMS[how])
        decoder = exact(model(family), 0.7, DRAFTERS[kind](wanted, seed))
        assert decoder.generate(prompt, PARAMS[how]).tokens == wanted


def test_drafts_and_guesses_are_both_worth_something():
    wanted = [plain(model("llama"), prompt, GREEDY).tokens for prompt in prompts(8)]
    forwards = checks = tokens = 0
    for prompt, said in zip(prompts(8), wanted, strict=True):
        drafter = OracleDrafter(said, 12, seed=1)
        got = exact(model("llama"), 0.98, drafter, every(8)).generate(prompt, GREEDY)
        assert got.tokens == said
        forwards, checks = forwards + got.forwards, checks + got.extra["checks"]
        tokens += len(said)
    assert forwards < tokens / 2
    assert checks < tokens / 4


OPTIONS = {
    "top_k": {"temperature": 0.9, "top_k": 7},
    "top_p": {"temperature": 1.1, "top_p": 0.8},
    "min_p": {"temperature": 1.1, "min_p": 0.05},
    "penalty": {"repetition_penalty": 1.4},
    "penalty and draws": {"repetition_penalty": 1.2, "temperature": 0.8, "top_p": 0.9},
    "end": {"end_tokens": tuple(range(0, 96, 9))},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_exact_with_every_option(options):
    params = SamplingParams(max_new_tokens=30, seed=11, **options)
    decoder = exact(model("llama"), 0.7)
    ended = 0
    for prompt in prompts(12):
        got, wanted = decoder.generate(prompt, params), plain(model("llama"), prompt, params)
        assert got.tokens == wanted.tokens
        assert got.finish_reason == wanted.finish_reason
        ended += got.finish_reason == "stop"
    assert ended > 5 or "end_tokens" not in options


def test_exact_gives_the_full_distributions_log_probabilities():
    params = dataclasses.replace(GREEDY, logprobs=3)
    for plan in (every(6), every(0)):
        decoder = exact(model("llama"), 0.5, schedule=plan)
        for prompt in prompts(6):
            got, wanted = decoder.generate(prompt, params), plain(model("llama"), prompt, params)
            assert [p.token for p in got.logprobs] == got.tokens
            for ours, theirs in zip(got.logprobs, wanted.logprobs, strict=True):
                assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)
                assert [t for t, _ in ours.top] == [t for t, _ in theirs.top]


def test_exact_with_stop_strings_and_a_callers_rule():
    tokenizer = byte_tokenizer()
    llama = tiny_model("llama", vocab_size=len(tokenizer), eos_token_id=256)
    decoder = exact(llama, 0.8, tokenizer=tokenizer)
    spoken = Decoder(Target(llama), NoDrafter(), None, tokenizer)
    stops = 0
    for prompt in prompts(12, 256):
        free = spoken.generate(prompt, GREEDY).text
        if len(free) < 12:
            continue
        params = SamplingParams(max_new_tokens=28, stop=(free[6:8],))
        got, wanted = decoder.generate(prompt, params), spoken.generate(prompt, params)
        assert (got.tokens, got.text) == (wanted.tokens, wanted.text)
        stops += got.finish_reason == "stop"
        asked = []
        rule = lambda output: asked.append(list(output)) or len(output) == 9  # noqa: B023, E731
        assert decoder.generate(prompt, GREEDY, extra_stop=rule).tokens == (
            spoken.generate(prompt, GREEDY, extra_stop=lambda output: len(output) == 9).tokens
        )
        # Asked once for each token that is given out, never for a guess that is not.
        assert [len(output) for output in asked] == list(range(1, len(asked) + 1))
    assert stops > 3


def test_a_callers_processor_is_asked_once_a_token():
    seen = []

    def odd_only(ids, scores):
        seen.append(ids.shape[1])
        scores[:, ::2] = -torch.inf
        return scores

    decoder = exact(model("llama"), 0.5)
    prompt = prompts(1)[0]
    got = decoder.generate(prompt, GREEDY, [odd_only])
    assert seen == list(range(len(prompt), len(prompt) + len(got.tokens)))
    assert got.tokens == plain(model("llama"), prompt, GREEDY, [odd_only]).tokens
    assert got.extra["full_steps"] == 28
    assert got.extra["checks"] == 0


def test_a_request_leaves_nothing_behind():
    llama = model("llama")
    decoder, (first, second, *_) = exact(llama, 0.4), prompts(3)
    wanted = decoder.generate(first, GREEDY)
    steps = decoder.stream(second, GREEDY)
    next(steps)
    steps.close()  # cancelled half way

    def breaks(ids, scores):
        raise RuntimeError("a caller's mistake")

    with pytest.raises(RuntimeError, match="mistake"):
        decoder.generate(second, GREEDY, [breaks])
    again = decoder.generate(first, GREEDY)
    assert again.tokens == wanted.tokens
    assert wanted.extra["misses"] > again.extra["misses"]  # what lacked is there from the start
    decoder.schedule = every(5)
    again = decoder.generate(first, GREEDY)
    assert (again.tokens, again.extra["misses"]) == (wanted.tokens, wanted.extra["misses"])
    decoder.head.begin(np.empty(0, np.int32))
    assert sorted(decoder.head.union.ids.tolist()) == sorted(static(0.4))
    assert plain(llama, first, GREEDY).tokens == wanted.tokens  # the model has its head again


def test_what_lists_lack_is_learned_and_no_list_changes():
    llama, decoder = model("llama"), exact(model("llama"), 0.4)
    misses = []
    for _ in range(3):
        made = [decoder.generate(prompt, SAMPLED) for prompt in prompts(12)]
        misses.append(sum(got.extra["misses"] for got in made))
        for prompt, got in zip(prompts(12), made, strict=True):
            assert got.tokens == plain(llama, prompt, SAMPLED).tokens
    assert misses[0] > 30
    assert misses[1:] == [0, 0]
    masked = Decoder(decoder.target, NoDrafter())
    for prompt in prompts(12):
        wanted = plain(llama, prompt, GREEDY, [Mask([*static(0.4), *prompt])]).tokens
        assert masked.generate(prompt, GREEDY).tokens == wanted
    decoder.schedule = every(5)
    assert decoder.generate(prompts(1)[0], SAMPLED).extra["misses"] > 0


def test_a_target_keeps_its_head_for_others():
    decoder, prompt = exact(model("llama"), 0.4, schedule=every(0)), prompts(1)[0]
    assert decoder.generate(prompt, GREEDY).extra["full_steps"] == 28

    def breaks(ids, scores):
        raise RuntimeError("a caller's mistake")

    with pytest.raises(RuntimeError, match="mistake"):
        decoder.generate(prompt, GREEDY, [breaks])
    wanted = plain(model("llama"), prompt, GREEDY, [Mask([*static(0.4), *prompt])]).tokens
    assert Decoder(decoder.target, NoDrafter()).generate(prompt, GREEDY).tokens == wanted


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("family", ["llama", "gemma2", "phi"])
def test_exact_with_its_tables_off_a_gpu(tmp_path, family):
    tiny_model(family).cpu().save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    stock, slim = tiny_model(family).cuda(), load_offloaded(tmp_path, device="cuda")
    ids, config = np.asarray(static(0.6), np.int32), VocabConfig(head="exact", deferred=7)
    made = tailor_model(slim.model, ids, config, table=slim.head, bias=slim.head_bias)
    decoder, misses = made.decoder(NoDrafter()), 0
    for params in (GREEDY, SAMPLED):
        wanted = [plain(stock, prompt, params).tokens for prompt in prompts(12)]
        for prompt, tokens in zip(prompts(12), wanted, strict=True):
            got = decoder.generate(prompt, params)
            assert got.tokens == tokens
            misses += got.extra["misses"] + got.extra["full_steps"]
        assert [g.tokens for g in made.batches(5).generate(prompts(12), params)] == wanted
    assert misses


# --- planted bugs -------------------------------------------------------------------------------


def test_a_skipped_check_is_caught(monkeypatch):
    def unchecked(self, request, guess):
        self._states.clear()
        take_unchecked(request, guess)

    monkeypatch.setattr(ExactHeadDecoder, "_check", unchecked)
    decoder = exact(model("llama"), 0.9)
    same = [
        decoder.generate(prompt, GREEDY).tokens == plain(model("llama"), prompt, GREEDY).tokens
        for prompt in prompts(12)
    ]
    assert not all(same)


def test_a_cache_that_is_not_rewound_is_caught(monkeypatch):
    keep = ExactHeadDecoder._rewind

    def stale(self, request, guess):
        length = self.target.length
        keep(self, request, guess)
        self.target.cache.truncate(length)

    monkeypatch.setattr(ExactHeadDecoder, "_rewind", stale)
    decoder = exact(model("llama"), 0.5)
    same = []
    for prompt in prompts(10):
        wanted = plain(model("llama"), prompt, GREEDY).tokens
        same.append(decoder.generate(prompt, GREEDY).tokens == wanted)
    assert not all(same)

"""Accelerated == plain, token for token, in fp32: every family, drafter and tree shape."""

from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from all_pairs import sampled
from tascade.core import Drafter, DraftTree, Source
from tascade.decode.loop import AllNodes, Decoder
from tascade.decode.sampling import SamplingParams
from tascade.decode.target import Target
from tascade.draft.budget import Budget, NoDrafter
from tascade.draft.costs import CostTable
from tascade.draft.ngram.drafter import NgramDrafter
from tascade.index.corpus import CorpusIndex
from tascade.testing import (
    FAMILIES,
    WINDOW,
    OracleDrafter,
    RandomTreeDrafter,
    ScriptedDrafter,
    byte_tokenizer,
    tiny_model,
    toy_examples,
)

VOCAB = 96
LENGTHS = (1, 7, 60)
SEEDS = (0, 1)
GREEDY = SamplingParams(max_new_tokens=48)
assert LENGTHS[2] > 2 * WINDOW


@cache
def target(family: str, seed: int = 0) -> Target:
    return Target(tiny_model(family, seed))


@cache
def prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    rng = np.random.default_rng((seed, length))
    return tuple(rng.integers(0, VOCAB, length).tolist())


@cache
def plain(family: str, length: int, params: SamplingParams, seed: int = 0) -> tuple[int, ...]:
    decoder = Decoder(target(family, seed), NoDrafter())
    return tuple(decoder.generate(prompt(length), params).tokens)


def decode(family: str, length: int, params: SamplingParams, drafter: Drafter, seed: int = 0):
    return Decoder(target(family, seed), drafter).generate(prompt(length), params)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """The plain outputs of one request of each family, as a corpus index."""
    documents = [list(plain(family, 7, GREEDY)) for family in FAMILIES]
    path = tmp_path_factory.mktemp("corpus") / "index"
    return CorpusIndex.build(path, documents, vocab_size=VOCAB, fingerprint="tiny")


# --- greedy ---------------------------------------------------------------------------------


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_the_models_own_generate(family, length):
    ids = torch.tensor([prompt(length)], device=target(family).device)
    own = tiny_model(family).generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=48
    )
    assert plain(family, length, GREEDY) == tuple(own[0, length:].tolist())


@pytest.mark.parametrize("branching", [0.0, 1.0])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_filled_prefill_changes_nothing(family, branching):
    filled = Target(tiny_model(family, 0))
    filled.grain = 16
    wanted = plain(family, 60, GREEDY)
    seen = []
    inner = filled.model.forward
    drafter = OracleDrafter(wanted, 5, branching=branching)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            filled.model, "forward", lambda **k: seen.append(k["input_ids"].shape[1]) or inner(**k)
        )
        got = Decoder(filled, drafter).generate(prompt(60), GREEDY)
    assert tuple(got.tokens) == wanted
    assert seen[0] % 16 == 0
    assert seen[0] >= 60
    assert filled.length <= 60 + len(wanted)


@pytest.mark.parametrize("family", FAMILIES)
def test_repetition_penalty_equals_the_models_own_generate(family):
    ids = torch.tensor([prompt(7)], device=target(family).device)
    own = tiny_model(family).generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=48,
        repetition_penalty=1.3,
    )
    params = SamplingParams(max_new_tokens=48, repetition_penalty=1.3)
    assert plain(family, 7, params) == tuple(own[0, 7:].tolist())


def test_tiny_models_say_more_than_one_thing():
    for family in FAMILIES:
        outputs = [plain(family, n, GREEDY, seed) for n in LENGTHS for seed in SEEDS]
        assert sum(len(set(tokens)) for tokens in outputs) > 12 * len(outputs), family
        assert len(set(outputs)) == len(outputs), family


DRAFTERS = {
    "trees": lambda said, seed: OracleDrafter(said, wrong_every=5, branching=1.0, seed=seed),
    "chains": lambda said, seed: OracleDrafter(said, wrong_every=7, branching=0.0, seed=seed),
    "random": lambda said, seed: RandomTreeDrafter(VOCAB, seed),
}


def oracles(said, seed):
    return [DRAFTERS[kind](said, seed) for kind in ("trees", "chains")]


@pytest.mark.parametrize(
    ("family", "length", "seed", "kind"), sampled(FAMILIES, LENGTHS, SEEDS, [*DRAFTERS])
)
def test_trees_and_chains_change_nothing(family, length, seed, kind):
    expected = plain(family, length, GREEDY, seed)
    drafter = DRAFTERS[kind](expected, seed + length)
    result = decode(family, length, GREEDY, drafter, seed)
    assert tuple(result.tokens) == expected
    assert result.tokens_per_step > 2.5 or kind == "random"  # else acceptance was hardly tested


@pytest.mark.parametrize("family", FAMILIES)
def test_mixed_drafts_change_nothing(family, corpus):
    for index in (corpus, None):
        drafter = NgramDrafter(index)
        for length in (7, 60, 7):
            result = decode(family, length, GREEDY, drafter)
            assert tuple(result.tokens) == plain(family, length, GREEDY)
        if index is not None:
            assert result.tokens_per_step > 2  # its second time over the corpus's own document


def test_a_budget_changes_nothing(corpus):
    for cost in (CostTable.flat(), CostTable((1, 64), (1.0, 8.0)), CostTable((1, 64), (1.0, 90.0))):
        decoder = Decoder(target("llama"), NgramDrafter(corpus), Budget(cost))
        for length in LENGTHS:
            tokens = decoder.generate(prompt(length), GREEDY).tokens
            assert tuple(tokens) == plain("llama", length, GREEDY)


# --- sampled --------------------------------------------------------------------------------


def ban_even_after_odd(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """A processor that depends on the tokens before, as grammars do."""
    if int(ids[0, -1]) % 2:
        scores = scores.clone()
        scores[:, ::2] = -torch.inf
    return scores


SAMPLED = {
    "plain": SamplingParams(temperature=0.8, seed=11, max_new_tokens=48),
    "top-k": SamplingParams(temperature=0.8, top_k=12, seed=12, max_new_tokens=48),
    "top-p": SamplingParams(temperature=0.8, top_p=0.7, seed=13, max_new_tokens=48),
    "min-p": SamplingParams(temperature=0.8, min_p=0.1, seed=14, max_new_tokens=48),
    "penalty": SamplingParams(temperature=0.8, repetition_penalty=1.4, seed=15, max_new_tokens=48),
    "all": SamplingParams(
        temperature=0.8,
        top_k=30,
        top_p=0.9,
        min_p=0.02,
        repetition_penalty=1.2,
        seed=16,
        max_new_tokens=48,
    ),
}


@pytest.mark.parametrize(("family", "options", "kind"), sampled(FAMILIES, [*SAMPLED], [*DRAFTERS]))
def test_sampled_output_is_the_same_with_any_drafter(family, options, kind):
    params = SAMPLED[options]
    length = 60 if options in ("plain", "all") else 7
    expected = plain(family, length, params)
    drafter = DRAFTERS[kind](expected, 3)
    assert tuple(decode(family, length, params, drafter).tokens) == expected


def test_another_seed_gives_other_words():
    a, b = (plain("llama", 7, SamplingParams(temperature=0.8, seed=s)) for s in (1, 2))
    assert a[:5] != b[:5]


@pytest.mark.parametrize(
    ("family", "temperature", "kind"), sampled(FAMILIES, [0.0, 0.8], [*DRAFTERS])
)
def test_a_processor_of_the_users_own_changes_nothing_but_its_words(family, temperature, kind):
    params = SamplingParams(temperature=temperature, seed=5, max_new_tokens=48)
    own = Decoder(target(family), NoDrafter()).generate(prompt(7), params, [ban_even_after_odd])
    pairs = zip([prompt(7)[-1], *own.tokens], own.tokens, strict=False)
    assert not any(a % 2 and b % 2 == 0 for a, b in pairs)
    drafter = DRAFTERS[kind](own.tokens, 4)
    fast = Decoder(target(family), drafter).generate(prompt(7), params, [ban_even_after_odd])
    assert fast.tokens == own.tokens


# --- where requests end ---------------------------------------------------------------------


@pytest.mark.parametrize("branching", [0.0, 1.0])
def test_an_end_token_inside_a_draft_ends_the_request(branching):
    reference = plain("qwen3", 7, GREEDY)
    for end in sorted(set(reference)):
        params = SamplingParams(max_new_tokens=48, end_tokens=(end, VOCAB - 1))
        drafter = OracleDrafter(reference, wrong_every=0, branching=branching)
        result = decode("qwen3", 7, params, drafter)
        assert tuple(result.tokens) == reference[: reference.index(end) + 1]
        assert result.finish_reason == "stop"
        assert len(result.sources) == len(result.tokens)
        ignoring = SamplingParams(max_new_tokens=48, end_tokens=(end,), ignore_end=True)
        assert tuple(decode("qwen3", 7, ignoring, drafter).tokens) == reference


@pytest.mark.parametrize("length", LENGTHS)
def test_the_limit_cuts_inside_a_draft(length):
    reference = plain("gemma3", length, GREEDY)
    for limit in range(1, 20):
        params = SamplingParams(max_new_tokens=limit)
        for drafter in oracles(reference, limit):
            result = decode("gemma3", length, params, drafter)
            assert tuple(result.tokens) == reference[:limit]
            assert result.finish_reason == "length"
            assert sum(step.committed for step in result.steps) == result.stepped_tokens


def test_counts_leave_out_a_prefill_without_a_draft():
    result = decode("llama", 7, GREEDY, NoDrafter())
    assert (result.forwards, result.stepped_tokens) == (47, 47)
    assert result.tokens_per_step == 1.0
    assert result.prompt_tokens == 7
    assert result.prefill_seconds > 0
    fast = decode("llama", 7, GREEDY, OracleDrafter(result.tokens, branching=0.0))
    assert fast.stepped_tokens == 48
    assert [s.accepted for s in fast.steps] == [8, 8, 8, 8, 8, 3]
    assert [s.committed for s in fast.steps] == [9, 9, 9, 9, 9, 3]  # the last ends at the limit
    assert fast.sources.count(Source.TARGET) == 5


@pytest.fixture(scope="module")
def chatter():
    """A byte model with its tokenizer, and what it says to one prompt."""
    tokenizer = byte_tokenizer()
    model = Target(tiny_model("llama", vocab_size=len(tokenizer), eos_token_id=256))
    ids = tokenizer(toy_examples(1)[0].prompt)["input_ids"]
    letters = list(b'{}": ,aeiourstn')

    def spell(ids, scores):  # keeps a random model within a few letters
        out = torch.full_like(scores, -torch.inf)
        out[:, letters] = scores[:, letters]
        return out

    decoder = Decoder(model, NoDrafter(), tokenizer=tokenizer)
    params = SamplingParams(temperature=1.5, seed=2, max_new_tokens=64)
    return model, tokenizer, ids, spell, decoder.generate(ids, params, [spell])


@pytest.mark.parametrize("size", [1, 2, 5])
def test_stop_strings_inside_a_draft_end_the_text_before_them(chatter, size):
    model, tokenizer, ids, spell, full = chatter
    for start in (0, 3, 20, 41):
        stop = full.text[start : start + size]
        params = SamplingParams(
            temperature=1.5, seed=2, max_new_tokens=64, stop=(stop, "never this")
        )
        for drafter in (NoDrafter(), *oracles(full.tokens, start)):
            decoder = Decoder(model, drafter, tokenizer=tokenizer)
            result = decoder.generate(ids, params, [spell])
            at = full.text.index(stop)
            assert result.text == full.text[:at]
            assert result.tokens == full.tokens[: at + size]
            assert result.finish_reason == "stop"


# --- streaming and reuse --------------------------------------------------------------------


def test_a_stream_adds_up_to_the_result():
    reference = plain("phi", 7, GREEDY)
    for drafter in oracles(reference, 0):
        pieces = list(Decoder(target("phi"), drafter).stream(prompt(7), GREEDY))
        assert tuple(t for tokens, _ in pieces for t in tokens) == reference
        assert tuple(pieces[-1][1].tokens) == reference
        heard: list[int] = []
        Decoder(target("phi"), drafter).generate(prompt(7), GREEDY, on_tokens=heard.extend)
        assert tuple(heard) == reference


@pytest.mark.parametrize("family", FAMILIES)
def test_one_decoder_serves_many_prompts(family, corpus):
    shared_one = Decoder(target(family), NgramDrafter(corpus))
    for length in (60, 1, 7, 60, 7):
        stream = shared_one.stream(prompt(length), GREEDY)
        next(stream)  # a request left off half-way must leave no trace either
        next(stream)
        tokens = shared_one.generate(prompt(length), GREEDY).tokens
        assert tuple(tokens) == plain(family, length, GREEDY)


def test_the_cache_grows_without_a_trace():
    long = SamplingParams(max_new_tokens=600)
    expected = plain("mistral", 7, long)
    fresh = Target(tiny_model("mistral"))
    result = Decoder(fresh, OracleDrafter(expected, wrong_every=9)).generate(prompt(7), long)
    assert tuple(result.tokens) == expected
    ids = torch.tensor([prompt(7)], device=fresh.device)
    own = fresh.model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=600
    )
    assert tuple(own[0, 7:].tolist()) == expected


# --- arbitrary trees ------------------------------------------------------------------------


@st.composite
def trees(draw, alphabet):
    """Any tree a drafter could hand over; siblings may hold the same token."""
    n = draw(st.integers(0, 14))
    parents = [draw(st.integers(-1, i - 1)) for i in range(n)]
    tokens = draw(st.lists(st.sampled_from(alphabet), min_size=n, max_size=n))
    return DraftTree(
        np.asarray(tokens, np.int32),
        np.asarray(parents, np.int32),
        np.linspace(1, 0.1, n, dtype=np.float32),
        np.zeros(n, np.int8),
    )


SHORT = SamplingParams(max_new_tokens=14)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_neox"])
@settings(max_examples=40)
@given(data=st.data())
def test_no_valid_tree_changes_the_output(family, data):
    length = data.draw(st.sampled_from(LENGTHS))
    expected = plain(family, length, SHORT)
    alphabet = sorted(set(expected[:6]))
    script = data.draw(st.lists(trees(alphabet), max_size=6))
    limit = data.draw(st.integers(1, 14))
    decoder = Decoder(target(family), ScriptedDrafter(script), AllNodes(limit))
    assert tuple(decoder.generate(prompt(length), SHORT).tokens) == expected

"""A checkpoint's generation config is honoured as ``model.generate`` honours it, or refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel

import tascade
from scripts import DOCS, load
from tascade.config import SpecConfig
from tascade.decode import generation
from tascade.decode.sampling import SamplingParams
from tascade.errors import ConfigError
from tascade.serve import requests
from tascade.testing import byte_tokenizer, tiny_model

PROMPT, N = "a prompt", 20
REFUSED: list[dict[str, Any]] = [
    {"num_beams": 4},
    {"num_return_sequences": 2, "do_sample": True},
    {"guidance_scale": 3.0},
    {"penalty_alpha": 0.5, "top_k": 4},
    {"dola_layers": "high"},
    {"prompt_lookup_num_tokens": 3},
    {"max_time": 5.0},
    {"token_healing": True},
]


@pytest.fixture(scope="module", params=["llama", "phi", "qwen2"])
def task_model(request: pytest.FixtureRequest) -> Any:
    loaded = tiny_model(request.param, 3, vocab_size=260), byte_tokenizer()
    rows = [{"prompt": f"p{i}", "completion": f"answer {i % 3}"} for i in range(8)]
    recipe = tascade.Recipe(spec=SpecConfig(calibration_rows=0))
    return tascade.adapt(loaded, rows, recipe=recipe)


def theirs(task_model: Any, **options: Any) -> list[int]:
    ids = torch.as_tensor(task_model.encode(PROMPT), dtype=torch.long)[None]
    said = task_model.model.generate(ids, tokenizer=task_model.tokenizer, **options)
    return said[0, ids.shape[1] :].tolist()


def configs(plain: list[int], end: int, tokenizer: Any) -> list[dict[str, Any]]:
    """Thirty, of the kinds that checkpoints have; their values come from the plain answer."""
    letters = [text for token in plain[2:] if "�" not in (text := tokenizer.decode([token]))]
    return [
        {},
        {"repetition_penalty": 1.3},
        {"repetition_penalty": 1.05, "no_repeat_ngram_size": 3},
        {"no_repeat_ngram_size": 1},
        {"suppress_tokens": [plain[0], plain[3]]},
        {"begin_suppress_tokens": [plain[0], end]},
        {"bad_words_ids": [[plain[1]], plain[3:5]]},
        {"sequence_bias": [[[plain[2]], -50.0]]},
        {"sequence_bias": [[[plain[2], plain[3]], 50.0]]},
        {"eos_token_id": [plain[5], plain[9]]},
        {"eos_token_id": [plain[0], end], "min_new_tokens": 7},
        {"eos_token_id": [plain[0], end], "min_length": 12},
        {"eos_token_id": plain[4], "max_new_tokens": 3},
        {"exponential_decay_length_penalty": (2, 3.0), "eos_token_id": end},
        {"forced_eos_token_id": end, "max_new_tokens": 6},
        {"forced_bos_token_id": plain[1]},
        {"encoder_repetition_penalty": 4.0},
        {"encoder_no_repeat_ngram_size": 2},
        {"max_new_tokens": 5},
        {"max_length": 14},
        {"max_length": 14, "max_new_tokens": 3},
        {"stop_strings": letters[:1]},
        {"stop_strings": ["never said", letters[-1]]},
        {"remove_invalid_values": True, "renormalize_logits": True},
        {"watermarking_config": {"greenlist_ratio": 0.25, "bias": 8.0}},
        {"do_sample": True, "top_k": 1},
        {"do_sample": True, "top_p": 1e-6, "temperature": 0.7},
        {"do_sample": True, "top_k": 1, "repetition_penalty": 1.4, "suppress_tokens": [plain[1]]},
        {"do_sample": False, "temperature": 0.3, "top_p": 0.9, "top_k": 20},
        {"pad_token_id": 0, "use_cache": True, "transformers_version": "4.40.0"},
    ]


@pytest.mark.parametrize("number", range(30))
def test_answers_are_those_of_generate(task_model: Any, number: int) -> None:
    model, end = task_model.model, int(task_model.tokenizer.eos_token_id)
    before = model.generation_config
    usual = {"pad_token_id": 0, "eos_token_id": end}
    try:
        model.generation_config = GenerationConfig(**usual)
        plain = theirs(task_model, max_new_tokens=N)
        chosen = configs(plain, end, task_model.tokenizer)[number]
        model.generation_config = GenerationConfig(**{**usual, **chosen})
        limits = ("max_new_tokens", "max_length")
        given = {} if any(name in chosen for name in limits) else {"max_new_tokens": N}
        wanted = theirs(task_model, **given)
        if isinstance(ends := chosen.get("eos_token_id"), int) and ends != end:
            assert end not in wanted  # else it would end here, and not in Transformers
        got = task_model.run(PROMPT, **given)
        assert got.tokens == wanted
        assert "".join(task_model.stream(PROMPT, **given)) == got.text
        texts = task_model.generate([PROMPT, PROMPT], batch_size=2, **given)
        assert texts == [got.text, got.text]
        plainly = task_model.plain.generate(task_model.encode(PROMPT), task_model.params(**given))
        assert plainly.tokens == wanted
    finally:
        model.generation_config = before


@pytest.mark.parametrize("chosen", REFUSED)
def test_what_is_not_done_is_refused_by_name(task_model: Any, chosen: dict[str, Any]) -> None:
    model, before = task_model.model, task_model.model.generation_config
    try:
        model.generation_config = GenerationConfig(**chosen)
        with pytest.raises(ConfigError, match=next(iter(chosen))):
            task_model.run(PROMPT)
    finally:
        model.generation_config = before


def test_a_callers_word_wins_over_the_file_and_the_file_over_the_default(task_model: Any) -> None:
    model, before = task_model.model, task_model.model.generation_config
    try:
        model.generation_config = GenerationConfig(
            do_sample=True, temperature=2.0, no_repeat_ngram_size=1, max_new_tokens=9
        )
        drawn = {tuple(task_model.run(PROMPT, seed=seed).tokens) for seed in range(4)}
        assert len(drawn) == 4
        assert max(map(len, drawn)) <= 9
        params = task_model.params()
        assert (params.temperature, params.top_k, params.max_new_tokens) == (2.0, 50, 9)
        assert task_model.params(temperature=0.5, top_k=3).top_k == 3
        for greedy in ({"temperature": 0}, {"do_sample": False}):
            assert task_model.params(**greedy).temperature == 0.0
        once = task_model.run(PROMPT, temperature=0).tokens
        assert len({*once}) == len(once)
        again = task_model.run(PROMPT, temperature=0, no_repeat_ngram_size=0, max_new_tokens=N)
        model.generation_config = GenerationConfig(pad_token_id=0)
        assert again.tokens == theirs(task_model, max_new_tokens=N)
    finally:
        model.generation_config = before


def test_every_field_of_the_installed_transformers_is_placed() -> None:
    placed = [*generation.OWN, *generation.OTHERS, *generation.PROCESSED, *generation.IGNORED]
    placed += generation.REFUSED
    assert len(placed) == len({*placed})
    fields = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    assert fields <= {*placed}


def test_the_tables_in_the_docs_are_the_codes() -> None:
    made = load(DOCS / "generate_options.py")
    text = (DOCS / "options.md").read_text()
    assert made.page(text) == text
    assert all(f"`{name}`" in text for name in requests.NEUTRAL)


# --- positions ------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", [16, 48, 96])
def test_a_table_of_positions_bounds_the_answer_before_the_pass(positions: int) -> None:
    torch.manual_seed(1)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": positions}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=260, initializer_range=0.4, **sizes)).eval()
    rows = [{"prompt": "x" * min(40, positions - 10), "completion": "ab"}] * 4
    task_model = tascade.adapt((model, byte_tokenizer()), rows)
    prompt = "y" * (positions - 8)
    length = len(task_model.encode(prompt))
    got = task_model.run(prompt, max_new_tokens=30, ignore_end=True)
    assert (len(got.tokens), got.finish_reason) == (positions - length, "length")
    many = task_model.generate([prompt, prompt[:5]], batch_size=2, max_new_tokens=30)
    assert many[0] == task_model.run(prompt, max_new_tokens=30).text
    for ask in (task_model.run, lambda p: task_model.generate([p, p], batch_size=2)):
        with pytest.raises(ConfigError, match="too long"):
            ask("y" * (positions + 1))


def test_a_prompt_beyond_what_the_model_was_made_for_is_told_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = tiny_model("llama", vocab_size=260, max_position_embeddings=24), byte_tokenizer()
    task_model = tascade.adapt(model, [{"prompt": "x", "completion": "ab"}] * 4)
    fits, long = "y" * 4, "y" * 40
    for ask in (task_model.run, lambda p, **o: task_model.generate([p, p], batch_size=2, **o)):
        caplog.clear()
        ask(fits, max_new_tokens=2)
        assert "made for" not in caplog.text
        ask(long, max_new_tokens=2)
        assert "tokens, and the model was made for 24, answers included" in caplog.text


# --- types ----------------------------------------------------------------------------------------


def test_none_is_the_default_and_numpys_numbers_are_numbers() -> None:
    names = [name for name in SamplingParams.__dataclass_fields__ if name != "rules"]
    assert SamplingParams(**dict.fromkeys(names)) == SamplingParams()
    made = SamplingParams(
        seed=np.int64(3), temperature=np.float32(0.5), top_k=np.int32(2), end_tokens=[np.int64(4)]
    )
    assert (made.seed, made.temperature, made.top_k, made.end_tokens) == (3, 0.5, 2, (4,))
    assert [type(v) for v in (made.seed, made.temperature, made.end_tokens[0])] == [int, float, int]
    assert SamplingParams(stop="a").stop == ("a",)
    assert SamplingParams(stop=["a", "b"], end_tokens=5).end_tokens == (5,)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seed", 1.5),
        ("seed", "x"),
        ("top_k", 2.5),
        ("stop", 5),
        ("stop", [5]),
        ("logprobs", True),
        ("max_new_tokens", 2.5),
        ("max_new_tokens", "5"),
        ("temperature", True),
        ("temperature", "0.5"),
        ("temperature", float("nan")),
        ("repetition_penalty", float("inf")),
        ("ignore_end", 1),
        ("end_tokens", ["a"]),
        ("end_tokens", 2.0),
    ],
)
def test_another_type_is_named(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=name):
        SamplingParams(**{name: value})


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_names_that_mean_the_same_are_taken(task_model: Any, name: str) -> None:
    assert len(task_model.run(PROMPT, ignore_eos=True, **{name: 3}).tokens) == 3
    assert len("".join(task_model.stream(PROMPT, **{name: 1}))) <= 1
    first = task_model.run(PROMPT, max_new_tokens=1).tokens[0]
    assert task_model.run(PROMPT, eos_token_id=first, **{name: 9}).tokens == [first]
    with pytest.raises(ConfigError, match=f"max_new_tokens and {name}"):
        task_model.run(PROMPT, **{"max_new_tokens": 3, name: 3})


@pytest.mark.parametrize(
    ("option", "answer"),
    [
        ({"num_return_sequences": 2}, "call generate once for each, with seed="),
        ({"n": 2}, "call generate once for each, with seed="),
        ({"streamer": object()}, "tm.stream"),
        ({"stop_strings": ["a"]}, "stop="),
        ({"logits_processor": []}, "processors="),
        ({"return_dict_in_generate": True}, "tm.run"),
        ({"input_ids": [1]}, "text or messages"),
        ({"num_beams": 3}, "model.generate"),
    ],
)
def test_other_names_are_answered_with_ours(
    task_model: Any, option: dict[str, Any], answer: str
) -> None:
    with pytest.raises(ConfigError, match=next(iter(option))) as told:
        task_model.generate(PROMPT, **option)
    assert answer in told.value.fix


def test_a_misspelt_option_is_answered_with_what_was_meant(task_model: Any) -> None:
    for wrong, meant in (("max_new_token", "max_new_tokens"), ("temprature", "temperature")):
        with pytest.raises(ConfigError, match="unknown sampling option") as told:
            task_model.generate("x", **{wrong: 1})
        assert told.value.fix == f"did you mean {meant}?"
    with pytest.raises(ConfigError) as told:
        task_model.generate("x", zzz=1)
    assert not told.value.fix


def test_options_that_ask_for_nothing_are_taken(task_model: Any) -> None:
    plain = task_model.generate(PROMPT, max_new_tokens=9)
    nothing = {"pad_token_id": 0, "use_cache": True, "num_beams": 1, "num_return_sequences": 1}
    assert task_model.generate(PROMPT, max_new_tokens=9, **nothing) == plain


def test_do_sample_draws_as_transformers_does(task_model: Any) -> None:
    model, before = task_model.model, task_model.model.generation_config
    try:
        model.generation_config = GenerationConfig(pad_token_id=0)
        drawn = task_model.params(do_sample=True)
        assert (drawn.temperature, drawn.top_k, drawn.top_p) == (1.0, 50, 1.0)
        assert task_model.params(do_sample=True, temperature=0.3).temperature == 0.3
        assert task_model.params(do_sample=False, temperature=0.3).temperature == 0.0
        assert task_model.params().temperature == 0.0
        model.generation_config = GenerationConfig(pad_token_id=0, temperature=0.7, top_k=9)
        drawn = task_model.params(do_sample=True)
        assert (drawn.temperature, drawn.top_k) == (0.7, 9)
        with pytest.raises(ConfigError, match="do_sample"):
            task_model.params(do_sample="yes")
    finally:
        model.generation_config = before


@pytest.mark.parametrize(
    "prompt",
    [
        None,
        5,
        b"a",
        ["a", None],
        {"role": "user", "content": "a"},
        [1, 2, 3],
        np.array([1, 2]),
        (letter for letter in "ab"),
        "\ud800",
        [{"role": "user"}],
        [{"content": "a"}],
        [[]],
    ],
)
def test_what_is_no_prompt_is_named(task_model: Any, prompt: Any) -> None:
    with pytest.raises(ConfigError):
        task_model.generate(prompt)
    with pytest.raises(ConfigError):
        task_model.generate(["a", "b"], batch_size=2.5)

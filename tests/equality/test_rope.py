"""Frequencies that depend on the length of the text: the words are ``model.generate``'s, on both
sides of the change and across it, whatever was asked before."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tailored_parts import VOCAB, every, small_head
from transformers import AutoConfig, AutoModelForCausalLM

from tascade.decode.batch import BatchDecoder
from tascade.decode.batch_target import BatchTarget
from tascade.decode.lm_head import finisher, head_override
from tascade.decode.loop import AllNodes, Decoder
from tascade.decode.rope import Rope
from tascade.decode.sampling import SamplingParams
from tascade.decode.target import Target
from tascade.draft.budget import NoDrafter
from tascade.tailor.exact import ExactHeadDecoder
from tascade.tailor.exact_batch import ExactBatchDecoder
from tascade.tailor.head import BatchHead, RequestHead
from tascade.testing import OracleDrafter

CHANGE, N = 48, 24
LENGTHS = (10, CHANGE - 12, CHANGE - 1, CHANGE, CHANGE + 1, CHANGE + 12)
_LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [1.0 + 2 * i for i in range(4)],
    "original_max_position_embeddings": CHANGE,
}
_DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 2.0,
    "original_max_position_embeddings": CHANGE,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "phi3-longrope": (
        "phi3",
        {"rope_parameters": _LONG, "original_max_position_embeddings": CHANGE},
    ),
    "phimoe-longrope": (
        "phimoe",
        {
            "rope_parameters": {**_LONG, "short_mscale": 1.0, "long_mscale": 1.0},
            "original_max_position_embeddings": CHANGE,
            "num_local_experts": 2,
        },
    ),
    "llama-longrope": ("llama", {"rope_parameters": {**_LONG, "factor": 2.0}}),
    "llama-dynamic": ("llama", {"rope_parameters": _DYNAMIC, "max_position_embeddings": CHANGE}),
    "gemma3-dynamic": (
        "gemma3_text",
        {
            "rope_parameters": {
                "full_attention": _DYNAMIC,
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
            "layer_types": ["sliding_attention", "full_attention"],
            "sliding_window": 24,
            "query_pre_attn_scalar": 8,
            "tie_word_embeddings": False,
            "max_position_embeddings": CHANGE,
        },
    ),
    "llama-yarn": ("llama", {"rope_parameters": _YARN}),
}


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    kind, own = MODELS[request.param]
    fields: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "initializer_range": 0.4,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(3)
        config = AutoConfig.for_model(kind, **{**fields, **own})
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def prompt_of(length: int) -> list[int]:
    """Without the padding token, which ``generate`` would not look at."""
    generator = torch.Generator().manual_seed(length)
    return torch.randint(1, VOCAB, (length,), generator=generator).tolist()


def theirs(model: Any, prompt: list[int], n: int = N) -> list[int]:
    """From the state of a model that was asked nothing before.

    Phi-3's own preparation drops the cache at the change, to have all read anew; the installed
    Transformers then hands it the last token alone, and goes on without the text. Without a cache
    it reads all of it at every step, which is what was meant.
    """
    model.generate(torch.tensor([[65]]), max_new_tokens=1, do_sample=False)
    ids, cached = torch.tensor([prompt]), not Rope(model).rereads
    said = model.generate(ids, max_new_tokens=n, do_sample=False, pad_token_id=0, use_cache=cached)
    return said[0, len(prompt) :].tolist()


PARAMS = SamplingParams(max_new_tokens=N)


@pytest.mark.parametrize("wrong_every", [0, 3])
@pytest.mark.parametrize("length", LENGTHS)
def test_words_are_generates(model: Any, length: int, wrong_every: int) -> None:
    prompt = prompt_of(length)
    wanted = theirs(model, prompt)
    target = Target(model)
    Decoder(target, NoDrafter()).generate(prompt_of(100), PARAMS)  # turns what can be turned
    assert Decoder(target, NoDrafter()).generate(prompt, PARAMS).tokens == wanted
    drafter = OracleDrafter(wanted, wrong_every=wrong_every)
    assert Decoder(target, drafter, AllNodes(6)).generate(prompt, PARAMS).tokens == wanted


def test_batches(model: Any) -> None:
    prompts = [prompt_of(length) for length in (*LENGTHS, 100)]
    wanted = [theirs(model, prompt) for prompt in prompts]
    for order in (1, -1):
        made = BatchDecoder(BatchTarget(model), size=3).generate(prompts[::order], PARAMS)
        assert [one.tokens for one in made] == wanted[::order]


def test_streams_that_come_between_each_other(model: Any) -> None:
    prompts = [prompt_of(length) for length in (CHANGE - 5, 10, CHANGE + 20, CHANGE - 5)]
    wanted = [theirs(model, prompt) for prompt in prompts]
    decoder = Decoder(Target(model), NoDrafter())
    streams = [decoder.stream(prompt, PARAMS, returns=True) for prompt in prompts]
    made: list[list[int]] = [[] for _ in prompts]
    for _ in range(N):
        for stream, tokens in zip(streams, made, strict=True):
            tokens += next(stream)[0]
    assert made == wanted


@pytest.mark.parametrize("guesses", [1, 5, 40])
def test_a_head_whose_guesses_are_checked(model: Any, guesses: int) -> None:
    full, finish = head_override(model).full, finisher(model)

    def logits_of(states: torch.Tensor) -> Any:
        return finish(full(states))

    alone = Target(model, small_head(RequestHead, model, 0.3))
    together = BatchTarget(model), small_head(BatchHead, model, 0.3)
    prompts = [prompt_of(length) for length in LENGTHS]
    wanted = [theirs(model, prompt) for prompt in prompts]
    for drafter in (NoDrafter(), OracleDrafter(wanted[1], wrong_every=3)):
        decoder = ExactHeadDecoder(alone, drafter, logits_of, every(guesses))
        made = [decoder.generate(prompt, PARAMS) for prompt in prompts]
        assert [one.tokens for one in made] == wanted
        assert sum(one.extra["misses"] for one in made) > 8
    many = ExactBatchDecoder(*together, logits_of, every(guesses)).generate(prompts, PARAMS)
    assert [one.tokens for one in many] == wanted

"""generate() with the hook gives what generate() gives without it."""

from __future__ import annotations

import queue
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import MaxTimeCriteria, StoppingCriteria, TextIteratorStreamer
from transformers.generation.streamers import BaseStreamer

from tascade.core import EMPTY_TREE, DraftTree, IntArray
from tascade.decode.loop import Decoder
from tascade.decode.target import Target
from tascade.draft.budget import NoDrafter
from tascade.errors import ConfigError
from tascade.integrations.transformers import speculative_generate
from tascade.testing import byte_tokenizer, tiny_model

FAMILIES = ("llama", "qwen2", "gpt_neox")
PROMPT = [5, 9, 2, 7, 5, 9, 2, 7, 5]


class PartlyRight:
    """Drafts what it was told the output will be, with a wrong token in every fourth place."""

    name = "partly-right"

    def __init__(self) -> None:
        self.outputs: dict[tuple[int, ...], list[int]] = {}
        self.accepted = 0
        self.start(np.empty(0, np.int32))

    def start(self, prompt: IntArray) -> None:
        self._next = list(self.outputs.get(tuple(prompt.tolist()), ()))

    def propose(self, limit: int, floor: float = 0.0) -> DraftTree:
        if limit <= 0:
            return EMPTY_TREE
        right = self._next[: min(6, limit)]
        return DraftTree.chain([(t + 1) % 96 if i % 4 == 3 else t for i, t in enumerate(right)])

    def commit(self, tokens: IntArray, verified: int, path: Sequence[int]) -> None:
        self._next = self._next[len(tokens) :]
        self.accepted += len(path)


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> Any:
    return tiny_model(request.param, seed=3)


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny_model("llama", seed=3)


@pytest.fixture(scope="module")
def byte_model() -> tuple[Any, Any]:
    return tiny_model("llama", seed=5, vocab_size=260), byte_tokenizer()


def hook(model: Any, tokenizer: Any = None) -> tuple[Any, PartlyRight]:
    drafter = PartlyRight()
    return speculative_generate(Decoder(Target(model), drafter, tokenizer=tokenizer)), drafter


def both(
    model: Any, rows: Sequence[Sequence[int]], tokenizer: Any = None, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output of generate() and of generate() with the hook, for left-padded rows."""
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    inputs = {"input_ids": ids, "attention_mask": mask}
    plain = model.generate(**inputs, tokenizer=tokenizer, do_sample=False, **options)
    fast, drafter = hook(model, tokenizer)
    for row, output in zip(rows, plain, strict=True):
        drafter.outputs[tuple(row)] = output[width:].tolist()
    got = model.generate(
        **inputs, tokenizer=tokenizer, do_sample=False, custom_generate=fast, **options
    )
    if plain.shape[1] > width + 1:
        assert drafter.accepted > 0, "nothing was drafted: the test would prove nothing"
    return plain, got


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 40},
        {"max_length": 30},
        {"max_new_tokens": 1},
        {"max_new_tokens": 30, "repetition_penalty": 1.3},
        {"max_new_tokens": 30, "no_repeat_ngram_size": 2},
        {"max_new_tokens": 30, "min_new_tokens": 12, "eos_token_id": list(range(40))},
        {"max_new_tokens": 30, "use_cache": False},
    ],
    ids=lambda options: "-".join(options),
)
def test_greedy_output_is_the_same(model: Any, options: dict[str, Any]) -> None:
    plain, got = both(model, [PROMPT], **options)
    assert torch.equal(plain, got)
    assert plain.dtype == got.dtype


def test_end_tokens_one_or_several(model: Any) -> None:
    whole, _ = both(model, [PROMPT], max_new_tokens=24)
    output = whole[0, len(PROMPT) :].tolist()
    for ends in (output[7], [output[11], output[5]]):
        plain, got = both(model, [PROMPT], max_new_tokens=24, eos_token_id=ends)
        assert torch.equal(plain, got)
        assert got.shape[1] < whole.shape[1]


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 25},
        {"max_new_tokens": 25, "repetition_penalty": 1.4},
        {"max_length": 25, "min_new_tokens": 3, "eos_token_id": list(range(12)), "pad_token_id": 0},
    ],
    ids=lambda options: "-".join(options),
)
def test_left_padded_batch_is_the_same(model: Any, options: dict[str, Any]) -> None:
    rows = [PROMPT, [11, 3], [8, 8, 60, 41, 2]]
    plain, got = both(model, rows, **options)
    assert torch.equal(plain, got)


def test_rows_of_a_batch_end_apart_and_are_padded(llama: Any) -> None:
    rows = [PROMPT, [11, 3], [8, 8, 60, 41, 2]]
    whole, _ = both(llama, rows, max_new_tokens=25)
    ends = [int(whole[0, len(PROMPT) + 4]), int(whole[1, len(PROMPT) + 9])]
    plain, got = both(llama, rows, max_new_tokens=25, eos_token_id=ends, pad_token_id=77)
    assert torch.equal(plain, got)
    assert (got[0] == 77).any()
    plain, got = both(llama, rows, max_new_tokens=25, eos_token_id=ends)
    assert torch.equal(plain, got)


def test_stop_strings_end_at_the_same_token(byte_model: tuple[Any, Any]) -> None:
    model, tokenizer = byte_model
    whole, _ = both(model, [PROMPT], max_new_tokens=40)
    output = whole[0, len(PROMPT) :].tolist()
    printable = [t if 32 < t < 127 else None for t in output]
    at = next(i for i in range(3, 38) if printable[i] is not None)
    stop = chr(output[at])
    plain, got = both(model, [PROMPT], tokenizer, max_new_tokens=40, stop_strings=[stop])
    assert torch.equal(plain, got)
    assert got.shape[1] < whole.shape[1]


def test_stop_strings_in_a_batch(byte_model: tuple[Any, Any]) -> None:
    model, tokenizer = byte_model
    rows = [PROMPT, [11, 3], [8, 8, 60, 41, 2]]
    whole, _ = both(model, rows, max_new_tokens=40, eos_token_id=256, pad_token_id=0)
    output = whole[1, len(PROMPT) :].tolist()
    stop = [chr(t) for t in output[4:] if 32 < t < 127][:1]
    options = {"max_new_tokens": 40, "eos_token_id": 256, "pad_token_id": 0}
    plain, got = both(model, rows, tokenizer, stop_strings=stop, **options)
    assert torch.equal(plain, got)
    assert not torch.equal(whole, got)


class StopsAtMultiple(StoppingCriteria):
    """Ends at the first token divisible by seven, and notes every sequence it is shown."""

    def __init__(self) -> None:
        self.seen: list[list[int]] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.seen.append(input_ids[0].tolist())
        return input_ids[:, -1] % 7 == 0


def test_criteria_are_asked_as_plain_decoding_asks_them(model: Any) -> None:
    ids = torch.tensor([PROMPT])
    fast, drafter = hook(model)
    plain_rule, rule = StopsAtMultiple(), StopsAtMultiple()
    options = {"max_new_tokens": 60, "do_sample": False}
    plain = model.generate(ids, stopping_criteria=StoppingCriteriaList([plain_rule]), **options)
    drafter.outputs[tuple(PROMPT)] = [*plain[0, len(PROMPT) :].tolist(), 1, 2, 3]
    got = model.generate(
        ids, stopping_criteria=StoppingCriteriaList([rule]), custom_generate=fast, **options
    )
    assert torch.equal(plain, got)
    assert rule.seen == plain_rule.seen


def test_max_time_ends_after_one_token(llama: Any) -> None:
    fast, _ = hook(llama)
    rule = StoppingCriteriaList([MaxTimeCriteria(0.0)])
    ids = torch.tensor([PROMPT])
    got = llama.generate(ids, stopping_criteria=rule, max_new_tokens=20, custom_generate=fast)
    assert got.shape[1] == len(PROMPT) + 1


def test_processors_see_each_prefix_once_and_in_order(llama: Any) -> None:
    def recorder(seen: list[list[int]]) -> LogitsProcessorList:
        def process(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            seen.append(ids[0].tolist())
            return scores.roll(ids.shape[1] % 3, dims=1)

        return LogitsProcessorList([process])

    ids, plain_seen, seen = torch.tensor([PROMPT]), [], []
    options = {"max_new_tokens": 20, "do_sample": False}
    plain = llama.generate(ids, logits_processor=recorder(plain_seen), **options)
    fast, drafter = hook(llama)
    drafter.outputs[tuple(PROMPT)] = plain[0, len(PROMPT) :].tolist()
    got = llama.generate(ids, logits_processor=recorder(seen), custom_generate=fast, **options)
    assert torch.equal(plain, got)
    assert seen == plain_seen
    assert drafter.accepted > 0


class Recorder(BaseStreamer):
    def __init__(self) -> None:
        self.put_values: list[list[int]] = []
        self.ended = 0

    def put(self, value: torch.Tensor) -> None:
        assert value.device.type == "cpu"
        self.put_values.append(value.reshape(-1).tolist())

    def end(self) -> None:
        self.ended += 1


def test_streamer_is_fed_as_plain_decoding_feeds_it(model: Any) -> None:
    ids = torch.tensor([PROMPT])
    fast, drafter = hook(model)
    plain_stream, stream = Recorder(), Recorder()
    plain = model.generate(ids, max_new_tokens=15, do_sample=False, streamer=plain_stream)
    drafter.outputs[tuple(PROMPT)] = plain[0, len(PROMPT) :].tolist()
    got = model.generate(
        ids, max_new_tokens=15, do_sample=False, streamer=stream, custom_generate=fast
    )
    assert torch.equal(plain, got)
    assert stream.put_values == plain_stream.put_values
    assert stream.ended == 1
    assert drafter.accepted > 0


def test_text_streamer_yields_the_text(byte_model: tuple[Any, Any]) -> None:
    model, tokenizer = byte_model
    fast, _ = hook(model, tokenizer)
    stream = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=5)
    ids = torch.tensor([PROMPT])
    got = model.generate(
        ids, max_new_tokens=15, do_sample=False, streamer=stream, custom_generate=fast
    )
    try:
        text = "".join(stream)
    except queue.Empty:
        pytest.fail("the streamer was never ended")
    assert text == tokenizer.decode(got[0, len(PROMPT) :])


SAMPLED = {
    "do_sample": True,
    "temperature": 0.8,
    "top_k": 20,
    "top_p": 0.9,
    "repetition_penalty": 1.2,
    "max_new_tokens": 30,
}


def test_sampled_output_depends_on_the_seed_alone(model: Any) -> None:
    ids = torch.tensor([PROMPT])
    plain_hook = speculative_generate(Decoder(Target(model), NoDrafter()))
    plain = model.generate(ids, custom_generate=plain_hook, seed=7, **SAMPLED)
    fast, drafter = hook(model)
    drafter.outputs[tuple(PROMPT)] = plain[0, len(PROMPT) :].tolist()
    got = [model.generate(ids, custom_generate=fast, seed=s, **SAMPLED) for s in (7, 7, 8)]
    assert torch.equal(plain, got[0])
    assert torch.equal(got[0], got[1])
    assert not torch.equal(got[0], got[2])
    assert drafter.accepted > 0


def test_without_a_seed_torch_governs_the_draws(llama: Any) -> None:
    ids = torch.tensor([PROMPT])
    fast, _ = hook(llama)
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(llama.generate(ids, custom_generate=fast, **SAMPLED))
    after = llama.generate(ids, custom_generate=fast, **SAMPLED)
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])
    assert not torch.equal(outputs[2], after)


def test_warpers_are_applied_once(llama: Any) -> None:
    # Top-k 1 leaves the greedy path, which a penalty applied twice would change.
    ids = torch.tensor([PROMPT])
    fast, _ = hook(llama)
    greedy = llama.generate(ids, max_new_tokens=20, do_sample=False, repetition_penalty=1.5)
    got = llama.generate(
        ids,
        max_new_tokens=20,
        do_sample=True,
        top_k=1,
        repetition_penalty=1.5,
        custom_generate=fast,
    )
    assert torch.equal(greedy, got)


def test_sampled_first_token_follows_the_distribution_of_generate(llama: Any) -> None:
    ids, n = torch.tensor([PROMPT]), 600
    with torch.no_grad():
        logits = llama(ids).logits[0, -1] / 3.0
    top = logits.topk(5)
    expected = torch.softmax(top.values, 0).double().numpy()
    fast, _ = hook(llama)
    options = {"do_sample": True, "temperature": 3.0, "top_k": 5, "max_new_tokens": 1}
    drawn = [
        int(llama.generate(ids, custom_generate=fast, seed=s, **options)[0, -1]) for s in range(n)
    ]
    counts = np.asarray([drawn.count(int(t)) for t in top.indices])
    assert counts.sum() == n
    chi = float((((counts - n * expected) ** 2) / (n * expected)).sum())
    assert chi < 18.5  # p = 0.001 at four degrees of freedom


def test_row_r_of_a_batch_is_drawn_with_seed_plus_r(llama: Any) -> None:
    fast, _ = hook(llama)
    batch = llama.generate(torch.tensor([PROMPT, PROMPT]), custom_generate=fast, seed=20, **SAMPLED)
    alone = [
        llama.generate(torch.tensor([PROMPT]), custom_generate=fast, seed=s, **SAMPLED)
        for s in (20, 21)
    ]
    assert torch.equal(batch, torch.cat(alone))
    assert not torch.equal(batch[0], batch[1])


def test_a_dict_is_returned_on_request(llama: Any) -> None:
    fast, _ = hook(llama)
    ids = torch.tensor([PROMPT])
    options = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True}
    plain = llama.generate(ids, **options)
    got = llama.generate(ids, custom_generate=fast, **options)
    assert type(got) is type(plain)
    assert torch.equal(got.sequences, plain.sequences)


def test_a_task_model_is_known_by_its_decoder(llama: Any) -> None:
    decoder = Decoder(Target(llama), NoDrafter())
    fast = speculative_generate(SimpleNamespace(decoder=decoder))
    got = llama.generate(torch.tensor([PROMPT]), max_new_tokens=4, custom_generate=fast)
    assert got.shape == (1, len(PROMPT) + 4)
    with pytest.raises(ConfigError, match="no decoder"):
        speculative_generate(SimpleNamespace(decoder=None))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="no decoder"):
        speculative_generate("a-model-name")  # type: ignore[arg-type]


def test_a_generation_config_object_is_followed(llama: Any) -> None:
    fast, _ = hook(llama)
    ids = torch.tensor([PROMPT])
    config = GenerationConfig(max_new_tokens=12, do_sample=False, repetition_penalty=1.2)
    plain = llama.generate(ids, generation_config=config)
    assert torch.equal(plain, llama.generate(ids, generation_config=config, custom_generate=fast))

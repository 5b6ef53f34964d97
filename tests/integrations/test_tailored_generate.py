"""generate() with the masked head gives what it gives with the full head and a mask."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from masked_oracle import ROWS, STATIC, Mask, Recorder, V, ends_of, masking, padded
from transformers import GenerationConfig, LogitsProcessorList

from tascade.config import VocabConfig
from tascade.decode.loop import Decoder
from tascade.decode.sample import SamplingParams
from tascade.draft.none import NoDrafter
from tascade.errors import ConfigError
from tascade.integrations.tailored_generate import masked_generation, union_head
from tascade.integrations.transformers import speculative_generate
from tascade.tailored import Tailored, tailor_model
from tascade.testing import byte_tokenizer, tiny_model

MODELS = ("llama", "llama tied", "phi", "gemma2")  # phi's head has a bias, gemma2's a soft cap


@cache
def tailored(kind: str, vocab: int = V) -> Tailored:
    family, _, tied = kind.partition(" ")
    model = tiny_model(family, seed=3, tie_word_embeddings=bool(tied), vocab_size=vocab)
    if family == "phi":
        torch.nn.init.normal_(model.lm_head.bias, generator=torch.Generator().manual_seed(1))
    return tailor_model(model, STATIC, VocabConfig(head="masked"))


# --- the oracle ---------------------------------------------------------------------------------


def oracle(made: Tailored, rows: Sequence[Sequence[int]], **options: Any) -> Any:
    model, beams = made.target.model, options.get("num_beams", 1) > 1
    torch.manual_seed(5)
    with masking(model, Mask(rows, ends_of(options)), beams):
        return model.generate(**padded(rows), pad_token_id=0, **options)


def masked(made: Tailored, rows: Sequence[Sequence[int]], **options: Any) -> Any:
    torch.manual_seed(5)
    with masked_generation(made, **padded(rows)) as model:
        return model.generate(**padded(rows), pad_token_id=0, **options)


def unmasked(made: Tailored, rows: Sequence[Sequence[int]], **options: Any) -> Any:
    torch.manual_seed(5)
    return made.target.model.generate(**padded(rows), pad_token_id=0, **options)


# --- everything generate can do -----------------------------------------------------------------

LONG = {"max_new_tokens": 9, "do_sample": False}
DRAWN = {"max_new_tokens": 9, "do_sample": True, "temperature": 1.5}


def even_tokens(row: int, ids: torch.Tensor) -> list[int]:
    """A grammar: a token is even, or the one of the row's number."""
    return [*range(0, V, 2), row]


FEATURES: dict[str, dict[str, Any]] = {
    "greedy": LONG,
    "no cache": {**LONG, "use_cache": False},
    "max_length": {"max_length": 16, "do_sample": False},
    "sampling": DRAWN,
    "top-k, top-p": {**DRAWN, "top_k": 12, "top_p": 0.9, "repetition_penalty": 1.2},
    "min-p, typical": {**DRAWN, "top_k": 0, "min_p": 0.02, "typical_p": 0.9},
    "several drawn": {**DRAWN, "num_return_sequences": 3},
    "beams": {**LONG, "num_beams": 4},
    "several beams": {**LONG, "num_beams": 4, "num_return_sequences": 3},
    "beam sampling": {**DRAWN, "num_beams": 3, "num_return_sequences": 2},
    "beams and penalties": {
        **LONG,
        "num_beams": 3,
        "repetition_penalty": 1.3,
        "length_penalty": 0.5,
        "eos_token_id": [int(STATIC[0]), int(STATIC[3]), 2],
    },
    "repetition penalty": {**LONG, "repetition_penalty": 1.6},
    "no repeated pairs": {**LONG, "no_repeat_ngram_size": 2},
    "ends": {**LONG, "eos_token_id": STATIC[:12].tolist()},
    "an end not in the list": {**LONG, "eos_token_id": [90, 91, 92, 93, 94, 95, 1]},
    "no end": {**LONG, "eos_token_id": -1},
    "min_new_tokens": {**LONG, "min_new_tokens": 6, "eos_token_id": STATIC[:12].tolist()},
    "forced end": {**LONG, "forced_eos_token_id": 95, "eos_token_id": 95},
    "decaying length": {
        **LONG,
        "exponential_decay_length_penalty": (1, 1.6),
        "eos_token_id": STATIC[:3].tolist(),
    },
    "grammar": {**LONG, "prefix_allowed_tokens_fn": even_tokens},
    "grammar and beams": {**LONG, "num_beams": 3, "prefix_allowed_tokens_fn": even_tokens},
    "prefill in pieces": {**LONG, "prefill_chunk_size": 4},
    "static cache": {**LONG, "cache_implementation": "static"},
}
OF_THE_LOOP = {"no cache", "max_length", "no end", "prefill in pieces", "static cache", "ends"}
"""Features that ask nothing of the head: tried with one model."""


CASES = [
    (kind, name)
    for name in FEATURES
    for kind in MODELS
    if kind == "llama" or name not in OF_THE_LOOP
]


@pytest.mark.parametrize(("kind", "feature"), CASES)
def test_it_is_the_full_head_with_a_mask_first(kind: str, feature: str) -> None:
    made, options = tailored(kind), FEATURES[feature]
    wanted = oracle(made, ROWS, **options)
    assert torch.equal(masked(made, ROWS, **options), wanted)
    if kind == "llama":
        assert not torch.equal(unmasked(made, ROWS, **options), wanted), "the mask changed nothing"


def test_several_sequences_are_several() -> None:
    for options in (FEATURES["several drawn"], FEATURES["several beams"]):
        assert len(masked(tailored("llama"), ROWS, **options)) == 9


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("option", ["bad_words_ids", "suppress_tokens", "sequence_bias"])
def test_what_is_ruled_out_or_favoured_is_by_token_id(kind: str, option: str) -> None:
    made = tailored(kind)
    width = padded(ROWS)["input_ids"].shape[1]
    said = masked(made, ROWS, **LONG)[:, width:].tolist()
    pair, single = said[0][2:4], said[1][1]
    value: Any = {
        "bad_words_ids": [pair, [single]],
        "suppress_tokens": [pair[1], single],
        "sequence_bias": [[pair, -30.0], [[single], -30.0], [[int(STATIC[2])], 3.0], [[95], 90.0]],
    }[option]
    wanted = oracle(made, ROWS, **LONG, **{option: value})
    assert torch.equal(masked(made, ROWS, **LONG, **{option: value}), wanted)
    assert wanted[:, width:].tolist() != said


def test_stop_strings() -> None:
    made, tokenizer, width = tailored("llama", 260), byte_tokenizer(), max(map(len, ROWS))
    with masked_generation(made, **padded(ROWS)) as model:
        call = {**padded(ROWS), "max_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
        whole = model.generate(**call)
        new = whole[0, width:].tolist()
        stop = next(t for t in new[2:14] if 32 < t < 127)
        ends = {"stop_strings": [chr(stop)], "eos_token_id": 256}
        got = model.generate(**call, tokenizer=tokenizer, **ends)
    at = width + new.index(stop) + 1
    assert got[0, :at].tolist() == whole[0, :at].tolist()
    assert got[0, at:].tolist() == [0] * (got.shape[1] - at)
    assert at < whole.shape[1]


@pytest.mark.parametrize("options", [LONG, DRAWN, {**LONG, "num_beams": 3}], ids=["1", "2", "3"])
@pytest.mark.parametrize("kind", MODELS)
def test_scores_and_logits_are_full_width_and_by_token_id(kind: str, options: dict) -> None:
    ask = {"output_scores": True, "output_logits": True, "return_dict_in_generate": True, **options}
    made, mask = tailored(kind), Mask(ROWS, [])
    got, wanted = masked(made, ROWS, **ask), oracle(made, ROWS, **ask)
    assert torch.equal(got.sequences, wanted.sequences)
    assert len(got.logits) == len(wanted.logits) > 1
    for ours, theirs in zip(got.scores, wanted.scores, strict=True):
        assert torch.equal(ours == -torch.inf, theirs == -torch.inf)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(got.logits, wanted.logits, strict=True):
        torch.testing.assert_close(ours, mask(None, theirs), rtol=1e-4, atol=1e-4)
    if "num_beams" in options:
        torch.testing.assert_close(got.sequences_scores, wanted.sequences_scores)


def test_a_streamer_is_fed_tokens() -> None:
    made, ours, theirs = tailored("llama"), Recorder(), Recorder()
    got = masked(made, ROWS[:1], **LONG, streamer=ours)
    oracle(made, ROWS[:1], **LONG, streamer=theirs)
    assert ours.values == theirs.values
    assert [v[0] for v in ours.values[1:-1]] == got[0, len(ROWS[0]) :].tolist()


def test_a_callers_processor_sees_token_ids_and_the_whole_vocabulary() -> None:
    made, seen = tailored("llama"), []

    def note(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        seen.append((ids.clone(), scores.shape, (scores > -torch.inf).sum(1).tolist()))
        return scores

    got = masked(made, ROWS, **LONG, logits_processor=LogitsProcessorList([note]))
    assert torch.equal(seen[-1][0], got[:, :-1])
    assert all(shape == (3, V) for _, shape, _ in seen)
    sizes = [len({*STATIC.tolist(), *row}) for row in ROWS]
    assert all(counts == sizes for _, _, counts in seen)


# --- one prompt, and others beside it -----------------------------------------------------------


@pytest.mark.parametrize("options", [LONG, {**LONG, "num_beams": 3}], ids=["greedy", "beams"])
@pytest.mark.parametrize("kind", MODELS)
def test_a_prompt_gets_in_a_batch_what_it_gets_alone(kind: str, options: dict[str, Any]) -> None:
    made = tailored(kind)
    width = max(map(len, ROWS))
    for row, found in zip(ROWS, masked(made, ROWS, **options), strict=True):
        alone = masked(made, [row], **options)[0, len(row) :]
        assert found[width:].tolist() == alone.tolist()


@pytest.mark.parametrize("kind", MODELS)
def test_a_forward_over_several_positions(kind: str) -> None:
    made = tailored(kind)
    model, given = made.target.model, padded(ROWS)
    with torch.no_grad():
        wanted = model(**given).logits
        with masked_generation(made, **given):
            found = model(**given).logits
            twice = model(**{k: v.repeat_interleave(2, 0) for k, v in given.items()}).logits
    assert found.shape == wanted.shape
    ruled_out = Mask(ROWS, []).ruled_out[:, None].expand_as(found)
    assert torch.equal(found == -torch.inf, ruled_out)
    torch.testing.assert_close(found, wanted.masked_fill(ruled_out, -torch.inf))
    torch.testing.assert_close(twice, found.repeat_interleave(2, 0))


def test_padding_is_nobodys_token() -> None:
    made = tailored("llama")
    assert 0 not in STATIC
    with torch.no_grad(), masked_generation(made, **padded(ROWS)) as model:
        assert (model(**padded(ROWS)).logits[:, :, 0] == -torch.inf).all()
    ids = torch.tensor([[0, 11, 3]])
    with torch.no_grad(), masked_generation(made, ids) as model:
        assert (model(ids).logits[:, :, 0] > -torch.inf).all()


def test_a_head_made_once_serves_call_after_call() -> None:
    made = tailored("llama")
    head = union_head(made)
    read = made.head.table.rows_read
    for rows in (ROWS, ROWS[:2], ROWS):
        with masked_generation(SimpleNamespace(tailored=made), **padded(rows), head=head) as model:
            got = model.generate(**padded(rows), pad_token_id=0, **LONG)
        assert torch.equal(got, oracle(made, rows, **LONG))
        assert head.length == head.static == len(STATIC)
    assert made.head.table.rows_read - read < 20  # the prompts' own rows, and once
    with masked_generation(made, **padded(ROWS), head=head) as model:
        ended = model.generate(**padded(ROWS), pad_token_id=0, **LONG, eos_token_id=[95, 94])
        assert torch.equal(ended, oracle(made, ROWS, **LONG, eos_token_id=[95, 94]))
        # The end tokens of one call are not the next one's.
        got = model.generate(**padded(ROWS), pad_token_id=0, **LONG)
        assert torch.equal(got, oracle(made, ROWS, **LONG))
        with torch.no_grad():
            found = model(**padded(ROWS)).logits[:, -1] == -torch.inf
        assert torch.equal(found, Mask(ROWS, []).ruled_out)


def test_end_tokens_of_the_model_and_of_a_config() -> None:
    made = tailor_model(tiny_model("llama", seed=3), STATIC, VocabConfig(head="masked"))
    model, ends = made.target.model, [90, 91, 92, 93, 94, 95, 1, 4, 6, 10]
    wanted = oracle(made, ROWS, **LONG, eos_token_id=ends)
    config = GenerationConfig(**LONG, eos_token_id=ends, pad_token_id=0)
    with masked_generation(made, **padded(ROWS)):
        assert torch.equal(model.generate(**padded(ROWS), generation_config=config), wanted)
        assert torch.equal(
            model.generate(
                padded(ROWS)["input_ids"], config, attention_mask=padded(ROWS)["attention_mask"]
            ),
            wanted,
        )
    model.generation_config.eos_token_id = ends
    assert torch.equal(masked(made, ROWS, **LONG), wanted)


# --- and afterwards -----------------------------------------------------------------------------


def as_before(made: Tailored, before: torch.Tensor, head: Any) -> None:
    model = made.target.model
    assert head.length == head.static == len(STATIC)
    assert not {"generate", "generate_batch"} & set(vars(model))
    assert not model._forward_hooks
    assert torch.equal(unmasked(made, ROWS, **LONG), before)


def test_an_error_leaves_the_model_and_the_head_as_they_were() -> None:
    made = tailored("llama")
    head, before = union_head(made), unmasked(made, ROWS, **LONG)
    wanted = masked(made, ROWS, **LONG)

    def breaks(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if ids.shape[1] > 12:
            raise RuntimeError("a caller's mistake")
        return scores

    processors = LogitsProcessorList([breaks])
    with (
        pytest.raises(RuntimeError, match="mistake"),
        masked_generation(made, **padded(ROWS), head=head) as model,
    ):
        model.generate(**padded(ROWS), **LONG, pad_token_id=0, logits_processor=processors)
    as_before(made, before, head)
    with masked_generation(made, **padded(ROWS), head=head) as model:
        with pytest.raises(RuntimeError, match="mistake"):
            model.generate(**padded(ROWS), **LONG, pad_token_id=0, logits_processor=processors)
        assert torch.equal(model.generate(**padded(ROWS), **LONG, pad_token_id=0), wanted)
    as_before(made, before, head)
    with (
        pytest.raises(ConfigError, match="not of this vocabulary"),
        masked_generation(made, torch.tensor([[1, 2], [3, V]]), head=head),
    ):
        pytest.fail("it was let in")
    as_before(made, before, head)


def test_the_task_models_own_loop_goes_on_afterwards() -> None:
    made = tailored("llama")
    decoder = made.decoder(NoDrafter())
    said = decoder.generate(ROWS[0], SamplingParams(max_new_tokens=9)).tokens
    assert masked(made, ROWS[:1], **LONG)[0, len(ROWS[0]) :].tolist() == said
    assert decoder.generate(ROWS[0], SamplingParams(max_new_tokens=9)).tokens == said


def test_a_generate_of_somebody_elses_is_called_and_put_back() -> None:
    made = tailor_model(tiny_model("llama", seed=3), STATIC, VocabConfig(head="masked"))
    model, calls = made.target.model, []

    def theirs(*args: Any, **options: Any) -> Any:
        calls.append(options)
        return type(model).generate(model, *args, **options)

    model.generate = theirs
    assert torch.equal(masked(made, ROWS, **LONG), masked(tailored("llama"), ROWS, **LONG))
    assert len(calls) == 1
    assert model.generate is theirs


# --- what is refused ----------------------------------------------------------------------------

REFUSED: dict[str, Callable[[Any], dict[str, Any]]] = {
    "assistant_model": lambda model: {"assistant_model": copy.copy(model)},
    "prompt_lookup_num_tokens": lambda model: {"prompt_lookup_num_tokens": 3},
    "guidance_scale": lambda model: {"guidance_scale": 1.5},
    "custom_generate": lambda model: {
        "custom_generate": speculative_generate(Decoder(tailored("llama").target, NoDrafter()))
    },
    "penalty_alpha": lambda model: {"penalty_alpha": 0.6, "top_k": 4},
    "dola_layers": lambda model: {"dola_layers": "high"},
    "cache_implementation": lambda model: {"cache_implementation": "paged"},
    "constraints": lambda model: {"generation_config": SimpleNamespace(constraints=["a word"])},
}


@pytest.mark.parametrize("option", REFUSED)
def test_what_would_not_be_masked_is_refused_by_name(option: str) -> None:
    with masked_generation(tailored("llama"), **padded(ROWS[:1])) as model:
        given = REFUSED[option](model)
        with pytest.raises(ConfigError, match=f"cannot honour {option}"):
            model.generate(**padded(ROWS[:1]), max_new_tokens=4, **given)


def test_other_prompts_are_refused() -> None:
    made, given = tailored("llama"), padded(ROWS)
    ids, mask = given["input_ids"], given["attention_mask"]
    with masked_generation(made, ids, mask) as model:
        for other, match in (
            ({"input_ids": ids.flip(0), "attention_mask": mask}, "input_ids"),
            ({"input_ids": ids[:2], "attention_mask": mask[:2]}, "input_ids"),
            ({"input_ids": ids, "attention_mask": torch.ones_like(mask)}, "attention_mask"),
            ({"inputs_embeds": torch.zeros(2, 4, 32)}, "inputs"),
            ({}, "inputs"),
        ):
            with pytest.raises(ConfigError, match=f"cannot honour {match}"):
                model.generate(**other, max_new_tokens=4)
        with pytest.raises(ConfigError, match="cannot honour generate_batch"):
            model.generate_batch([[1, 2]])
        with pytest.raises(ConfigError, match="not sequences of the prompts"), torch.no_grad():
            model(ids[:2])
        with pytest.raises(ConfigError, match="as generate"), torch.no_grad():
            model(ids, return_dict=False)
        with pytest.raises(ConfigError, match="generating with a masked head already"):
            masked_generation(made, ids, mask).__enter__()
        with pytest.raises(ConfigError, match="as generate"):  # the loop has a head of its own
            made.decoder(NoDrafter()).generate(ROWS[0], SamplingParams(max_new_tokens=4))


def test_a_loss_over_the_heads_own_order_of_rows_is_refused() -> None:
    made = tailor_model(tiny_model("llama"), np.arange(V, dtype=np.int32), VocabConfig("masked"))
    labels = padded(ROWS)["input_ids"]
    with (
        torch.no_grad(),
        masked_generation(made, **padded(ROWS)) as model,
        pytest.raises(ConfigError, match="as generate"),
    ):
        model(**padded(ROWS), labels=labels)


def test_embeddings_in_the_prompts_place() -> None:
    made, given = tailored("llama"), padded(ROWS)
    vectors = made.target.model.get_input_embeddings()(given["input_ids"])
    with masked_generation(made, **given) as model:
        got = model.generate(
            inputs_embeds=vectors.detach(),
            attention_mask=given["attention_mask"],
            **LONG,
            pad_token_id=0,
        )
    assert torch.equal(got, oracle(made, ROWS, **LONG)[:, given["input_ids"].shape[1] :])


def test_a_batch_that_is_none_and_a_task_model_without_a_small_head() -> None:
    made = tailored("llama")
    for ids, mask in (
        (torch.tensor([1, 2]), None),
        (torch.zeros(0, 3, dtype=torch.long), None),
        (torch.tensor([[1, 2]]), torch.tensor([[1]])),
    ):
        with pytest.raises(ConfigError, match="no batch"):
            masked_generation(made, ids, mask).__enter__()
    for other in (SimpleNamespace(tailored=None), "a-model-name"):
        with pytest.raises(ConfigError, match="no tailored head"):
            masked_generation(other, torch.tensor([[1]])).__enter__()  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="no tailored head"):
            union_head(other)  # type: ignore[arg-type]
    foreign = union_head(tailored("phi"))
    with pytest.raises(ConfigError, match="another model"):
        masked_generation(made, torch.tensor([[1]]), head=foreign).__enter__()

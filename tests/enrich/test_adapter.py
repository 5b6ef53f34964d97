"""New rows and LoRA: what is trained, what is not, and what survives a disk."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tascade.config import TuneConfig
from tascade.enrich.tokens.merger import TokenMerger
from tascade.enrich.train.embeddings import INITS, init_rows, resize_embeddings
from tascade.enrich.train.lora import lora_parameters, merge, row_parameters, wrap
from tascade.enrich.train.samples import Sample, make_samples
from tascade.enrich.train.trainer import Trainer
from tascade.errors import ConfigError
from tascade.testing import tiny_model

FIRST = 96
EXPANSIONS = [(5, 6, 7), (8, 9), (5, 6)]
CONFIG = TuneConfig(epochs=2, batch=4, learning_rate=1e-2, rank=4)
WARMUP = 4


def samples(count: int = 24, seed: int = 0) -> list[Sample]:
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        prompt = rng.integers(10, 90, int(rng.integers(3, 9))).astype(np.int32)
        parts = [EXPANSIONS[i] for i in rng.integers(0, 3, 3)]
        answer = [t for part in parts for t in part] + [int(rng.integers(10, 90)), 2]
        rows.append((prompt, np.array(answer, np.int32)))
    return make_samples(rows, TokenMerger(EXPANSIONS, FIRST), 64)


def ready(model: Any, config: TuneConfig = CONFIG, warmup: int = WARMUP) -> Trainer:
    resize_embeddings(model, FIRST + len(EXPANSIONS))
    init_rows(model, EXPANSIONS, FIRST)
    wrapped = wrap(model, FIRST, len(EXPANSIONS), config)
    return Trainer(wrapped, samples(), config, warmup)


def logits(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=torch.tensor([ids])).logits[0]


def new_rows(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    tables = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    return tuple(table[FIRST:].detach().clone() for table in tables)  # type: ignore[return-value]


def is_tied(model: Any) -> bool:
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt_neox", "gemma2"])
def test_rows_of_both_tables_are_trained_and_survive_a_disk(
    family: str, tied: bool, tmp_path: Path
) -> None:
    model = tiny_model(family, tie_word_embeddings=tied)
    before = copy.deepcopy(model)
    trainer = ready(model)
    started = new_rows(model)
    trainer.run()
    ids = [11, 12, FIRST, 13, FIRST + 2, 14]
    with torch.inference_mode():
        learned = trainer.model(input_ids=torch.tensor([ids])).logits[0]
    plain = merge(trainer.model)
    assert is_tied(plain) is tied
    for was, now in zip(started, new_rows(plain), strict=True):
        assert (was != now).any(1).all(), "a row was left as it started"
    for old, new in (
        (before.get_input_embeddings(), plain.get_input_embeddings()),
        (before.get_output_embeddings(), plain.get_output_embeddings()),
    ):
        assert torch.equal(old.weight, new.weight[:FIRST]), "a row of the base moved"
    plain.save_pretrained(tmp_path / "tuned")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned")
    assert (logits(plain, ids) - learned).abs().max() < 1e-4
    assert (logits(opened, ids) - logits(plain, ids)).abs().max() < 1e-5
    assert is_tied(opened) is tied


def test_a_bare_list_of_ids_would_leave_the_head_untrained() -> None:
    # The trap that naming both tables avoids: the check above must be able to see it.
    import peft

    model = tiny_model("llama", tie_word_embeddings=False)
    resize_embeddings(model, FIRST + 3)
    init_rows(model, EXPANSIONS, FIRST)
    started = new_rows(model)
    listed = peft.LoraConfig(r=4, target_modules="all-linear", trainable_token_indices=[96, 97, 98])
    trainer = Trainer(peft.get_peft_model(model, listed), samples(), CONFIG, WARMUP)
    trainer.run()
    plain = merge(trainer.model)
    assert not torch.equal(started[0], new_rows(plain)[0])
    assert torch.equal(started[1], new_rows(plain)[1])


def test_without_lora_and_with_new_tokens_masked_it_is_the_base_model() -> None:
    model = tiny_model("llama", tie_word_embeddings=False)
    before = copy.deepcopy(model)
    trainer = ready(model, TuneConfig(epochs=0, batch=4), 8)
    trainer.run()
    assert trainer.state.done == 8
    ids = [11, 12, 13, 14, 15]
    assert torch.equal(logits(merge(trainer.model), ids)[:, :FIRST], logits(before, ids))


def test_spare_rows_are_used_before_the_tables_grow() -> None:
    model = tiny_model("llama")
    resize_embeddings(model, 90)
    assert model.get_input_embeddings().weight.shape[0] == 96
    resize_embeddings(model, 100)
    assert model.get_input_embeddings().weight.shape[0] == 100
    assert model.config.vocab_size == 100


@pytest.mark.parametrize("init", list(INITS))
def test_new_rows_say_what_their_first_token_says(init: str) -> None:
    model = tiny_model("llama", tie_word_embeddings=False)
    resize_embeddings(model, FIRST + 3)
    init_rows(model, EXPANSIONS, FIRST, init)
    head = model.get_output_embeddings().weight
    nearest = torch.nn.functional.cosine_similarity(head[FIRST : FIRST + 1], head[:FIRST]).argmax()
    assert int(nearest) in EXPANSIONS[0]
    if init == "first":
        assert torch.equal(head[FIRST], head[5])


def test_an_unknown_init_is_refused() -> None:
    with pytest.raises(ConfigError, match="unknown init"):
        init_rows(tiny_model("llama"), [], 96, "random")


def test_a_run_that_was_stopped_takes_the_same_steps(tmp_path: Path) -> None:
    whole = ready(tiny_model("llama"))
    whole.run()
    half = ready(tiny_model("llama"))
    half.run(until=7)
    half.save(tmp_path / "state")
    rest = ready(tiny_model("llama"))
    rest.load(tmp_path / "state")
    assert rest.state.done == 7
    rest.run()
    assert rest.state.losses == pytest.approx(whole.state.losses, rel=1e-5)
    for a, b in zip(lora_parameters(whole.model), lora_parameters(rest.model), strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    for a, b in zip(row_parameters(whole.model), row_parameters(rest.model), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_a_state_of_another_run_is_refused(tmp_path: Path) -> None:
    done = ready(tiny_model("llama"))
    done.run(until=2)
    done.save(tmp_path / "state")
    other = ready(tiny_model("llama"), TuneConfig(epochs=2, batch=4, rank=8))
    with pytest.raises(ConfigError, match="another run"):
        other.load(tmp_path / "state")


def test_half_precision_learns_as_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    # A cast of LoRA's weights that outlived a step would freeze them: the loss would stand still.
    last = {}
    for precision in ("float32", "bfloat16"):
        half = precision == "bfloat16"
        monkeypatch.setattr("tascade.enrich.train.trainer.use_bf16", lambda device, on=half: on)
        trainer = ready(tiny_model("llama"), dataclasses.replace(CONFIG, epochs=8), 0)
        trainer.run()
        last[precision] = float(np.mean(trainer.state.losses[-4:]))
        assert last[precision] < 0.6 * trainer.state.losses[0]
    assert last["bfloat16"] == pytest.approx(last["float32"], rel=0.1)

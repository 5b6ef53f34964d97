"""What belongs to the user is as it was after every call: model, tokenizer, random state."""

from __future__ import annotations

import dataclasses
import gc
import json
import random
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import tascade
from brief import BRIEF, OPEN
from tascade import SpecConfig, TaskModel, bundled
from tascade.bench.pack import BenchOptions, bench_pack
from tascade.config import Recipe, TuneConfig, VocabConfig
from tascade.data.load import load_examples
from tascade.enrich.train.embeddings import resize_embeddings
from tascade.enrich.train.lora import wrap
from tascade.integrations.transformers import speculative_generate
from tascade.load import load_model
from tascade.pipeline import tailor, tune
from tascade.testing import byte_tokenizer, tiny_model, toy_examples

ROWS = [{"prompt": e.prompt, "completion": e.completion} for e in toy_examples(48)]
RECIPE = Recipe(max_new_tokens=8, spec=SpecConfig(calibration_rows=2))
EXACT = dataclasses.replace(RECIPE, vocab=VocabConfig(head="exact"))
SHORT: dict[str, Any] = {"max_new_tokens": 6, "ignore_end": True}
DRAWN: dict[str, Any] = {**SHORT, "temperature": 1.0, "seed": 3}


def of_model(model: Any) -> dict[str, Any]:
    """All that is in a model, and all that is said about it."""
    modules = dict(model.named_modules())
    return {
        "weights": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "places": {name: tensor.data_ptr() for name, tensor in model.named_parameters()},
        "modules": {name: id(module) for name, module in modules.items()},
        "types": {name: type(module) for name, module in modules.items()},
        "attributes": {name: set(vars(module)) for name, module in modules.items()},
        "hooks": {
            name: [len(value) for value in vars(module).values() if isinstance(value, OrderedDict)]
            for name, module in modules.items()
        },
        "training": {name: module.training for name, module in modules.items()},
        "learns": {name: p.requires_grad for name, p in model.named_parameters()},
        "config": model.config.to_dict(),
        "attention": model.config._attn_implementation,
        "generation": model.generation_config.to_dict(),
    }


def of_tokenizer(tokenizer: Any) -> dict[str, Any]:
    names = ("padding_side", "truncation_side", "chat_template", "model_max_length")
    about = {name: getattr(tokenizer, name) for name in names}
    return {**about, "backend": json.loads(tokenizer.backend_tokenizer.to_str())}


def draws() -> list[Any]:
    """The random state of everything that a program draws from."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    numbers: Any = np.random.get_state()
    states = [torch.get_rng_state(), *cuda]
    return [random.getstate(), numbers[1].tolist(), numbers[2], *(s.tolist() for s in states)]


def equal(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What differs."""
    found = [key for key in before if key != "weights" and before[key] != after[key]]
    weights = before["weights"], after["weights"]
    if weights[0].keys() != weights[1].keys() or any(
        not torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items()
    ):
        found.append("weights")
    return found


@contextmanager
def nothing_changes(model: Any, tokenizer: Any) -> Iterator[None]:
    about, read, drawn = of_model(model), of_tokenizer(tokenizer), draws()
    yield
    gc.collect()
    assert draws() == drawn
    assert equal(about, of_model(model)) == []
    assert of_tokenizer(tokenizer) == read


@pytest.fixture(scope="module")
def given() -> tuple[Any, Any]:
    """A model that is being trained, but for one module, and a tokenizer that pads and cuts."""
    model = tiny_model("llama", vocab_size=260, attention_dropout=0.3)
    model.train().model.layers[0].eval()
    model.model.embed_tokens.weight.requires_grad_(False)
    tokenizer = byte_tokenizer()
    tokenizer.padding_side, tokenizer.truncation_side = "left", "left"
    tokenizer(["a", "bcd"], padding=True, truncation=True, max_length=9)
    assert tokenizer.backend_tokenizer.truncation is not None
    return model, tokenizer


@pytest.fixture(scope="module")
def pack(given: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packs") / "toy"
    with nothing_changes(*given):
        tascade.adapt(given, ROWS, out=out, recipe=EXACT)
    return out


def dropped(made: TaskModel, **options: Any) -> None:
    next(iter(made.stream("abc", **options)))


def breaks(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    raise ZeroDivisionError


def broken(made: TaskModel, **options: Any) -> None:
    with suppress(ZeroDivisionError):
        made.generate(processors=[breaks], **options)


def ids_of(made: TaskModel) -> dict[str, torch.Tensor]:
    ids = torch.from_numpy(made.encode("ab")).long()[None]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def hooked(made: TaskModel, **options: Any) -> None:
    fast = speculative_generate(made)
    more = {"max_new_tokens": 5, "pad_token_id": 0}
    made.model.generate(**ids_of(made), custom_generate=fast, **more, **options)


CALLS: dict[str, Callable[[TaskModel], Any]] = {
    "run": lambda made: made.run("abc", **SHORT),
    "draw": lambda made: made.generate(["abc", "d"], **DRAWN),
    "batch": lambda made: made.generate(["abc", "d", "ef"], batch_size=2, **SHORT),
    "batch of draws": lambda made: made.generate(["abc", "d", "ef"], batch_size=2, **DRAWN),
    "stream": lambda made: list(made.stream("abc", **SHORT)),
    "stream dropped": lambda made: dropped(made, **SHORT),
    "batch dropped": lambda made: next(
        made.batches(2).stream([made.encode("ab"), made.encode("c")], made.params())
    ),
    "error": lambda made: broken(made, prompt="abc"),
    "error in a batch": lambda made: broken(made, prompt=["abc", "d"], batch_size=2),
    "plain": lambda made: made.plain.generate(made.encode("abc"), made.params(**SHORT)),
    "costs": lambda made: (made.cost, made.tailored and made.tailored.schedule()),
    "generate()": hooked,
    "generate() with draws": lambda made: hooked(made, do_sample=True, seed=3),
}


SLOW = [pytest.param(head, marks=pytest.mark.slow) for head in ("full", "masked")]


@pytest.mark.parametrize("head", ["exact", *SLOW])
def test_calls_leave_everything_as_it_was(given: tuple[Any, Any], pack: Path, head: str) -> None:
    with nothing_changes(*given):
        made = TaskModel.from_pretrained(pack, given, head=head)
    for name, call in CALLS.items():
        with nothing_changes(*given):
            call(made)
        assert name  # which shows in a failure's frame


@pytest.mark.parametrize("head", ["full", "exact"])
def test_answers_are_those_of_evaluation(given: tuple[Any, Any], pack: Path, head: str) -> None:
    made = TaskModel.from_pretrained(pack, given, head=head)
    ids = ids_of(made)
    with nothing_changes(*given):
        said = [made.run("ab", **SHORT).tokens for _ in range(4)]
    other = tiny_model("llama", vocab_size=260)
    wanted = other.generate(**ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert said == [wanted[0, ids["input_ids"].shape[1] :].tolist()] * 4


def test_what_is_saved_opens_and_is_the_same(
    given: tuple[Any, Any], pack: Path, tmp_path: Path
) -> None:
    for head in ("full", "exact", "masked"):
        made = TaskModel.from_pretrained(pack, given, head=head)
        for call in CALLS.values():
            call(made)
    given[0].save_pretrained(tmp_path)
    opened, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    for name, tensor in given[0].state_dict().items():
        assert torch.equal(opened.state_dict()[name], tensor)


def test_a_model_that_was_used_can_be_tuned(given: tuple[Any, Any], pack: Path) -> None:
    used = tiny_model("llama", vocab_size=260)
    made = TaskModel.from_pretrained(pack, (used, given[1]), head="exact")
    made.run("abc", **SHORT)
    made.generate(["abc", "d"], batch_size=2, **SHORT)
    drawn = draws()
    resize_embeddings(used, 270)
    wrapped = wrap(used, 260, 4, TuneConfig(rank=2))
    assert any("lm_head" in name for name, _ in wrapped.named_parameters())
    assert draws() == drawn


# --- the longer calls ---------------------------------------------------------------------------

OWN = dataclasses.replace(RECIPE, spec=SpecConfig(calibration_rows=2, own_answers=True))
PLAIN = [row["completion"] for row in ROWS]


@pytest.mark.parametrize(
    ("data", "recipe"), [(ROWS, RECIPE), (ROWS, OWN), (PLAIN, RECIPE), (ROWS, EXACT)]
)
def test_adapting_leaves_everything_as_it_was(
    given: tuple[Any, Any], data: Any, recipe: Recipe, tmp_path: Path
) -> None:
    with nothing_changes(*given):
        tascade.adapt(given, data, out=tmp_path / "pack", recipe=recipe)


def test_inspecting_leaves_everything_as_it_was(given: tuple[Any, Any]) -> None:
    with nothing_changes(*given):
        tascade.inspect(ROWS, given)


def test_tuning_leaves_a_model_in_training_as_it_was(
    given: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tascade.enrich.train.trainer.EMBEDDING_WARMUP_STEPS", 2)
    brief = dataclasses.replace(BRIEF, prompts=0.1, replay=0.1, epochs=1, batch=16)
    recipe = Recipe(max_new_tokens=4, tune=brief)
    with nothing_changes(*given):
        tune(given, ROWS[:40], held_out=ROWS[40:], out=tmp_path / "m", recipe=recipe)


@pytest.mark.slow
def test_tuning_leaves_the_base_model_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tascade.enrich.train.trainer.EMBEDDING_WARMUP_STEPS", 2)
    monkeypatch.setattr("tascade.enrich.train.train.PROBE_STEPS", 1)
    model, tokenizer, _ = load_model(bundled.model_path(), dtype="float32")
    model.train()
    rows = [
        {"prompt": row.prompt, "completion": row.completion}
        for row in list(load_examples(bundled.data_path("tickets", "train")))[:48]
    ]
    brief = TuneConfig(tokens=4, prompts=0.1, replay=0.1, epochs=1, batch=16, gate=OPEN)
    recipe = Recipe(max_new_tokens=32, tune=brief)
    with nothing_changes(model, tokenizer):
        tune((model, tokenizer), rows[:40], held_out=rows[40:], out=tmp_path / "m", recipe=recipe)


@pytest.mark.slow
def test_tailoring_and_measuring_draw_nothing(ticket_pack: Path, tmp_path: Path) -> None:
    from tascade.pack import Pack

    Pack.open(ticket_pack).copy_to(tmp_path / "pack")
    data = list(load_examples(bundled.data_path("tickets", "train")))[:40]
    drawn = draws()
    tailor(tmp_path / "pack", data, config=VocabConfig(head="exact"))
    methods = ("tasc-spec", "hf-generate", "hf-prompt-lookup")
    options = BenchOptions(methods, rows=2, repeats=1, memory=False)
    bench_pack(tmp_path / "pack", bundled.data_path("tickets", "test"), options=options)
    assert draws() == drawn

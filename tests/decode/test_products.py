"""Products of few rows: another way to the same words, and a model that is left as it was."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import tascade
from tascade.decode import products
from tascade.decode.batch import BatchDecoder
from tascade.decode.batch_target import BatchTarget
from tascade.decode.loop import AllNodes, Decoder
from tascade.decode.products import COUNTS, Product, few_rows
from tascade.decode.sampling import SamplingParams
from tascade.decode.target import Target
from tascade.draft.budget import NoDrafter
from tascade.pack import Pack
from tascade.testing import FAMILIES, RandomTreeDrafter, byte_tokenizer, tiny_model, toy_examples

PROMPTS = [[70 + i, 71, 72, 80 + 2 * i] for i in range(4)]
IDS = torch.tensor([PROMPTS[0]])


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """As on a machine where it is sooner at all counts; holds the rows of every product."""
    assert products._parallel() is not None  # where tests run, torch has GNU's OpenMP
    seen: list[int] = []
    own = Product.__call__

    def counted(self: Product, x: torch.Tensor) -> torch.Tensor:
        seen.append(x.shape[:-1].numel())
        return own(self, x)

    monkeypatch.setattr(products, "sooner", lambda layers: frozenset(COUNTS))
    monkeypatch.setattr(Product, "__call__", counted)
    return seen


def in_bfloat16(model: Any) -> Any:
    """The model as from a checkpoint in bfloat16."""
    return model.to(torch.bfloat16).float()


@given(
    rows=st.integers(1, 70), shape=st.tuples(st.integers(1, 70), st.integers(3, 70)),
    bias=st.booleans(), batch=st.booleans(), strided=st.booleans(), exact=st.booleans(),
)  # fmt: skip
def test_it_is_the_product_of_a_linear_layer(
    rows: int, shape: tuple[int, int], bias: bool, batch: bool, strided: bool, exact: bool
) -> None:
    torch.manual_seed(rows)
    layer = nn.Linear(*shape, bias=bias)
    if exact:
        in_bfloat16(layer)
    x = torch.randn(shape[0], rows).t() if strided else torch.randn(rows, shape[0])
    x = x[None] if batch else x
    product = Product(layer)
    assert (product.halves is not None) == exact
    with torch.inference_mode():
        ours, theirs = product(x), layer(x)
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        assert torch.equal(ours, Product(layer, copy=False)(x))


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_a_row_is_the_same_bit_for_bit_whatever_is_beside_it(threads: int) -> None:
    product, x = Product(nn.Linear(61, 100)), torch.randn(33, 61)
    before = torch.get_num_threads()
    with torch.inference_mode():
        wanted = product(x)
        torch.set_num_threads(threads)
        try:
            for n in range(1, 33):
                assert torch.equal(product(x[:n]), wanted[:n])
        finally:
            torch.set_num_threads(before)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_words_are_those_of_generate(family: str, exact: bool, always: list[int]) -> None:
    model, params = tiny_model(family, vocab_size=260), SamplingParams(max_new_tokens=24)
    if exact:
        in_bfloat16(model)
    target, tokenizer = Target(model), byte_tokenizer()
    drafting = Decoder(target, RandomTreeDrafter(260, 3), AllNodes(), tokenizer)
    plain = Decoder(target, NoDrafter(), None, tokenizer)
    batches = BatchDecoder(BatchTarget(model), tokenizer=tokenizer, size=3)
    together = [made.tokens for made in batches.generate(PROMPTS, params)]
    for prompt, batched in zip(PROMPTS, together, strict=True):
        wanted = model.generate(
            torch.tensor([prompt]), max_new_tokens=24, do_sample=False, eos_token_id=None
        )[0, len(prompt) :].tolist()
        assert drafting.generate(prompt, params).tokens == wanted
        assert plain.generate(prompt, params).tokens == wanted
        assert batched == wanted
    assert {1, 3} <= set(always)  # one row, a batch's
    assert max(always) <= COUNTS[-1]


def test_the_model_is_left_as_it_was_and_others_find_it_so(always: list[int]) -> None:
    model = tiny_model("llama", vocab_size=260)
    before = {name: dict(vars(module)) for name, module in model.named_modules()}

    def fails_amid() -> None:
        with few_rows(model, 4):
            model(IDS)
            used = len(always)
            other = threading.Thread(target=lambda: model(IDS))
            other.start()
            other.join()
            assert len(always) == used > 0
            raise RuntimeError("planted")

    with torch.inference_mode():
        wanted = model(IDS).logits
        with pytest.raises(RuntimeError, match="planted"):
            fails_amid()
        used = len(always)
        assert torch.equal(model(IDS).logits, wanted)
    assert len(always) == used
    after = {name: dict(vars(module)) for name, module in model.named_modules()}
    assert [list(parts) for parts in after.values()] == [list(parts) for parts in before.values()]


def test_half_precision_and_large_passes_are_left_alone(always: list[int]) -> None:
    for model, rows in (
        (tiny_model("llama", vocab_size=260).to(torch.bfloat16), 4),
        (tiny_model("llama", vocab_size=260), COUNTS[-1] + 1),
    ):
        with few_rows(model, rows), torch.inference_mode():
            model(torch.tensor([[70] * rows]))
    assert always == []


def test_what_it_is_not_made_for_is_the_layers_own(always: list[int]) -> None:
    model = tiny_model("llama", vocab_size=260)
    with few_rows(model, 4):
        model(IDS).logits.sum().backward()  # gradients
        with torch.inference_mode(), pytest.raises(RuntimeError):  # as torch says it
            model.lm_head(torch.ones(1, 4, model.lm_head.in_features + 1))
        with torch.inference_mode(), pytest.raises(RuntimeError):
            model.lm_head(torch.ones(1, 4, model.lm_head.in_features, dtype=torch.float64))
    with torch.autocast("cpu", torch.bfloat16), few_rows(model, 4), torch.inference_mode():
        model(IDS)
    assert always == []


def test_without_openmp_it_is_the_usual_product(
    always: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "_parallel", lambda: None)
    model = tiny_model("llama", vocab_size=260)
    products.warm_up()
    with few_rows(model, 4), torch.inference_mode():
        model(IDS)
    assert always == []


def _step(model: Any) -> None:
    model(IDS).logits.square().sum().backward()
    torch.optim.SGD(model.parameters(), 0.1).step()


def _merged(model: Any) -> None:  # as PEFT merges
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            layer.weight.data += 0.1 * torch.randn_like(layer.weight)


def _replaced(model: Any) -> None:
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            layer.weight.data = torch.randn_like(layer.weight)


def _loaded(model: Any) -> None:
    model.load_state_dict({k: v + 0.1 for k, v in model.state_dict().items()})


@pytest.mark.parametrize("change", [_step, _merged, _replaced, _loaded])
@pytest.mark.parametrize("exact", [False, True])
def test_weights_that_change_are_seen(
    change: Callable[[Any], None], exact: bool, always: list[int]
) -> None:
    model = tiny_model("llama", vocab_size=260)
    if exact:
        in_bfloat16(model)
    with few_rows(model, 4), torch.inference_mode():
        model(IDS)
    change(model)
    used = len(always)
    with torch.inference_mode():
        wanted = model(IDS).logits
        with few_rows(model, 4):
            torch.testing.assert_close(model(IDS).logits, wanted, rtol=1e-4, atol=1e-4)
    assert len(always) > used


def test_a_bias_that_is_replaced_is_added() -> None:
    layer, x = nn.Linear(8, 4), torch.randn(3, 8)
    product = Product(layer)
    layer.bias = nn.Parameter(layer.bias.detach() + 1)
    with torch.inference_mode():
        torch.testing.assert_close(product(x), layer(x), rtol=1e-4, atol=1e-5)


def test_weights_that_stay_are_copied_once(
    always: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[nn.Linear] = []
    own = Product.__init__

    def counted(self: Product, layer: nn.Linear, **how: Any) -> None:
        made.append(layer)
        own(self, layer, **how)

    monkeypatch.setattr(Product, "__init__", counted)
    model = in_bfloat16(tiny_model("llama", vocab_size=260))
    with torch.no_grad():
        model.lm_head.weight[:50] = torch.tensor([[float("nan")], [-0.0]]).repeat(25, 1)
    for rows in (1, 4, 4, 2):
        with few_rows(model, rows), torch.inference_mode():
            model(IDS)
    assert len(made) == len(set(made)) > 1


@pytest.mark.parametrize("slow", ["ours", "theirs"])
def test_the_sooner_way_is_chosen(slow: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock is that of the products: one way takes a second, the other two."""
    now = [0.0]

    def taking(way: Any, seconds: float) -> Any:
        def multiply(*given: Any) -> Any:
            now[0] += seconds
            return way(*given)

        return multiply

    made = [Product(nn.Linear(8, 8)), Product(nn.Linear(8, 4))]
    ours, theirs = (2.0, 1.0) if slow == "ours" else (1.0, 2.0)
    monkeypatch.setattr(Product, "__call__", taking(Product.__call__, ours))
    monkeypatch.setattr(nn.Linear, "forward", taking(nn.Linear.forward, theirs))
    monkeypatch.setattr(products.time, "perf_counter", lambda: now[0])
    assert products.sooner(made) == (frozenset(COUNTS) if slow == "theirs" else frozenset())
    assert products.sooner([]) == frozenset()


@pytest.mark.parametrize("counts", [(1, 2), ()])
def test_a_pack_knows_what_was_found_on_this_machine(
    counts: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No trial comes before the first answer of a pack that is opened again, and no copy."""
    trials: list[int] = []

    def trial(layers: list[Product]) -> frozenset[int]:
        trials.append(len(layers))
        return frozenset(counts)

    monkeypatch.setattr(products, "sooner", trial)
    spec = tascade.SpecConfig(calibration_rows=1)
    recipe = tascade.Recipe(dtype="float32", max_new_tokens=8, spec=spec)
    model = in_bfloat16(tiny_model("llama", vocab_size=260))
    tascade.adapt((model, byte_tokenizer()), toy_examples(40), recipe=recipe, out=tmp_path / "pack")
    assert len(trials) == 1
    (costs,) = Pack.open(tmp_path / "pack").info.costs.values()
    assert costs["product_rows"] == list(counts)
    again = in_bfloat16(tiny_model("llama", vocab_size=260))
    opened = tascade.TaskModel.from_pretrained(tmp_path / "pack", (again, byte_tokenizer()))
    opened.generate("an order")
    assert len(trials) == 1
    assert bool(products._made[again].products) == bool(counts)
    assert products.remembered(again) == list(counts)

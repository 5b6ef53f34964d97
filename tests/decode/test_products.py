"""Products of few rows: another way to the same words, and a model that is left as it was."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from tascade.decode import products
from tascade.decode.batch import BatchDecoder
from tascade.decode.batch_target import BatchTarget
from tascade.decode.loop import AllNodes, Decoder
from tascade.decode.products import COUNTS, few_rows, transposed
from tascade.decode.sampling import SamplingParams
from tascade.decode.target import Target
from tascade.draft.budget import NoDrafter
from tascade.testing import FAMILIES, RandomTreeDrafter, byte_tokenizer, tiny_model

PROMPTS = [[70 + i, 71, 72, 80 + 2 * i] for i in range(4)]


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """As on a machine where it is sooner at all counts; holds the rows of every product."""
    seen: list[int] = []
    own = transposed

    def counted(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        seen.append(x.shape[:-1].numel())
        return own(x, weight, bias)

    monkeypatch.setattr(products, "sooner", lambda layers: frozenset(COUNTS))
    monkeypatch.setattr(products, "transposed", counted)
    return seen


@given(
    rows=st.integers(1, 40), shape=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    bias=st.booleans(), batch=st.booleans(), strided=st.booleans(),
)  # fmt: skip
def test_it_is_the_product_of_a_linear_layer(
    rows: int, shape: tuple[int, int], bias: bool, batch: bool, strided: bool
) -> None:
    torch.manual_seed(rows)
    layer = nn.Linear(*shape, bias=bias)
    x = torch.randn(shape[0], rows).t() if strided else torch.randn(rows, shape[0])
    x = x[None] if batch else x
    with torch.inference_mode():
        ours, theirs = transposed(x, layer.weight, layer.bias), layer(x)
    assert ours.shape == theirs.shape
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_words_are_those_of_generate(family: str, always: list[int]) -> None:
    model, params = tiny_model(family, vocab_size=260), SamplingParams(max_new_tokens=24)
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
    ids = torch.tensor([PROMPTS[0]])
    before = {name: dict(vars(module)) for name, module in model.named_modules()}

    def fails_amid() -> None:
        with few_rows(model, 4):
            model(ids)
            used = len(always)
            other = threading.Thread(target=lambda: model(ids))
            other.start()
            other.join()
            assert len(always) == used > 0
            raise RuntimeError("planted")

    with torch.inference_mode():
        wanted = model(ids).logits
        with pytest.raises(RuntimeError, match="planted"):
            fails_amid()
        used = len(always)
        assert torch.equal(model(ids).logits, wanted)
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


@pytest.mark.parametrize("slow", ["linear", "transposed"])
def test_the_sooner_way_is_chosen(slow: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock is that of the products: one way takes a second, the other two."""
    now = [0.0]

    def way(name: str, product: Any) -> Any:
        def multiply(*given: Any) -> Any:
            now[0] += 2.0 if name == slow else 1.0
            return product(*given)

        return multiply

    monkeypatch.setattr(products.functional, "linear", way("linear", functional.linear))
    monkeypatch.setattr(products, "transposed", way("transposed", transposed))
    monkeypatch.setattr(products.time, "perf_counter", lambda: now[0])
    layers = [nn.Linear(8, 8), nn.Linear(8, 4)]
    assert products.sooner(layers) == (frozenset(COUNTS) if slow == "linear" else frozenset())
    assert products.sooner([]) == frozenset()

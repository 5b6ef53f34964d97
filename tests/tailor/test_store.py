"""The store gives what the embedding it replaces gave, bit for bit."""

from __future__ import annotations

import copy

import pytest
import torch
from stored_models import DTYPES, KINDS, VOCAB, make, some_ids
from transformers.models.bart.modeling_bart import BartScaledWordEmbedding
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

from tascade.errors import ConfigError, UnsupportedModelError
from tascade.tailor.offload import full_head as fullhead
from tascade.tailor.offload.embeddings import EmbeddingStore
from tascade.tailor.offload.full_head import FullHead
from tascade.tailor.offload.table import RowTable
from tascade.util import cpu


def store_of(module: torch.nn.Embedding) -> EmbeddingStore:
    return EmbeddingStore.replacing(module, RowTable.from_tensor(module.weight))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_every_family_is_embedded_alike(kind, dtype):
    embedding = make(kind).to(dtype).get_input_embeddings()
    store = store_of(embedding)
    for ids in (some_ids(3, 7), some_ids(9), some_ids(2, 1).int(), torch.empty(2, 0).long()):
        got, wanted = store(ids), embedding(ids)
        assert got.shape == wanted.shape
        assert got.dtype == wanted.dtype == dtype
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", [Gemma3TextScaledWordEmbedding, BartScaledWordEmbedding])
def test_a_scale_rounds_as_it_did(kind, dtype):
    """A buffer is rounded before it is applied, a number is not: in bfloat16 they differ."""
    embedding = kind(VOCAB, 48, None, embed_scale=48**0.5).to(dtype)
    wanted = embedding(some_ids(100))
    assert torch.equal(store_of(embedding)(some_ids(100)), wanted)
    rounded = torch.tensor(48**0.5).to(dtype)
    plain = torch.nn.functional.embedding(some_ids(100), embedding.weight)
    other = plain * (48**0.5 if kind is Gemma3TextScaledWordEmbedding else rounded)
    assert dtype == torch.float32 or not torch.equal(other, wanted)  # so the test can tell


@pytest.mark.parametrize("stored", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_are_converted_as_the_whole_table_would_be(stored, dtype):
    weight = (torch.randn(VOCAB, 16) * 3).to(stored)
    store = EmbeddingStore(RowTable.from_tensor(weight), dtype=stored, scale=torch.tensor(3.3))
    store = store.to(dtype)
    wanted = weight.to(dtype)[some_ids(50)] * torch.tensor(3.3).to(dtype)
    assert torch.equal(store(some_ids(50)), wanted)


def test_the_store_holds_no_table():
    store = store_of(make("gemma-tied").get_input_embeddings())
    assert not list(store.parameters())
    assert sum(buffer.numel() for buffer in store.buffers()) <= 1
    assert not store.state_dict()
    assert copy.deepcopy(store).table is store.table


def test_only_the_rows_of_the_ids_are_read():
    store = store_of(make("llama").get_input_embeddings())
    store(some_ids(2, 5))
    store(some_ids(1, 1))
    assert store.table.rows_read == 11


@pytest.mark.parametrize("bad", [-1, VOCAB, 1 << 40])
def test_an_id_without_a_row_is_refused(bad):
    store = store_of(make("llama").get_input_embeddings())
    with pytest.raises(ConfigError, match="no such row"):
        store(torch.tensor([[0, bad, 1]]))


class NormedEmbedding(torch.nn.Embedding):
    pass


class NormedWithScale(torch.nn.Embedding):
    embed_scale = 2.0


class PlainScaledWordEmbedding(torch.nn.Embedding):
    pass


@pytest.mark.parametrize(
    "module",
    [
        NormedEmbedding(4, 2),
        NormedWithScale(4, 2),
        PlainScaledWordEmbedding(4, 2),
        torch.nn.Embedding(4, 2, max_norm=1.0),
        torch.nn.EmbeddingBag(4, 2),
        torch.nn.Linear(4, 2),
    ],
    ids=lambda module: type(module).__name__,
)
def test_embeddings_that_do_something_else_are_refused(module):
    with pytest.raises(UnsupportedModelError, match=type(module).__name__):
        EmbeddingStore.replacing(module, RowTable.from_tensor(torch.ones(4, 2)))


# --- the whole head -------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [None, torch.linspace(-1, 1, VOCAB)], ids=["plain", "bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_on_a_cpu_the_head_is_the_layer_it_replaces(dtype, bias):
    weight = torch.randn(VOCAB, 24).to(dtype)
    bias = None if bias is None else bias.to(dtype)
    head = FullHead(RowTable.from_tensor(weight), bias)
    for shape in ((24,), (3, 24), (2, 3, 24), (0, 24)):
        hidden = torch.randn(*shape).to(dtype)
        assert torch.equal(head(hidden), torch.nn.functional.linear(hidden, weight, bias))


@pytest.mark.parametrize("multiplies", [True, False], ids=["layer", "blocks"])
@pytest.mark.parametrize("bias", [None, torch.linspace(-1, 1, VOCAB)], ids=["plain", "bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_states_are_checked_and_rounded_as_the_layer_does(dtype, bias, multiplies, monkeypatch):
    """On CPUs that have products in a precision, and on those that have not."""
    monkeypatch.setattr(fullhead, "multiplies", lambda dtype: multiplies)
    monkeypatch.setattr(fullhead, "_CACHED_BYTES", 7 * 24 * 4)  # several blocks, the last one short
    weight = torch.randn(VOCAB, 24).to(dtype)
    bias = None if bias is None else bias.to(dtype)
    head = FullHead(RowTable.from_tensor(weight), bias)
    hidden = torch.randn(33, 24).to(dtype)
    exact = torch.nn.functional.linear(hidden.double(), weight.double())
    exact = exact if bias is None else exact + bias.double()
    got = head.check(hidden)
    assert (got.dtype, got.shape) == (dtype, (33, VOCAB))
    step = {torch.float32: 1e-5, torch.float16: 2**-10, torch.bfloat16: 2**-7}[dtype]
    torch.testing.assert_close(got.double(), exact, rtol=step, atol=step)
    for count in (0, 1, 2, 3, 5, 6, 7, 8, 9, 16, 17):  # libraries have a kernel for each
        few = head.check(hidden[:count])
        assert few.shape == (count, VOCAB)
        torch.testing.assert_close(few, got[:count], rtol=step, atol=step)


@pytest.mark.parametrize(
    ("flags", "bfloat16", "float16"),
    [
        ("flags : fpu avx2 fma", False, False),
        ("flags : avx512_bf16 amx_bf16", True, False),
        ("Features : asimd asimdhp bf16", True, True),
        (None, True, True),
    ],
    ids=["avx2", "amx", "arm", "unknown"],
)
def test_a_cpu_is_asked_for_what_it_multiplies(flags, bfloat16, float16, monkeypatch):
    def read(path):
        if flags is None:
            raise FileNotFoundError
        return flags

    monkeypatch.setattr(cpu.Path, "read_text", read)
    asked = cpu.multiplies.__wrapped__  # what it found here must not stay
    assert asked("float32")
    assert (asked("bfloat16"), asked("float16")) == (bfloat16, float16)


@pytest.mark.parametrize("rows", [1, 2, 100, VOCAB - 1, VOCAB, 2 * VOCAB])
def test_streamed_blocks_add_up_to_the_whole(rows):
    """Stored in another precision than the model's: block by block, never the table at once."""
    weight, bias = torch.randn(VOCAB, 24).bfloat16(), torch.randn(VOCAB)
    seen = []

    class Watched(RowTable):
        def blocks(self, rows):
            for start, block in super().blocks(rows):
                seen.append(len(block))
                yield start, block

    table = Watched.from_tensor(weight)
    head = FullHead(table, bias, block_bytes=rows * 24 * 2)
    hidden = torch.randn(2, 3, 24)
    wanted = torch.nn.functional.linear(hidden, weight.float(), bias)
    got = head(hidden)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    assert max(seen) == min(rows, VOCAB)
    assert sum(seen) == VOCAB
    none = FullHead(table, block_bytes=1)(hidden)
    torch.testing.assert_close(none, wanted - bias, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("rows", [1, 100, VOCAB])
def test_on_a_gpu_blocks_go_through_one_buffer(rows):
    weight = torch.randn(VOCAB, 64, dtype=torch.float16)
    bias = torch.randn(VOCAB, dtype=torch.float16, device="cuda")
    head = FullHead(RowTable.from_tensor(weight), bias, block_bytes=rows * 128).cuda()
    for _ in range(20):
        hidden = torch.randn(3, 64, dtype=torch.float16, device="cuda")
        wanted = torch.nn.functional.linear(hidden, weight.cuda(), bias)
        torch.testing.assert_close(head(hidden), wanted)
    store = EmbeddingStore(RowTable.from_tensor(weight), dtype=torch.float16).cuda()
    for ids in (some_ids(2, 5).cuda(), some_ids(2, 5)):  # these may be on the host
        assert store(ids).is_cuda
        assert torch.equal(store(ids).cpu(), weight[some_ids(2, 5)])

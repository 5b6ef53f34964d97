"""A slim model is the model Transformers loads, without its tables."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from stored_models import DTYPES, KINDS, VOCAB, make, save, some_ids, stock
from transformers import GenerationConfig

from tascade.errors import ConfigError, UnsupportedModelError
from tascade.tailor.offload.checkpoint import INDEX, WEIGHTS
from tascade.tailor.offload.embeddings import EmbeddingStore, IOEmbeddings
from tascade.tailor.offload.load import OffloadedModel, load_offloaded
from tascade.testing import byte_tokenizer


def tables_of(model) -> set[str]:
    """Names of the tensors a slim model does not have."""
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    return {
        f"{name}.{leaf}"
        for name, module in model.named_modules(remove_duplicate=False)
        for leaf in ("weight", "bias")
        if any(module is end for end in ends)
    }


def check_same(slim: OffloadedModel, plain) -> None:
    """Same logits, same embeddings, and the same everything else."""
    ids = some_ids(2, 13)
    model = slim.model
    assert type(model) is type(plain)
    assert isinstance(model.get_input_embeddings(), EmbeddingStore)
    assert torch.equal(model.get_input_embeddings()(ids), plain.get_input_embeddings()(ids))
    with torch.no_grad():
        assert torch.equal(model(ids).logits, plain(ids).logits)
    assert model.dtype == plain.dtype
    assert not any(module.training for module in model.modules())
    assert model.config.vocab_size == VOCAB
    assert model.config.to_dict() == plain.config.to_dict()
    assert model.config._attn_implementation == plain.config._attn_implementation
    assert model.generation_config.to_dict() == plain.generation_config.to_dict()
    assert model.name_or_path == plain.name_or_path
    wanted = {k: v for k, v in plain.state_dict().items() if k not in tables_of(plain)}
    own = model.state_dict()
    assert own.keys() == wanted.keys()
    assert all(torch.equal(own[k], v) and own[k].dtype == v.dtype for k, v in wanted.items())
    buffers = {k: v for k, v in plain.named_buffers() if not k.endswith("embed_scale")}
    mine = dict(model.named_buffers())
    assert all(torch.equal(mine[k], v) and mine[k].dtype == v.dtype for k, v in buffers.items())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_every_family_is_loaded_as_by_transformers(tmp_path, kind, dtype, caplog):
    save(tmp_path, kind, dtype)
    plain = stock(tmp_path)
    with caplog.at_level(logging.WARNING):
        slim = load_offloaded(tmp_path, device="cpu")
    assert not caplog.records  # no report of tensors that were not expected
    check_same(slim, plain)
    assert slim.tied == (slim.head is slim.embedding) == KINDS[kind][1]
    tensors = load_file(tmp_path / WEIGHTS)
    for table in (slim.embedding, slim.head):
        name = table.where.rpartition(": ")[2]
        assert torch.equal(table.rows, tensors[name])
    bias = plain.get_output_embeddings().bias
    assert (slim.head_bias is None) == (bias is None)
    assert bias is None or (torch.equal(slim.head_bias, bias) and bias.abs().max() > 0.9)
    assert slim.tokenizer("hi").input_ids == byte_tokenizer()("hi").input_ids


@pytest.mark.parametrize("kind", ["llama", "gemma-tied", "phi", "gpt2-tied"])
def test_text_is_generated_alike(tmp_path, kind):
    save(tmp_path, kind)
    plain, slim = stock(tmp_path), load_offloaded(tmp_path, device="cpu").model
    ids = some_ids(2, 5)
    for how in ({"do_sample": False}, {"do_sample": True, "temperature": 1.5}, {"num_beams": 3}):
        said = []
        for model in (plain, slim):
            torch.manual_seed(0)
            mask = torch.ones_like(ids)
            said.append(model.generate(ids, attention_mask=mask, max_new_tokens=12, **how))
        assert torch.equal(*said)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["gemma-tied", "phi", "gpt_neox"])
def test_another_precision_than_the_stored_one(tmp_path, kind, stored):
    save(tmp_path, kind, stored)
    plain = stock(tmp_path, dtype=torch.float32)
    slim = load_offloaded(tmp_path, dtype="float32", device="cpu")
    assert slim.embedding.dtype == stored
    model, ids = slim.model, some_ids(2, 13)
    assert torch.equal(model.get_input_embeddings()(ids), plain.get_input_embeddings()(ids))
    assert model.dtype == torch.float32
    if slim.head_bias is not None:
        assert slim.head_bias.dtype == torch.float32  # the model's, not the file's
        assert torch.equal(slim.head_bias, plain.get_output_embeddings().bias)
    with torch.no_grad():  # the head's table is converted in blocks, so sums may round differently
        got, wanted = model(ids).logits, plain(ids).logits
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-4)


def test_a_sharded_checkpoint(tmp_path):
    save(tmp_path, "phi", max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    check_same(load_offloaded(str(tmp_path), device="cpu"), stock(tmp_path))


def test_the_generation_config_comes_along(tmp_path):
    save(tmp_path, "llama-tied")
    GenerationConfig(eos_token_id=[7, 9], temperature=0.3, do_sample=True).save_pretrained(tmp_path)
    slim = load_offloaded(tmp_path, device="cpu")
    assert slim.model.generation_config.eos_token_id == [7, 9]
    check_same(slim, stock(tmp_path))


def test_a_model_of_the_hubs_cache(tmp_path, monkeypatch):
    """Files of a snapshot are links to the cache's own names."""
    repository = tmp_path / "models--someone--tiny"
    snapshot, blobs = repository / "snapshots" / ("0" * 40), repository / "blobs"
    save(snapshot, "llama", max_shard_size="20KB")
    blobs.mkdir()
    for number, file in enumerate(sorted(snapshot.iterdir())):
        file.rename(blobs / str(number))
        file.symlink_to(Path("../../blobs") / str(number))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    slim = load_offloaded("someone/tiny", device="cpu")
    plain = stock(snapshot)
    with torch.no_grad():
        assert torch.equal(slim.model(some_ids(2, 5)).logits, plain(some_ids(2, 5)).logits)
    assert slim.name == slim.model.name_or_path == "someone/tiny"
    with pytest.raises(ConfigError, match="someone/other"):
        load_offloaded("someone/other", device="cpu")


# --- names of the tables --------------------------------------------------------------------------


def edit(folder: Path, change) -> Path:
    """Rewrite a checkpoint's tensors."""
    tensors = change(load_file(folder / WEIGHTS))
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


def test_old_names_are_those_transformers_knows(tmp_path):
    save(tmp_path, "gpt_neox")
    assert "embed_out.weight" in load_file(tmp_path / WEIGHTS)  # lm_head in the model


@pytest.mark.parametrize("kind", ["llama-tied", "gpt2-tied"])
def test_names_without_the_prefix_of_the_base_model(tmp_path, kind):
    save(tmp_path, kind)
    edit(tmp_path, lambda all: {k.partition(".")[2]: v for k, v in all.items()})
    slim = load_offloaded(tmp_path, device="cpu")
    assert slim.embedding.where.rpartition(": ")[2] in ("embed_tokens.weight", "wte.weight")
    check_same(slim, stock(tmp_path))


def test_a_tied_checkpoint_that_holds_only_the_heads_tensor(tmp_path):
    save(tmp_path, "llama-tied")
    edit(
        tmp_path,
        lambda all: {k.replace("model.embed_tokens", "lm_head"): v for k, v in all.items()},
    )
    slim = load_offloaded(tmp_path, device="cpu")
    assert slim.tied
    check_same(slim, stock(tmp_path))


@pytest.mark.parametrize("same", [True, False])
def test_a_tied_checkpoint_that_holds_both_is_tied_if_they_are_equal(tmp_path, same):
    save(tmp_path, "llama-tied")

    def add(tensors):
        table = tensors["model.embed_tokens.weight"].clone()
        if not same:
            table[-1, -1] += 1
        return {**tensors, "lm_head.weight": table}

    edit(tmp_path, add)
    slim = load_offloaded(tmp_path, device="cpu")
    assert slim.tied == same
    check_same(slim, stock(tmp_path))


def without(*names: str):
    return lambda tensors: {k: v for k, v in tensors.items() if k not in names}


def plus(name: str, tensor: torch.Tensor):
    return lambda tensors: {**tensors, name: tensor}


@pytest.mark.parametrize(
    ("kind", "change", "error", "says"),
    [
        ("llama", without("lm_head.weight"), UnsupportedModelError, "lm_head.weight"),
        ("llama", without("model.embed_tokens.weight"), UnsupportedModelError, "embed_tokens"),
        ("llama-tied", without("model.embed_tokens.weight"), UnsupportedModelError, "embed_tokens"),
        ("phi", without("lm_head.bias"), UnsupportedModelError, "lm_head.bias"),
        (
            "gpt_neox",
            without("embed_out.weight"),
            UnsupportedModelError,
            "(lm_head|embed_out).weight",
        ),
        ("llama", plus("lm_head.weight_scale", torch.ones(2)), UnsupportedModelError, "_scale"),
        ("llama", plus("lm_head.weight", torch.ones(VOCAB + 1, 32)), ConfigError, "shape"),
        ("llama", plus("lm_head.weight", torch.ones(VOCAB, 32).char()), ConfigError, "int8"),
        ("phi", plus("lm_head.bias", torch.ones(VOCAB + 1)), ConfigError, "bias"),
        ("gpt2-tied", plus("transformer.wte.weight", torch.ones(3)), ConfigError, "vocabulary"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_tables_that_are_not_right_are_refused_before_loading(
    tmp_path, kind, change, error, says, monkeypatch
):
    save(tmp_path, kind)
    load_offloaded(tmp_path, device="cpu")
    edit(tmp_path, change)
    monkeypatch.setattr("tascade.tailor.offload.load._body", None)
    with pytest.raises(error, match=says):
        load_offloaded(tmp_path, device="cpu")


def test_saving_it_without_its_tables_is_refused(tmp_path):
    save(tmp_path / "model", next(iter(KINDS)))
    slim = load_offloaded(tmp_path / "model")
    with pytest.raises(UnsupportedModelError, match="saved without them"):
        slim.model.save_pretrained(tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_an_adapter_is_refused(tmp_path):
    save(tmp_path, "llama")
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "x"}')
    with pytest.raises(UnsupportedModelError, match="adapter"):
        load_offloaded(tmp_path, device="cpu")


def test_a_hostile_index_is_refused_before_transformers_follows_it(tmp_path):
    inside = save(tmp_path / "inside", "llama", max_shard_size="20KB")
    index = json.loads((inside / INDEX).read_text())
    shard = index["weight_map"]["lm_head.weight"]
    (inside / shard).rename(tmp_path / shard)
    index["weight_map"] = {
        k: f"../{v}" if v == shard else v for k, v in index["weight_map"].items()
    }
    (inside / INDEX).write_text(json.dumps(index))
    stock(inside)  # which does
    with pytest.raises(ConfigError, match="out of the folder"):
        load_offloaded(inside, device="cpu")


@pytest.mark.parametrize("damage", ["config.json", WEIGHTS, "tokenizer.json"])
def test_what_is_not_a_model_is_refused(tmp_path, damage):
    save(tmp_path, "llama")
    (tmp_path / damage).write_bytes(b'{"model_type": 7')
    with pytest.raises(ConfigError):
        load_offloaded(tmp_path, device="cpu")
    with pytest.raises(ConfigError):
        load_offloaded(tmp_path / "nowhere", device="cpu")


def test_models_with_other_ends_are_refused():
    class Twice(torch.nn.Linear):
        pass

    model = make("llama")
    model.lm_head = Twice(32, VOCAB)
    with pytest.raises(UnsupportedModelError, match="Twice"):
        IOEmbeddings.of(model)
    model = make("llama-tied")
    model.all_tied_weights_keys["model.other.weight"] = "model.embed_tokens.weight"
    with pytest.raises(UnsupportedModelError, match="other"):
        IOEmbeddings.of(model)
    with pytest.raises(UnsupportedModelError, match="get_output_embeddings"):
        IOEmbeddings.of(make("llama").model)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("kind", ["llama", "llama-tied"])
def test_a_gpu_never_holds_the_tables(tmp_path, kind):
    make(kind, vocab_size=60_000, hidden_size=256).half().save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    torch.zeros(1, device="cuda")
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    slim = load_offloaded(tmp_path, device="cuda")
    body = sum(tensor.nbytes for tensor in slim.model.state_dict().values())
    assert torch.cuda.max_memory_allocated() - before <= body * 1.05 + (1 << 20)
    assert body < slim.embedding.nbytes / 4
    model = stock(tmp_path).cuda()
    ids = some_ids(2, 5).cuda()
    with torch.no_grad():
        torch.testing.assert_close(slim.model(ids).logits, model(ids).logits)

"""A causal LM without its vocabulary tables on the device: not even while it is loaded."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tascade.errors import UnsupportedModelError
from tascade.load import (
    check_complete,
    check_files,
    check_ref,
    checkpoint_folder,
    load_tokenizer,
    loading,
    note_slow_precision,
    pick_device,
)
from tascade.tailor.offload.checkpoint import Checkpoint
from tascade.tailor.offload.embeddings import (
    EmbeddingStore,
    IOEmbeddings,
    Tables,
    find_tables,
    unexpected_patterns,
)
from tascade.tailor.offload.full_head import FullHead
from tascade.tailor.offload.table import RowTable


@dataclass(frozen=True, slots=True, eq=False)
class OffloadedModel:
    """A model whose input embedding is an :class:`EmbeddingStore`, and the tables it left out.

    ``head`` is ``embedding`` itself in a model whose two tables are one (``tied``).
    """

    model: Any
    tokenizer: Any
    name: str
    embedding: RowTable
    head: RowTable
    head_bias: torch.Tensor | None
    tied: bool


def load_offloaded(
    name: str | Path,
    *,
    dtype: str = "auto",
    device: str = "auto",
) -> OffloadedModel:
    """Load a model as Transformers would, but for its two vocabulary tables.

    They stay in the checkpoint, memory-mapped: neither the host nor the device ever holds a copy.
    All else (precision, generation config, attention, rotary tables, renamed weights) is left to
    ``from_pretrained``. Such a model is for generating: its ``save_pretrained`` is refused, since
    the checkpoint would have no tables. (VocabTailor, section 3.2.)

    Args:
        name: a hub id or a folder; the weights must be safetensors. Remote code is never run.
        dtype: precision of the model; ``auto`` is the checkpoint's. The tables keep theirs.
        device: where to put the rest; ``auto`` is a GPU if there is one.

    Raises:
        ConfigError: nothing loadable under that name, a damaged checkpoint, or a model without its
            tokenizer.
        UnsupportedModelError: the tables cannot be found or left out, or an adapter is in the
            folder.
    """
    check_ref(name)
    name = str(name)
    kind = dtype if dtype == "auto" else getattr(torch, dtype)
    with loading(name):
        check_files(name)
        tokenizer = load_tokenizer(name)
        config, skeleton = _skeleton(name)
        weights = getattr(config, "transformers_weights", None)
        folder = checkpoint_folder(name, weights)
    _refuse_adapter(folder)
    ends = IOEmbeddings.of(skeleton)
    tables = find_tables(Checkpoint(folder, weights), skeleton, ends)
    EmbeddingStore.replacing(ends.embedding, tables.embedding)  # refuses before anything is loaded
    with loading(name):
        slim, ends = _body(type(skeleton), tables, name, config, kind)
    slim = slim.to(pick_device(device))
    note_slow_precision(slim, dtype)
    slim.save_pretrained = _refuse_saving
    return _furnished(slim, tokenizer, name, ends, tables)


def _furnished(
    model: Any, tokenizer: Any, name: str, ends: IOEmbeddings, tables: Tables
) -> OffloadedModel:
    """Install the store and the head in a model."""
    device, bias = model.device, tables.bias
    if bias is not None:
        bias = bias.to(device, ends.head.bias.dtype, copy=True)
    store = EmbeddingStore.replacing(ends.embedding, tables.embedding)
    ends.put(model, store.to(device).eval(), FullHead(tables.head, bias).to(device).eval())
    ends.untie(model)
    return OffloadedModel(model, tokenizer, name, tables.embedding, tables.head, bias, tables.tied)


def _skeleton(name: str) -> tuple[Any, Any]:
    """The config of a model, and the model without any memory for its weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    whole = AutoConfig.from_pretrained(name)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(copy.deepcopy(whole), trust_remote_code=False)
    # A model of text and images may be of a kind whose text model has a class of its own.
    config = whole if type(whole) is type(skeleton.config) else whole.get_text_config()
    return config, skeleton


def _body(
    kind: type[Any], tables: Tables, name: str, config: Any, dtype: Any
) -> tuple[Any, IOEmbeddings]:
    """Let Transformers load a model that has no tables, and say what its ends would have been.

    The tables are taken out of a subclass as soon as it is constructed, while nothing has memory
    yet: the loader finds no place for their tensors and leaves them in the file.
    """
    taken: list[IOEmbeddings] = []

    def construct(self: Any, *args: Any, **kwargs: Any) -> None:
        kind.__init__(self, *args, **kwargs)
        ends = IOEmbeddings.of(self)
        ends.put(self, torch.nn.Identity(), torch.nn.Identity())
        ends.untie(self)
        known = self._keys_to_ignore_on_load_unexpected or ()
        self._keys_to_ignore_on_load_unexpected = {*known, *unexpected_patterns(tables, ends)}
        taken.append(ends)

    place = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    subclass: Any = type(kind.__name__, (kind,), {"__init__": construct, **place})
    model, report = subclass.from_pretrained(
        name, config=config, dtype=dtype, use_safetensors=True, output_loading_info=True
    )
    check_complete(report, name)
    model.__class__ = kind
    return model, taken[-1]


def _refuse_saving(save_directory: Any, *args: Any, **kwargs: Any) -> None:
    raise UnsupportedModelError(
        "a model without its vocabulary tables would be saved without them",
        got=f"save_pretrained({str(save_directory)!r})",
        wanted="a whole model",
        fix="load it with AutoModelForCausalLM.from_pretrained and save that",
    )


def _refuse_adapter(folder: Path) -> None:
    if (folder / "adapter_config.json").is_file():
        raise UnsupportedModelError(
            "an adapter is not loaded without the vocabulary tables of its model",
            got="adapter_config.json",
            wanted="a whole model",
            where=str(folder),
            fix="merge the adapter into the model (merge_and_unload) and save that",
        )

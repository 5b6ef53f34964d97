"""The two vocabulary tables of a causal LM: their modules, and an embedding off the device."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch

from tascade.errors import ConfigError, UnsupportedModelError
from tascade.tailor.offload.checkpoint import Checkpoint
from tascade.tailor.offload.table import RowTable


class EmbeddingStore(torch.nn.Module):
    """Stands in for a model's input embedding; the rows come from a :class:`RowTable`.

    What it returns is bit for bit what the embedding it replaces would: the row of each id in the
    model's precision, scaled where the model's family scales it (Gemma). It follows the model to
    another device or precision, but has no parameter, and no buffer that grows with the table. On
    an accelerator a call waits for its ids to reach the host, unless they are there already.
    (VocabTailor, section 3.2.)

    Args:
        table: rows [V, d].
        dtype: the model's precision.
        scale: factor of every row: a 0-d tensor is rounded to the model's precision first, a
            number is not.
    """

    takes_host_ids = True
    """Ids may be on the CPU, wherever the model is; its rows come out where the model is."""

    _like: torch.Tensor

    def __init__(
        self, table: RowTable, *, dtype: torch.dtype, scale: torch.Tensor | float | None = None
    ) -> None:
        super().__init__()
        self.table = table
        self.num_embeddings, self.embedding_dim = table.shape
        self.register_buffer("_like", torch.empty(0, dtype=dtype), persistent=False)
        if isinstance(scale, torch.Tensor):
            self.register_buffer("embed_scale", scale, persistent=False)
        else:
            self.embed_scale = scale

    @classmethod
    def replacing(cls, module: torch.nn.Module, table: RowTable) -> EmbeddingStore:
        """The store that does what ``module`` does, which may be on the meta device.

        Raises:
            UnsupportedModelError: an embedding that does more than look up, or look up and scale.
        """
        if not isinstance(module, torch.nn.Embedding) or module.max_norm is not None:
            raise _no_plain_embedding(module)
        scale = getattr(module, "embed_scale", None)
        scaled = type(module).__name__.endswith("ScaledWordEmbedding")
        if scaled != (scale is not None) or not (scaled or type(module) is torch.nn.Embedding):
            raise _no_plain_embedding(module)
        if isinstance(scale, torch.Tensor) and scale.is_meta:
            # What Transformers fills the buffer with once the weights are loaded.
            scale = torch.tensor(module.scalar_embed_scale, dtype=scale.dtype)
        return cls(table, dtype=module.weight.dtype, scale=scale)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Rows [..., d] of ids [...], on the model's device and in its precision.

        Raises:
            ConfigError: an id that has no row.
        """
        rows = self.table.gather(input_ids.reshape(-1))
        # The stored type travels (it is never wider than need be), the device converts.
        rows = rows.to(self._like.device).to(self._like.dtype)
        rows = rows.view(*input_ids.shape, self.embedding_dim)
        if isinstance(self.embed_scale, torch.Tensor):
            return rows * self.embed_scale.to(rows.dtype)
        return rows if self.embed_scale is None else rows * self.embed_scale

    def extra_repr(self) -> str:
        """Size and place of the table, for printing the model."""
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.table.where!r}"


def _no_plain_embedding(module: torch.nn.Module) -> UnsupportedModelError:
    return UnsupportedModelError(
        "this model's embedding cannot be kept off the device",
        got=f"{type(module).__module__}.{type(module).__name__}",
        wanted="torch.nn.Embedding, or one of Transformers' ...ScaledWordEmbedding",
        fix="use the model without tailoring its vocabulary",
    )


@dataclass(frozen=True, slots=True)
class IOEmbeddings:
    """Input embedding and LM head of a model, with their names in it.

    ``tied``: the model says that both use one tensor (a checkpoint may still hold two).
    """

    embedding_name: str
    embedding: Any
    head_name: str
    head: Any
    tied: bool

    @classmethod
    def of(cls, model: Any) -> IOEmbeddings:
        """Find them by the model's own ``get_input_embeddings`` and ``get_output_embeddings``.

        Raises:
            UnsupportedModelError: there is none, the head is no plain linear layer, or their
                tensors are tied to others as well.
        """
        embedding_name, embedding = _end(model, "get_input_embeddings")
        head_name, head = _end(model, "get_output_embeddings")
        tied = _declared_tied(model, embedding_name, head_name)
        ends = cls(embedding_name, embedding, head_name, head, tied)
        if type(ends.head) is not torch.nn.Linear:
            raise _unsupported(model, f"LM head: {type(ends.head).__name__}", "torch.nn.Linear")
        return ends

    def put(self, model: Any, embedding: torch.nn.Module, head: torch.nn.Module) -> None:
        """Install other modules in their places."""
        for name, module in ((self.embedding_name, embedding), (self.head_name, head)):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, module)

    def untie(self, model: Any) -> None:
        """Make the model forget that its ends' tensors are tied: they are gone from it."""
        ours = {f"{self.embedding_name}.weight", f"{self.head_name}.weight"}
        for attribute in ("all_tied_weights_keys", "_tied_weights_keys"):
            ties = getattr(model, attribute, None)
            if isinstance(ties, dict):
                kept = {a: b for a, b in ties.items() if not {a, b} & ours}
                setattr(model, attribute, kept)


@dataclass(frozen=True, slots=True)
class Tables:
    """The ends' tensors; ``head`` is ``embedding`` itself where the checkpoint holds one."""

    embedding: RowTable
    head: RowTable
    bias: torch.Tensor | None
    names: tuple[str, ...]
    """Checkpoint names of all tensors of the ends, used or not."""

    @property
    def tied(self) -> bool:
        """Whether both ends use one table."""
        return self.head is self.embedding


def find_tables(checkpoint: Checkpoint, model: Any, ends: IOEmbeddings) -> Tables:
    """Map the tables of a checkpoint, without loading the model.

    A tensor has the name of the model's parameter there, or one that ends alike (a checkpoint may
    have another prefix). An LM head of an older name is known by its shape, which no tensor but the
    tables has.

    Args:
        checkpoint: the model's.
        model: of the checkpoint's kind, possibly on the meta device.
        ends: of that model.

    Raises:
        UnsupportedModelError: a table is not there under any of the names, or comes with tensors a
            plain layer has not (a quantised one).
        ConfigError: a table of another shape or type than the model's.
    """
    shapes, modules = checkpoint.shapes, {ends.embedding_name: ends.embedding}
    modules[ends.head_name] = ends.head
    stored = {name: _stored_name(shapes, f"{name}.weight", m) for name, m in modules.items()}
    if stored[ends.head_name] is None and not ends.tied:
        size = tuple(ends.head.weight.shape)
        others = [k for k in shapes if k.endswith(".weight") and shapes[k] == size]
        others = [key for key in others if key not in stored.values()]
        stored[ends.head_name] = others[0] if len(others) == 1 else None
    lacking = [f"{name}.weight" for name, key in stored.items() if key is None]
    if len(lacking) > ends.tied:
        raise _unsupported(
            model,
            f"a checkpoint with {sorted(shapes)[:5]} ...",
            f"tensors {' and '.join(lacking)}, under these or their original names",
        )
    found = {name: key.removesuffix("weight") for name, key in stored.items() if key is not None}
    ours = [key for key in shapes if key.startswith(tuple(found.values()))]
    bias = f"{found.get(ends.head_name, ends.head_name + '.')}bias"
    known = {*stored.values(), bias}
    if extra := sorted(set(ours) - known):
        raise _unsupported(model, f"tensors {extra}", f"only {sorted(map(str, known))}")
    tables = [
        _sized(RowTable.from_checkpoint(checkpoint, key + "weight"), modules[name])
        for name, key in found.items()
    ]
    # Transformers ties two stored tensors only where they are equal.
    if ends.tied and _equal(tables[0], tables[-1]):
        tables = tables[:1]
    return Tables(tables[0], tables[-1], _bias(checkpoint, bias, model, ends), tuple(ours))


def unexpected_patterns(tables: Tables, ends: IOEmbeddings) -> set[str]:
    """What Transformers may call the tables' tensors when a model has no place for them."""
    names = {f"{ends.embedding_name}.weight", f"{ends.head_name}.weight", f"{ends.head_name}.bias"}
    # The model's prefix is added or dropped where that finds a place, which here it cannot.
    names |= {name.partition(".")[2] for name in names if name.count(".") > 1} | set(tables.names)
    return {f"^{re.escape(name)}$" for name in names}


def _stored_name(shapes: dict[str, tuple[int, ...]], name: str, module: Any) -> str | None:
    """A checkpoint's name of a parameter of the model; ``None`` if there is no such tensor."""
    if name in shapes:
        return name
    tail = "." + ".".join(name.split(".")[-2:])
    alike = [key for key in shapes if f".{key}".endswith(tail)]
    if len(alike) > 1:
        alike = [key for key in alike if shapes[key] == tuple(module.weight.shape)]
    return alike[0] if len(alike) == 1 else None


def _end(model: Any, getter: str) -> tuple[str, Any]:
    """Name and module of what one of the model's getters gives."""
    try:
        module = getattr(model, getter)()
    except (NotImplementedError, AttributeError):
        module = None
    for name, other in model.named_modules(remove_duplicate=False):
        if other is module and name:
            return name, module
    raise _unsupported(model, f"{getter}() gives {module}", "a module of the model")


def _declared_tied(model: Any, embedding: str, head: str) -> bool:
    ours = {f"{embedding}.weight", f"{head}.weight"}
    ties = [{a, b} for a, b in (getattr(model, "all_tied_weights_keys", None) or {}).items()]
    touching = [pair for pair in ties if pair & ours]
    if any(pair != ours for pair in touching):
        raise _unsupported(model, f"tied tensors {touching}", "at most the two tables tied")
    return bool(touching)


def _sized(table: RowTable, module: Any) -> RowTable:
    if table.shape != tuple(module.weight.shape):
        raise ConfigError(
            "the checkpoint's vocabulary table has another shape than config.json says",
            got=list(table.shape),
            wanted=str(list(module.weight.shape)),
            where=table.where,
        )
    return table


def _equal(one: RowTable, other: RowTable) -> bool:
    if one is other or (one.shape, one.dtype) != (other.shape, other.dtype):
        return one is other
    return torch.equal(one.rows, other.rows)


def _bias(checkpoint: Checkpoint, key: str, model: Any, ends: IOEmbeddings) -> torch.Tensor | None:
    """The head's bias [V], as stored under ``key``."""
    if ends.head.bias is None:
        return None
    if key not in checkpoint.shapes:
        raise _unsupported(model, "a checkpoint without it", f"the tensor {ends.head_name}.bias")
    bias = checkpoint.tensor(key)
    if bias.shape != ends.head.bias.shape:
        raise ConfigError(
            "the LM head's bias has another shape than config.json says",
            got=list(bias.shape),
            wanted=str(list(ends.head.bias.shape)),
            where=f"{checkpoint.folder}: {key}",
        )
    return bias


def _unsupported(model: Any, got: str, wanted: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        "the vocabulary tables of this model cannot be kept off the device",
        got=got,
        wanted=wanted,
        where=type(model).__name__,
        fix="use the model without tailoring its vocabulary",
    )

"""An embedding whose table stays off the device: each call brings only the rows it needs."""

from __future__ import annotations

import torch

from tascade.errors import UnsupportedModelError
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
            raise _unsupported(module)
        scale = getattr(module, "embed_scale", None)
        scaled = type(module).__name__.endswith("ScaledWordEmbedding")
        if scaled != (scale is not None) or not (scaled or type(module) is torch.nn.Embedding):
            raise _unsupported(module)
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


def _unsupported(module: torch.nn.Module) -> UnsupportedModelError:
    return UnsupportedModelError(
        "this model's embedding cannot be kept off the device",
        got=f"{type(module).__module__}.{type(module).__name__}",
        wanted="torch.nn.Embedding, or one of Transformers' ...ScaledWordEmbedding",
        fix="use the model without tailoring its vocabulary",
    )

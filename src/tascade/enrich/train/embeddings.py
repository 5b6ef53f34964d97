"""Rows of the embedding and of the LM head for new tokens, begun from their constituents'.

A model that has never seen a token still knows its parts. Which init is best differs between
models (arXiv 2608.03494 compares twenty), so that a short probe picks among these.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from tascade.enrich.train.samples import seeded
from tascade.errors import ConfigError, UnsupportedModelError

Table = torch.Tensor
"""Rows of constituents [n, d]."""


def _mean(rows: Table) -> Table:
    return rows.mean(0)


def _mean_of_their_length(rows: Table) -> Table:
    """The mean, as long as its constituents are: a mean of many is short."""
    mean, length = rows.mean(0), torch.linalg.vector_norm(rows, dim=1).mean()
    scaled: Table = mean * (length / torch.linalg.vector_norm(mean).clamp_min(1e-12))
    return scaled


def _towards(first: bool) -> Callable[[Table], Table]:
    """Halving weights from the first constituent on, or from the last one back (AdaptiVocab)."""

    def weigh(rows: Table) -> Table:
        weights = 0.5 ** torch.arange(len(rows), dtype=torch.float32, device=rows.device)
        weights = weights if first else weights.flip(0)
        return (weights[:, None] * rows).sum(0) / weights.sum()

    return weigh


INITS: dict[str, tuple[Callable[[Table], Table], Callable[[Table], Table]]] = {
    "mean": (_mean_of_their_length, _mean),
    "weighted": (_towards(first=False), _towards(first=True)),
    "first": (_towards(first=False), lambda rows: rows[0]),
}
"""How an input row and a head row start, from those of the constituents [n, d].

``mean``: TASC-ft's, the input row rescaled; ``weighted``: AdaptiVocab (arXiv 2503.19693);
``first``: the head row of the first constituent, which is what the model would say here anyway.
Where input and head share a table, the head's start is taken: a row must be said before it is ever
read.
"""


def resize_embeddings(model: Any, rows: int) -> None:
    """Give a model at least ``rows`` rows, the old ones bit for bit as they were.

    Raises:
        UnsupportedModelError: a model without an LM head, or that cannot be resized.
    """
    if model.get_output_embeddings() is None:
        raise UnsupportedModelError(
            "the model has no LM head to extend",
            got=type(model).__name__,
            wanted="a causal language model",
        )
    if model.get_input_embeddings().weight.shape[0] < rows:
        with seeded(0, model.device):  # the new rows are drawn at first
            model.resize_token_embeddings(rows, mean_resizing=False)


def init_rows(
    model: Any, expansions: Sequence[Sequence[int]], first: int, init: str = "mean"
) -> None:
    """Set the rows of new tokens from those of the base ids they stand for.

    Args:
        model: with room for them (see :func:`resize_embeddings`).
        expansions: base ids of each new token.
        first: the id of the first one.
        init: one of :data:`INITS`.

    Raises:
        ConfigError: an unknown init.
    """
    if init not in INITS:
        raise ConfigError("unknown init", got=init, wanted=", ".join(INITS), where="tune.init")
    of_input, of_head = INITS[init]
    inputs, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    with torch.no_grad():
        for number, ids in enumerate(expansions):
            at, parts = first + number, torch.tensor(list(ids), device=inputs.device)
            old_input, old_head = inputs[parts].float(), head.weight[parts].float()
            inputs[at] = of_input(old_input).to(inputs.dtype)
            head.weight[at] = of_head(old_head).to(head.weight.dtype)
            if getattr(head, "bias", None) is not None:
                head.bias[at] = head.bias[parts[0]]

"""What a batch costs: cross-entropy of the answers' tokens, and how far first tokens drift."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional

from tascade.config import TuneConfig
from tascade.enrich.train.samples import Batch


class AnswerLoss:
    """The loss of a batch.

    Args:
        config: ``length_power`` and ``kl``.
        expansions: base ids of each new token.
        first: the id of the first one.
    """

    def __init__(self, config: TuneConfig, expansions: Sequence[Sequence[int]], first: int) -> None:
        self.config, self.first = config, first
        self._head = torch.tensor([e[0] for e in expansions], dtype=torch.long)
        lengths = [1] * first + [len(e) for e in expansions]
        self._weights = torch.tensor(lengths, dtype=torch.float32) ** config.length_power

    def __call__(self, model: Any, batch: Batch) -> torch.Tensor:
        """Mean over the answers' tokens."""
        logits = _logits(model, batch)
        known = batch.targets >= 0
        said, wanted = logits[known].float(), batch.targets[known]
        if self.config.length_power:
            weights = self._weights.to(wanted.device)[wanted]
            each = functional.cross_entropy(said, wanted, reduction="none")
            loss = (weights * each).sum() / weights.sum()
        else:
            loss = functional.cross_entropy(said, wanted)
        if self.config.kl:
            loss = loss + self.config.kl * self._drift(model, batch, said)
        return loss

    def _drift(self, model: Any, batch: Batch, said: torch.Tensor) -> torch.Tensor:
        """KL(base || student) of the next base token, summed over the tokens that begin with it.

        The base model reads the same answers written in base tokens.
        """
        assert batch.base is not None
        with torch.no_grad(), model.disable_adapter():
            base = _logits(model, batch.base)[batch.base.targets >= 0][:, : self.first].float()
        student = said.softmax(-1)
        n = said.shape[1] - self.first
        head = self._head[:n].to(said.device)
        firsts = student[:, : self.first].index_add(
            1, head, student[:, self.first : self.first + len(head)]
        )
        firsts = firsts.clamp_min(1e-9).log()
        target = base.log_softmax(-1)
        return functional.kl_div(firsts, target, reduction="batchmean", log_target=True)


def _logits(model: Any, batch: Batch) -> torch.Tensor:
    output = model(
        input_ids=batch.ids, attention_mask=batch.mask, logits_to_keep=batch.kept, use_cache=False
    )
    logits: torch.Tensor = output.logits
    return logits[:, -batch.kept :]

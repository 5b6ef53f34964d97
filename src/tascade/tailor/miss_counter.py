"""Decoding with a small head alone, and counting what it could not say."""

from __future__ import annotations

from typing import Any

import torch

from tascade.core import Drafter, DraftTree
from tascade.decode.loop import Decoder, NodeBudget, Request
from tascade.decode.target import Target
from tascade.decode.verify import Walk
from tascade.errors import ConfigError
from tascade.tailor.exact import Full


class MissCounter(Decoder):
    """As :class:`Decoder`, and looks with the full head at each token's place.

    ``Generation.extra["misses"]`` counts the tokens of an answer in whose place the full head would
    have taken one that the small head has not: none, and the answer is plain decoding's.

    Args:
        target: with a small head.
        full: the full head, with what the model does to its logits.
        drafter, budget, tokenizer: as in :class:`Decoder`.
    """

    def __init__(
        self,
        target: Target,
        drafter: Drafter,
        full: Full,
        budget: NodeBudget | None = None,
        tokenizer: Any = None,
    ) -> None:
        super().__init__(target, drafter, budget, tokenizer)
        if target.head is None:
            raise ConfigError("there is nothing to miss", got="no head", wanted="a small head")
        self.head, self.full = target.head, full

    def commit(self, request: Request, base: int, tree: DraftTree, outcome: Walk) -> None:
        """Keep what was accepted; count what the head could not say."""
        rows = [0, *(node + 1 for node in outcome.path)][: len(outcome.tokens)]
        extra, chooser = request.result.extra, request.chooser
        extra.setdefault("misses", 0)
        for i, logits in enumerate(self.full(self.target.states[rows])):
            said = outcome.tokens[:i]
            before = request.prefix(said) if chooser.needs_prefix else _NO_PREFIX
            wanted = chooser.choose(logits, before, len(request.result.tokens) + i)
            extra["misses"] += wanted not in self.head
        super().commit(request, base, tree, outcome)


_NO_PREFIX = torch.empty(1, 0, dtype=torch.long)

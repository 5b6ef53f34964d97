"""The target's hidden states for a drafter that reads them: taken as it runs, kept as keys are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from tascade.errors import UnsupportedModelError


class Taps:
    """Takes the states that enter some layers of a model.

    Args:
        model: a causal model of Transformers.
        layers: numbers of the layers, ascending.

    Raises:
        UnsupportedModelError: its layers cannot be found.
    """

    def __init__(self, model: Any, layers: Sequence[int]) -> None:
        found = _layers(model)
        self._layers = [found[layer] for layer in layers]
        self.states = torch.empty(0)

    @contextmanager
    def taking(self) -> Iterator[None]:
        """While the model runs: ``states`` [B, T, taps * d] are those of its last pass."""
        parts: list[torch.Tensor] = []

        def take(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            parts.append(given[0] if given else named["hidden_states"])

        hooks = [layer.register_forward_pre_hook(take, with_kwargs=True) for layer in self._layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        self.states = torch.cat(parts, dim=-1)


def _layers(model: Any) -> nn.ModuleList:
    body = model.get_decoder() if hasattr(model, "get_decoder") else model.base_model
    count = int(model.config.get_text_config().num_hidden_layers)
    for module in body.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise UnsupportedModelError(
        "the layers of this model cannot be found",
        got=type(model).__name__,
        wanted=f"a list of {count} decoder layers",
        fix="use it without a trained drafter",
    )


class CachedStates:
    """The target's hidden states of the cached tokens, for a drafter that reads them.

    Kept in the pieces that the passes made, and rewound as the keys are. ``start``: the first
    cached token that they are known of, since a cache may begin with keys alone.
    """

    def __init__(self) -> None:
        self.start = self.end = 0
        self._pieces: list[torch.Tensor] = []
        self._fresh, self._at = torch.empty(0), 0

    def passed(self, at: int, states: torch.Tensor) -> None:
        """A pass over tokens behind the ``at`` cached ones had these states [n, width]."""
        if not self._pieces:
            self.start = self.end = at
        self._fresh, self._at = states, at

    def keep(self, base: int, slots: Sequence[int]) -> None:
        """As the cache's own ``keep``."""
        behind = base - self._at
        if behind + len(slots) > 0 and behind >= 0 and len(self._fresh) and self._at == self.end:
            kept = self._fresh[:behind]
            if slots:
                rows = torch.tensor(slots, device=kept.device) + behind
                kept = torch.cat((kept, self._fresh[rows]))
            self._pieces.append(kept)
            self.end += len(kept)
        self._fresh = torch.empty(0)
        self.cut(base + len(slots))

    def cut(self, length: int) -> None:
        """Keep those of the first ``length`` cached tokens."""
        while self._pieces and self.end > length:
            last = self._pieces.pop()
            self.end -= len(last)
            if self.end < length:
                self._pieces.append(last[: length - self.end])
                self.end = length
        if not self._pieces:
            self.start = self.end = length

    def behind(self, first: int) -> torch.Tensor:
        """[n, width] of the cached tokens from number ``first`` on, which is ``start`` or later."""
        found, end = [], self.end
        for piece in reversed(self._pieces):
            end -= len(piece)
            found.append(piece[max(0, first - end) :])
            if end <= first:
                break
        return torch.cat(found[::-1])

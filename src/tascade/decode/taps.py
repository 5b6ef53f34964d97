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
        self.layers = tuple(layers)
        self._layers = [found[layer] for layer in layers]
        self.states: tuple[torch.Tensor, ...] = ()

    @contextmanager
    def taking(self) -> Iterator[None]:
        """While the model runs: ``states``, [B, T, d] of each layer, are those of its last pass."""
        parts: list[torch.Tensor] = []

        def take(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            parts.append(given[0] if given else named["hidden_states"])

        hooks = [layer.register_forward_pre_hook(take, with_kwargs=True) for layer in self._layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        self.states = tuple(parts)


def body_of(model: Any) -> Any:
    """A causal model without its LM head."""
    return model.get_decoder() if hasattr(model, "get_decoder") else model.base_model


def _layers(model: Any) -> nn.ModuleList:
    body = body_of(model)
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


Piece = tuple[tuple[torch.Tensor, ...], list[int]]
"""States [n, d] of each tap in one pass, and which rows of them were kept."""


class CachedStates:
    """The target's hidden states of the cached tokens, for a drafter that reads them.

    Kept as the passes made them, and rewound as the keys are; put together when they are asked for,
    since they seldom are. ``start``: the first cached token that they are known of, since a cache
    may begin with keys alone; ``end``: the one behind the last.
    """

    def __init__(self) -> None:
        self.start = self.end = 0
        self._pieces: list[Piece] = []
        self._fresh: tuple[torch.Tensor, ...] = ()
        self._at = 0

    def passed(self, at: int, states: tuple[torch.Tensor, ...]) -> None:
        """A pass over tokens behind the ``at`` cached ones had these states, [n, d] of each tap."""
        if not self._pieces:
            self.start = self.end = at
        self._fresh, self._at = states, at

    def keep(self, base: int, slots: Sequence[int]) -> None:
        """As the cache's own ``keep``."""
        behind = base - self._at
        if self._fresh and self._at == self.end and behind >= 0 and behind + len(slots):
            self._pieces.append((self._fresh, [*range(behind), *(behind + s for s in slots)]))
            self.end += behind + len(slots)
        self._fresh = ()
        self.cut(base + len(slots))

    def cut(self, length: int) -> None:
        """Keep those of the first ``length`` cached tokens."""
        while self._pieces and self.end > length:
            states, rows = self._pieces.pop()
            self.end -= len(rows)
            if self.end < length:
                self._pieces.append((states, rows[: length - self.end]))
                self.end = length
        if not self._pieces:
            self.start = self.end = length

    def behind(self, first: int) -> torch.Tensor:
        """[n, taps * d] of the cached tokens from number ``first`` on; it is ``start`` or later."""
        found, end = [], self.end
        for states, rows in reversed(self._pieces):
            end -= len(rows)
            wanted = rows[max(0, first - end) :]
            if wanted != [*range(wanted[0], wanted[0] + len(wanted))]:
                found.append(torch.cat([state[wanted] for state in states], dim=-1))
            else:
                part = slice(wanted[0], wanted[0] + len(wanted))
                found.append(torch.cat([state[part] for state in states], dim=-1))
            if end <= first:
                break
        return torch.cat(found[::-1])

"""Products of a few rows in float32 on a CPU, the way that is sooner on this machine.

A pass over a draft multiplies a few rows with every weight. Done as ``x W^T``, as a linear layer
has it, MKL on a CPU without AVX-512 first copies the weights into blocks, for every product anew;
``W x^T`` reads them as they lie. Elsewhere the first way may be the sooner one, so both are timed,
once for a model. What it gains: ``benchmarks/few_rows.py``, ``benchmarks/few_rows.json``.

Sums are ordered otherwise then. That concerns the last bits of float32, as the size of a pass does
in any case; half precision, where such bits change words, is left alone.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn import functional

COUNTS = (2, 4, 8, 16, 32)
"""Row counts that are timed; a pass goes by the next one."""
_FILLED = 16
"""Up to here rows are filled up to one of the counts: 16 are sooner multiplied than 12."""
_WEIGHTS = 1 << 25
"""Weights that are multiplied in a trial: more than caches hold, few enough for a short one."""
_ROUNDS, _CLEARLY = 4, 0.95

_chosen: WeakKeyDictionary[Any, tuple[list[nn.Linear], frozenset[int]]] = WeakKeyDictionary()
"""By model: its layers, and the counts that ``W x^T`` is sooner for."""


def transposed(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """A linear layer as ``(W x^T)^T``: [..., d] -> [..., n], as ``torch.nn.functional.linear``."""
    rows = x.reshape(-1, x.shape[-1])
    n = len(rows)
    if n < _FILLED and n not in COUNTS:
        rows = functional.pad(rows, (0, 0, 0, _count(n) - n))
    # By rows again: attention takes a slower kernel for what lies by columns.
    out = torch.mm(weight, rows.t())[:, :n].t().contiguous()
    if bias is not None:
        out += bias
    return out.view(*x.shape[:-1], len(weight))


@contextmanager
def few_rows(model: Any, rows: int) -> Iterator[None]:
    """Multiply as is sooner for a pass over so many rows, in this thread, while the block lasts.

    The layers are the model's own, and are left as they were. To be used by whoever has the model
    to himself (:func:`tascade.decode.exclusive.exclusive`).
    """
    layers = _layers(model, rows)
    us = threading.get_ident()
    try:
        for layer in layers:
            vars(layer)["forward"] = _forward(layer, us)
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def _forward(layer: nn.Linear, us: int) -> Callable[[torch.Tensor], torch.Tensor]:
    def forward(x: torch.Tensor) -> torch.Tensor:
        multiply = transposed if threading.get_ident() == us else functional.linear
        return multiply(x, layer.weight, layer.bias)

    return forward


def _layers(model: Any, rows: int) -> list[nn.Linear]:
    """The layers that ``W x^T`` is sooner for; none where it is not."""
    if rows > COUNTS[-1] or model.device.type != "cpu" or model.dtype != torch.float32:
        return []
    if model not in _chosen:
        found = [layer for layer in model.modules() if _plain(layer)]
        _chosen[model] = found, sooner(found)
    layers, counts = _chosen[model]
    return layers if _count(rows) in counts else []


def _count(rows: int) -> int:
    return next(count for count in COUNTS if count >= rows)


def _plain(layer: nn.Module) -> bool:
    """Whether this is a linear layer and nothing else, in float32 on a CPU."""
    if type(layer) is not nn.Linear or "forward" in vars(layer):
        return False
    weight = layer.weight
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and weight.is_contiguous()


@torch.inference_mode()
def sooner(layers: list[nn.Linear]) -> frozenset[int]:
    """For which of the counts ``W x^T`` is clearly sooner, by the least of some rounds a layer."""
    total = sum(layer.weight.numel() for layer in layers)
    some = layers[:: max(1, round(total / _WEIGHTS))]
    found = set()
    for rows in COUNTS:
        inputs = [torch.ones(1, rows, layer.in_features) for layer in some]
        least = {way: [float("inf")] * len(some) for way in (functional.linear, transposed)}
        for multiply in _ROUNDS * tuple(least):  # in turns, each layer's weights out of the caches
            for i, (x, layer) in enumerate(zip(inputs, some, strict=True)):
                least[multiply][i] = min(least[multiply][i], _seconds(multiply, x, layer))
        if sum(least[transposed]) < _CLEARLY * sum(least[functional.linear]):
            found.add(rows)
    return frozenset(found)


def _seconds(multiply: Callable[..., torch.Tensor], x: torch.Tensor, layer: nn.Linear) -> float:
    start = time.perf_counter()
    multiply(x, layer.weight, layer.bias)
    return time.perf_counter() - start

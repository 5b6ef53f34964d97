"""Products of a few rows in float32 on a CPU, as fast as their weights can be read.

A pass over a draft multiplies a few rows with every weight, and lasts as long as it takes to read
them. Here each is read once for all rows, where MKL on a CPU without AVX-512 first copies them into
blocks, for every product anew. And where a layer's weights are those of a checkpoint in bfloat16,
the lower half of each float32 is zero: a copy of the upper halves gives the same numbers in half
the bytes. Which way is the sooner one depends on the machine, so both are timed, once for a model.
What it gains: ``benchmarks/few_rows.py``, ``benchmarks/few_rows.json``.

Sums are ordered otherwise then. That concerns the last bits of float32, as the size of a pass does
in any case; half precision, where such bits change words, is left alone.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from tascade.decode import product_kernels as kernels

COUNTS = (1, 2, 4, 8, 16, 32, 64)
"""Row counts that are timed; a pass goes by the next one."""
_WEIGHTS = 1 << 25
"""Weights that are multiplied in a trial: more than caches hold, few enough for a short one."""
_ROUNDS, _CLEARLY = 4, 0.95
_MOST_COPIED = 1 << 31
"""Weights of a model with a copy: 4 GiB of halves."""
_PROBES = 8
"""Weights of each layer that are compared with the copy in every pass."""
_OPENMP = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")

Multiply = Callable[[torch.Tensor], torch.Tensor]


class Product:
    """A linear layer's ``x W^T + b``, each weight read once for all rows of ``x``.

    Args:
        layer: with weights in float32 on a CPU.
        copy: read them from a copy in half the bytes, where it would be the same numbers.
    """

    def __init__(self, layer: nn.Linear, *, copy: bool = True) -> None:
        self.layer, weight = layer, layer.weight.detach()
        self.address, self.version = weight.data_ptr(), layer.weight._version
        lower, upper = weight.view(torch.int16).view(*weight.shape, 2).unbind(2)
        exact = copy and not bool(lower.any())
        self.halves = upper.contiguous() if exact else None
        self._run, self._start = kernels.compiled(exact), _parallel()
        self._read = weight.data_ptr() if self.halves is None else self.halves.data_ptr()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[..., d] -> [..., m], as the layer itself."""
        m, d = self.layer.out_features, self.layer.in_features
        rows = x.contiguous()
        n = rows.numel() // d
        out = torch.empty(*x.shape[:-1], m)
        given = rows.data_ptr(), self._read, out.data_ptr(), n, d, m
        asked = (ctypes.c_int64 * kernels.JOB)(*given)
        self._start(self._run.address, ctypes.addressof(asked), torch.get_num_threads(), 0)
        if (bias := self.layer.bias) is not None:
            out += bias
        return out

    def takes(self, x: torch.Tensor) -> bool:
        """Whether ``x`` is what it is made for; the layer itself knows what to do with the rest."""
        fits = x.dtype == torch.float32 and x.shape[-1] == self.layer.in_features
        return fits and not torch.is_grad_enabled()

    @property
    def fresh(self) -> bool:
        """Whether the layer still has the weights that this was made for, as far as torch tells."""
        weight = self.layer.weight
        return weight.data_ptr() == self.address and weight._version == self.version


class _Products:
    """A model's layers, and the counts of rows that our products are sooner for."""

    def __init__(self, model: Any) -> None:
        layers = [layer for layer in model.modules() if _plain(layer)]
        copy = sum(layer.weight.numel() for layer in layers) <= _MOST_COPIED
        known = _known.get(model)
        self.products = [] if known == frozenset() else [Product(i, copy=copy) for i in layers]
        self.counts = known if known is not None else sooner(self.products)
        _known[model] = self.counts
        if not self.counts:
            self.products = []  # and their copies
        self.thread = 0
        self.forwards = [self._forward(product) for product in self.products]
        copied = [
            (product.address, product.halves.data_ptr(), product.halves.numel())
            for product in self.products
            if product.halves is not None
        ]
        self._copied = np.array(copied, np.int64).reshape(-1, 3)

    @property
    def fresh(self) -> bool:
        """Whether the weights are those of the copies: torch is asked, and a few are looked at.

        ``weight.data`` may be written to without a trace, as PEFT does where it merges.
        """
        if not all(product.fresh for product in self.products):
            return False
        return not len(self._copied) or not kernels.differing(self._copied, _PROBES)

    def _forward(self, product: Product) -> Multiply:
        layer = product.layer

        def forward(x: torch.Tensor) -> torch.Tensor:
            if threading.get_ident() == self.thread and product.takes(x):
                return product(x)
            return functional.linear(x, layer.weight, layer.bias)

        return forward


_made: WeakKeyDictionary[Any, _Products] = WeakKeyDictionary()
_known: WeakKeyDictionary[Any, frozenset[int]] = WeakKeyDictionary()


def remember(model: Any, counts: Iterable[float]) -> None:
    """Take the counts of rows that were found for a model on this machine before, if any.

    A trial takes as long as some dozens of passes (three seconds for a model of 135M parameters on
    a slow machine), and would come before the first answer. Wrong ones cost time, and no more.
    """
    _known[model] = frozenset(n for n in map(int, counts) if n in COUNTS)


def remembered(model: Any) -> list[float] | None:
    """What :func:`remember` takes; ``None`` where nobody has looked."""
    found = _known.get(model)
    return None if found is None else [float(n) for n in sorted(found)]


@contextmanager
def few_rows(model: Any, rows: int) -> Iterator[None]:
    """Multiply as is sooner for a pass over so many rows, in this thread, while the block lasts.

    The layers are the model's own, and are left as they were. To be used by whoever has the model
    to himself (:func:`tascade.decode.exclusive.exclusive`).
    """
    ours = _products(model, rows)
    if ours is None:
        yield
        return
    ours.thread = threading.get_ident()
    try:
        for product, forward in zip(ours.products, ours.forwards, strict=True):
            vars(product.layer)["forward"] = forward
        yield
    finally:
        for product in ours.products:
            vars(product.layer).pop("forward", None)


def _products(model: Any, rows: int) -> _Products | None:
    """The model's products; none where its own are sooner."""
    if rows > COUNTS[-1] or model.device.type != "cpu" or model.dtype != torch.float32:
        return None
    if _parallel() is None or torch.is_autocast_enabled("cpu"):
        return None
    ours = _made.get(model) or _made.setdefault(model, _Products(model))
    if next(count for count in COUNTS if count >= rows) not in ours.counts:
        return None
    if not ours.fresh:
        ours = _made[model] = _Products(model)
    return ours


def _plain(layer: nn.Module) -> bool:
    """Whether this is a linear layer and nothing else, in float32 on a CPU."""
    if type(layer) is not nn.Linear or "forward" in vars(layer):
        return False
    weight = layer.weight
    usual = weight.device.type == "cpu" and weight.dtype == torch.float32 and weight.is_contiguous()
    return usual and not weight.is_inference() and len(weight) >= kernels.OUTPUTS


@cache
def _parallel() -> Any:
    """OpenMP's call of a function by all of its threads, those that torch has; None without."""
    try:
        process = ctypes.CDLL(None)
    except (OSError, TypeError):  # Windows
        return None
    if not all(hasattr(process, name) for name in _OPENMP):
        return None
    start = process.GOMP_parallel
    start.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    start.restype = None
    return start


def warm_up() -> None:
    """Compile what is needed here, and keep it in numba's cache."""
    if _parallel() is not None:
        kernels.compiled(False)
        kernels.compiled(True)
        kernels.differing(np.empty((0, 3), np.int64), _PROBES)


@torch.inference_mode()
def sooner(products: list[Product]) -> frozenset[int]:
    """For which counts of rows ours are clearly sooner, by the least of some rounds a layer."""
    total = sum(product.layer.weight.numel() for product in products)
    some = products[:: max(1, round(total / _WEIGHTS))]
    found = set()
    for rows in COUNTS:
        least = [[float("inf")] * len(some) for _ in range(2)]
        for turn in range(2 * _ROUNDS):  # in turns, each layer's weights out of the caches
            for i, product in enumerate(some):
                way = product if turn % 2 else product.layer
                x = torch.ones(1, rows, product.layer.in_features)
                least[turn % 2][i] = min(least[turn % 2][i], _seconds(way, x))
        if sum(least[1]) < _CLEARLY * sum(least[0]):
            found.add(rows)
    return frozenset(found)


def _seconds(multiply: Multiply, x: torch.Tensor) -> float:
    start = time.perf_counter()
    multiply(x)
    return time.perf_counter() - start

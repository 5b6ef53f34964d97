"""Measuring what a model's steps cost on this machine."""

from __future__ import annotations

import time

import torch

from tascade.core import DraftTree
from tascade.decode.sampling import argmax_of
from tascade.decode.target import Target
from tascade.draft.costs import SIZES, CostTable


def measure_cost(target: Target, *, seconds: float = 2.0, past: int = 96) -> CostTable:
    """Measure this model's step cost on this machine, with ``past`` tokens in the cache."""
    room = target.positions or past + SIZES[-1]
    past = min(past, room // 2)
    with torch.inference_mode(), target.lock:
        target.begin()
        most = SIZES[-1] if target.counts is None else target.counts.most  # no pass has more
        sizes = [n for n in SIZES if past + n <= room and n <= most]
        target.forward([1] * past)

        def step(n: int) -> float:
            target.keep(past, ())
            tree = DraftTree.chain([1] * (n - 1)) if n > 1 else None
            start = time.perf_counter()
            argmax_of(target.forward([1], tree))(0)
            return time.perf_counter() - start

        table = CostTable.measure(step, sizes=sizes, seconds=seconds)
        target.begin()
    return table

"""Keys and values of what a task's prompts begin with, kept from request to request.

Which beginnings these are the pack says, found once among the training prompts. A prompt that
begins with one is always read in two passes, the beginning by itself and then the rest, whether the
keys were kept or have to be computed: so nothing depends on what was asked before, to the last bit,
and the rest often fits into one pass with the first draft.

What it gains is measured by ``benchmarks/real_model/prefill.py``.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence

import numpy as np
import torch

from tascade.core import IntArray
from tascade.decode.row_counts import conditions

MOST_BYTES = 256 << 20

Kept = list[tuple[torch.Tensor, torch.Tensor]]
"""Keys and values [1, H, P, D] of each layer."""


class Prefixes:
    """Known beginnings of prompts, and the keys and values of those used last.

    Args:
        known: token ids of each.
        most_bytes: kept at once, of all beginnings together; least recently used ones go first.
    """

    def __init__(self, known: Sequence[Sequence[int]], most_bytes: int = MOST_BYTES) -> None:
        ordered = sorted(known, key=len, reverse=True)
        self.known: list[IntArray] = [np.asarray(ids, np.int32) for ids in ordered]
        self.most_bytes, self.bytes = most_bytes, 0
        self._kept: OrderedDict[object, Kept] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, prompt: IntArray) -> list[int]:
        """The longest known beginning of a prompt [T] that leaves something of it; or nothing."""
        for ids in self.known:
            if len(ids) < len(prompt) and np.array_equal(prompt[: len(ids)], ids):
                found: list[int] = ids.tolist()
                return found
        return []

    def recall(self, ids: list[int], model: torch.nn.Module, read: Callable[[], Kept]) -> Kept:
        """Keys and values of a beginning in this model: kept ones, or those that ``read`` computes.

        They are kept for the conditions that they were computed under.
        """
        key = (tuple(ids), id(model), model.device, conditions(model))
        with self._lock:
            kept = self._kept.get(key)
            if kept is not None:
                self._kept.move_to_end(key)
                return kept
        kept = read()
        with self._lock:
            if key not in self._kept:
                self._kept[key] = kept
                self.bytes += _bytes(kept)
            while self.bytes > self.most_bytes:
                _, gone = self._kept.popitem(last=False)
                self.bytes -= _bytes(gone)
        return kept


def _bytes(kept: Kept) -> int:
    return sum(part.nbytes for pair in kept for part in pair)

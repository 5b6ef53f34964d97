"""The full head with a mask: what a masked head has to give, whoever generates with it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation.streamers import BaseStreamer

V = 96
STATIC = np.random.default_rng(7).permutation(V)[:24].astype(np.int32)
ROWS = [[5, 9, 2, 7, 5, 9, 33, 71, 5], [11, 3], [8, 8, 60, 41, 2]]


def padded(rows: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
    width = max(map(len, rows))
    return {
        "input_ids": torch.tensor([[0] * (width - len(row)) + list(row) for row in rows]),
        "attention_mask": torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows]),
    }


class Mask(LogitsProcessor):
    """Rules out what a row's prompt does not have, of the full head's scores."""

    def __init__(self, rows: Sequence[Sequence[int]], ends: Sequence[int]) -> None:
        self.ruled_out = torch.ones(len(rows), V, dtype=torch.bool)
        for i, row in enumerate(rows):
            self.ruled_out[i, [*STATIC.tolist(), *row, *ends]] = False

    def __call__(self, ids: Any, scores: torch.Tensor) -> torch.Tensor:
        each = len(scores) // len(self.ruled_out)
        return scores.masked_fill(self.ruled_out.repeat_interleave(each, 0), -torch.inf)


@contextmanager
def masking(model: Any, mask: Mask) -> Iterator[None]:
    """Put the mask first, before all processors."""

    def first(**options: Any) -> LogitsProcessorList:
        made = type(model)._get_logits_processor(model, **options)
        return LogitsProcessorList([mask, *made])

    try:
        model._get_logits_processor = first
        yield
    finally:
        vars(model).pop("_get_logits_processor", None)


def ends_of(options: dict[str, Any]) -> list[int]:
    ends = options.get("eos_token_id", [])
    return [end for end in (ends if isinstance(ends, list) else [ends]) if end >= 0]


class Recorder(BaseStreamer):
    def __init__(self) -> None:
        self.values: list[list[int]] = []

    def put(self, value: torch.Tensor) -> None:
        self.values.append(value.reshape(-1).tolist())

    def end(self) -> None:
        self.values.append([])

"""The model's own answers to the training prompts, in place of the reference ones.

A draft is right when it says what *this model* will say, and a small model's habits differ from
its references. Its own answers, greedy, are the better corpus: on the pilot model's dialogue
states they raise tokens per step from 6.1 to 10.2 (test rows; benchmarks/results).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tascade.core import IntArray
from tascade.decode.loop import Decoder
from tascade.decode.sample import SamplingParams

Row = tuple[IntArray | None, IntArray]
"""A prompt, or ``None``, and its answer: token ids [T] each."""


def own_answers(
    decoder: Decoder,
    rows: Sequence[Row],
    params: SamplingParams,
    *,
    seconds: float,
    tell: Callable[[str, int, int | None], None],
) -> tuple[list[Row], int]:
    """Answer the prompts of ``rows``, within ``seconds``; an answer not reached stays as it was.

    Rows are taken spread over the file, so that a time-out leaves no part of it untouched. A prompt
    that occurs twice is answered once. Returns the rows, in their order, and how many are the
    model's own.
    """
    out = list(rows)
    known: dict[bytes, IntArray] = {}
    deadline = time.monotonic() + seconds
    done = 0
    for at in _spread_order(len(rows)):
        prompt = rows[at][0]
        if prompt is None:
            continue
        key = prompt.tobytes()
        if key not in known:
            if time.monotonic() > deadline:
                break
            known[key] = np.asarray(decoder.generate(prompt, params).tokens, np.int32)
        out[at] = (prompt, known[key])
        done += 1
        if done % 16 == 0:
            tell("answering training prompts", done, len(rows))
    tell("answering training prompts", done, done)
    return out, done


def _spread_order(n: int) -> Any:
    """0..n-1 in an order whose every beginning is spread evenly (steps of the golden ratio)."""
    step = max(1, round(n * 0.6180339887))
    while np.gcd(step, max(n, 1)) != 1:
        step += 1
    return ((i * step) % n for i in range(n))

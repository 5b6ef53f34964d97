"""The model's own answers to the training prompts, in place of the reference ones.

A draft is right when it says what *this model* will say, and a small model's habits differ from
its references. Its own answers, greedy, are the better corpus: on the pilot model's dialogue
states they raise tokens per step from 6.1 to 10.2 (test rows; benchmarks/results).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from tascade.config import Recipe
from tascade.core import IntArray, Progress, Row
from tascade.data.prepare import Prepared, spread
from tascade.decode.loop import Decoder
from tascade.decode.sampling import SamplingParams
from tascade.errors import ConfigError
from tascade.util.progress import in_time, spelt

_FIRST = 2
"""Answers after which it is foretold how many there is time for."""
LEAST_OWN = 20
"""Fewest own answers to go on with where there is no time for all of them."""
Answer = Callable[[Sequence[Row]], tuple[list[Row], list[int]]]
"""Answers the prompts of rows as :func:`own_answers` does: for stages that need answers."""
Answering = Callable[
    [tuple[Any, Any, str], Prepared, Recipe, Progress], AbstractContextManager[Answer]
]
"""Gives a loaded model's :data:`Answer` while it is open: :func:`tascade.builder.answering`."""


def own_answers(
    decoder: Decoder,
    rows: Sequence[Row],
    params: SamplingParams,
    *,
    seconds: float,
    tell: Progress,
) -> tuple[list[Row], list[int]]:
    """Answer the prompts of ``rows``, as many as ``seconds`` allow.

    Rows are taken spread over the file, so that a time-out leaves no part of it untouched. A prompt
    that occurs twice is answered once.

    Returns:
        The rows that were answered, in their order, each with the model's own answer and never its
        reference; and where each stood in ``rows``.
    """
    known: dict[bytes, IntArray] = {}
    answered: dict[int, Row] = {}
    begin, asked = time.monotonic(), count_prompts(rows)
    stage, reach = "answering training prompts", asked
    tell(stage, 0, asked)
    for at in _spread_order(len(rows)):
        prompt = rows[at][0]
        if prompt is None:
            continue
        key = prompt.tobytes()
        if key not in known:
            took = time.monotonic() - begin
            if took > seconds:
                break
            if len(known) == _FIRST and (needed := took / _FIRST * asked) > seconds:
                reach = in_time(_FIRST, took, seconds, asked)
                stage += f", about {reach} of {asked} in {spelt(seconds).removeprefix('about ')}"
                stage += f" (all: {spelt(needed)}; own_seconds)"
            known[key] = np.asarray(decoder.generate(prompt, params).tokens, np.int32)
        answered[at] = (prompt, known[key])
        tell(stage, len(answered), max(reach, len(answered)))
    places = sorted(answered)
    return [answered[at] for at in places], places


def enough_own(reached: int, rows: Sequence[Row], what: str, seconds: float) -> None:
    """Refuse to go on with a few answers where there were prompts for more.

    Args:
        reached: how many of ``rows`` were answered.
        rows: what was asked.
        what: names them in the message.
        seconds: the time there was.

    Raises:
        ConfigError: not all prompts were reached, and fewer than :data:`LEAST_OWN`.
    """
    asked = count_prompts(rows)
    if reached < min(LEAST_OWN, asked):
        raise ConfigError(
            f"too few of the model's own answers to {what} in the time allowed",
            got=f"{reached} of {asked} in own_seconds: {seconds:g}",
            wanted=f"at least {min(LEAST_OWN, asked)}",
            where="spec.own_seconds",
            fix="raise spec.own_seconds in a recipe, lower max_new_tokens, or go by the references",
        )


def own_held_out(
    answer: Answer, rows: Sequence[Row], seconds: float, most: int = 400
) -> tuple[list[Row], int]:
    """The model's own answers to held-out prompts, at most ``most`` of them spread over ``rows``;
    and how many of these prompts were not reached in ``seconds``, which are left out.

    Raises:
        ConfigError: too few were reached.
    """
    asked = spread([row for row in rows if row[0] is not None], most)
    own, _ = answer(asked)
    enough_own(len(own), asked, "held-out prompts", seconds)
    return own, len(asked) - len(own)


def count_prompts(rows: Sequence[Row]) -> int:
    """How many rows have a prompt."""
    return sum(prompt is not None for prompt, _ in rows)


def _spread_order(n: int) -> Any:
    """0..n-1 in an order whose every beginning is spread evenly (steps of the golden ratio)."""
    step = max(1, round(n * 0.6180339887))
    while np.gcd(step, max(n, 1)) != 1:
        step += 1
    return ((i * step) % n for i in range(n))

"""The model's own answers to the training prompts, in place of the reference ones.

A draft is right when it says what *this model* will say, and a small model's habits differ from
its references. Its own answers, greedy, are the better corpus: on the pilot model's dialogue
states they raise tokens per step from 6.1 to 10.2 (test rows; benchmarks/results).
"""

from __future__ import annotations

import logging
import math
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tascade.answers.engine import Engine, EngineError, same_words
from tascade.answers.kept import KeptAnswers
from tascade.config import Recipe
from tascade.core import IntArray, Progress, Row
from tascade.data.prepare import Prepared, spread
from tascade.decode.batch import BatchDecoder
from tascade.decode.loop import Decoder
from tascade.decode.sampling import SamplingParams
from tascade.errors import ConfigError, UnsupportedModelError
from tascade.util.progress import duration, in_time, spelt

_STAGE = "answering training prompts"
_FIRST = 4
"""Answers after which it is foretold how many there is time for: fewer say little of the rest."""
LEAST_OWN = 20
"""Fewest own answers to go on with where there is no time for all of them."""
_TRIAL = 4
"""Answers that are given one by one first, where there are other ways to go on."""
ENGINE_SECONDS = 60.0
"""What is answered sooner than this one by one is not worth the start of an engine."""
TRIAL_SECONDS = 20.0
"""And what is answered sooner than this is not worth a trial of batches."""
_CLEARLY, _TRIALS, _BATCH_TRIALS = 0.8, 8, 2
"""Batches must take less than this share of the time; an engine's trial may cost an eighth of what
there is, one of batches a half: its answers count."""
_AS_FORETOLD = 0.5
"""By how much of itself a foretold number changes before it is said again."""
_log = logging.getLogger("tascade.data")
_TOGETHER = 256
Answer = Callable[[Sequence[Row]], tuple[list[Row], list[int]]]
"""Answers the prompts of rows as :func:`own_answers` does: for stages that need answers."""
Answering = Callable[
    [tuple[Any, Any, str], Prepared, Recipe, Progress], AbstractContextManager[Answer]
]
"""Gives a loaded model's :data:`Answer` while it is open: :func:`tascade.builder.answering`."""


@dataclass(frozen=True, slots=True)
class Bulk:
    """What many prompts may be answered with, beside a decoder that takes one at a time.

    ``batches``: makes a decoder of batches without drafts; ``engine``: another program; ``kept``: a
    file of the answers so far, which are not given again.
    """

    batches: Callable[[], BatchDecoder] | None = None
    engine: Engine | None = None
    kept: Path | None = None


ONE_BY_ONE = Bulk()


def own_answers(
    decoder: Decoder,
    rows: Sequence[Row],
    params: SamplingParams,
    *,
    seconds: float,
    tell: Progress,
    bulk: Bulk = ONE_BY_ONE,
) -> tuple[list[Row], list[int]]:
    """Answer the prompts of ``rows``, as many as ``seconds`` allow.

    Rows are taken spread over the file, so that a time-out leaves no part of it untouched. A prompt
    that occurs twice is answered once.

    Args:
        decoder: answers one after the other, with drafts.
        rows: prompts and references, in any number.
        params: how answers are decoded.
        seconds: the time there is. What is under way when it has passed is brought to its end.
        tell: called with (stage, done, total), in rows.
        bulk: what else there is to answer many prompts with, and where answers are kept.

    Returns:
        The rows that were answered, in their order, each with the model's own answer and never its
        reference; and where each stood in ``rows``.
    """
    run = _Run(rows, params, seconds, tell, bulk.kept)
    try:
        run.answer(decoder, bulk)
    finally:
        run.close()
    return run.answered()


class _Run:
    """The distinct prompts of some rows, in the order in which they are answered, and the answers
    so far.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        params: SamplingParams,
        seconds: float,
        tell: Progress,
        kept: Path | None,
    ) -> None:
        self.params, self._tell = params, tell
        self._begin, self._seconds = time.monotonic(), seconds
        self.asked = self._foretold = count_prompts(rows)
        self._stage, self._kept_before = _STAGE, 0
        self._places: list[list[int]] = []
        self.prompts: list[IntArray] = []
        self.known: dict[int, IntArray] = {}
        self.done = 0
        self._number(rows)
        self._kept = None if kept is None else KeptAnswers(kept)
        if self._kept is not None:
            numbers = {places[0]: number for number, places in enumerate(self._places)}
            for place, ids in self._kept.read():
                if place in numbers:
                    self._know(numbers[place], ids)
        self._kept_before = self.done
        self.show()

    def _number(self, rows: Sequence[Row]) -> None:
        numbers: dict[bytes, int] = {}
        for at in _spread_order(len(rows)):
            prompt = rows[at][0]
            if prompt is None:
                continue
            number = numbers.setdefault(prompt.tobytes(), len(self.prompts))
            if number == len(self.prompts):
                self.prompts.append(prompt)
                self._places.append([])
            self._places[number].append(at)

    # --- what is known ---------------------------------------------------------------------------

    def _know(self, number: int, ids: IntArray) -> None:
        if number not in self.known:
            self.known[number] = ids
            self.done += len(self._places[number])

    def take(self, number: int, tokens: Sequence[int]) -> None:
        """An answer: keep it, and tell."""
        ids = np.asarray(tokens, np.int32)
        self._know(number, ids)
        if self._kept is not None:
            self._kept.add(self._places[number][0], ids)
        self.show()

    def waiting(self) -> list[int]:
        """The prompts without an answer, in their order."""
        return [number for number in range(len(self.prompts)) if number not in self.known]

    def answered(self) -> tuple[list[Row], list[int]]:
        """See :func:`own_answers`."""
        found = {at: number for number in self.known for at in self._places[number]}
        places = sorted(found)
        return [(self.prompts[found[at]], self.known[found[at]]) for at in places], places

    def close(self) -> None:
        """Have what is kept on disk."""
        if self._kept is not None:
            self._kept.close()

    # --- time ------------------------------------------------------------------------------------

    @property
    def left(self) -> float:
        """Seconds that are left; below 0 when time is up."""
        return self._begin + self._seconds - time.monotonic()

    def needed(self, pace: float) -> float:
        """Seconds for the rest, or for as much of it as there is time for, at ``pace`` a row."""
        return min(pace * (self.asked - self.done), self.left)

    def foretell(self, pace: float) -> None:
        """Say how many rows there is time for, where that is not all; ``pace``: seconds a row.

        It is said again where another way of answering makes it another number.
        """
        whole = pace * (self.asked - self.done)
        reach = self.asked
        if whole > self.left:
            reach = self.done + in_time(1, pace, self.left, self.asked - self.done)
        if abs(reach - self._foretold) > _AS_FORETOLD * self._foretold:
            self._foretold = reach
            _log.info(
                "there is time for about %d of %d own answers in %s (--own-seconds); all would "
                "take %s",
                reach,
                self.asked,
                duration(self._seconds),
                spelt(whole + self._seconds - self.left),
            )

    def show(self) -> None:
        """Tell how far it is, of all or of as many as there is time for."""
        given, left = self.done - self._kept_before, max(self.left, 0.0)
        took = max(self._seconds - left, 1e-9)
        fits = math.ceil(left * given / took) if given else self.asked
        self._tell(self._stage, self.done, min(self.done + fits, self.asked))

    # --- ways ------------------------------------------------------------------------------------

    def answer(self, decoder: Decoder, bulk: Bulk) -> None:
        """Answer what there is time for, in the way that a short trial shows to be the soonest.

        The trial's answers are answers like all others. Where all is soon done, or there is but
        one way, there is none.
        """
        if bulk.engine is None and bulk.batches is None:
            self.one_by_one(decoder)
            return
        pace = self.one_by_one(decoder, _TRIAL)
        if bulk.engine is not None and self.needed(pace) > ENGINE_SECONDS:
            try:
                self._by_engine(bulk.engine, decoder, pace)
            except EngineError as error:
                warnings.warn(f"{error}; answering goes on without it", stacklevel=4)
            self._stage = _STAGE
        if bulk.batches is not None and self.needed(pace) > TRIAL_SECONDS:
            with suppress(UnsupportedModelError, torch.OutOfMemoryError):
                self._in_batches_if_faster(bulk.batches(), pace)
        self.one_by_one(decoder)

    def one_by_one(self, decoder: Decoder, most: int | None = None) -> float:
        """Answer prompts with drafts, ``most`` of them or all; returns the seconds a row took."""
        begin, before = time.monotonic(), self.done
        for count, number in enumerate(self.waiting()[:most]):
            if self.left < 0:
                break
            if count == _FIRST:
                self.foretell(self._pace(begin, before))
            self.take(number, decoder.generate(self.prompts[number], self.params).tokens)
        return self._pace(begin, before)

    def _pace(self, begin: float, before: int) -> float:
        return (time.monotonic() - begin) / max(self.done - before, 1)

    def _in_batches_if_faster(self, decoder: BatchDecoder, pace: float) -> None:
        """Try batches without drafts, and go on with them where they take less than ``pace``.

        The trial must be a small part of all, and ends where it is lost.
        """
        most = 2 * decoder.size
        longest = _CLEARLY * pace * most
        if decoder.size < 2 or self.needed(pace) < _BATCH_TRIALS * longest:
            return
        before = self.done
        self._in_batches(decoder, most, longest)
        if self.done - before >= most:
            self._in_batches(decoder)

    def _in_batches(
        self, decoder: BatchDecoder, most: int | None = None, seconds: float = math.inf
    ) -> None:
        """Answer prompts together, ``most`` of them or all, for so many seconds."""
        begin, before = time.monotonic(), self.done
        latest = begin + min(seconds, self.left)
        numbers = self.waiting()[:most]
        for start in range(0, len(numbers), _TOGETHER):
            some = numbers[start : start + _TOGETHER]
            prompts = [self.prompts[number] for number in some]
            with closing(decoder.stream(prompts, self.params)) as stream:
                for at, _, made in stream:
                    if made.seconds:  # it has ended
                        self.take(some[at], made.tokens)
                        if most is None and self.done - before == 2 * decoder.size:
                            self.foretell(self._pace(begin, before))
                    if time.monotonic() > latest:
                        return

    def _by_engine(self, engine: Engine, decoder: Decoder, pace: float) -> None:
        """Have an engine answer, as long as it says the same words, and sooner than one by one.

        The prompts of the trial are asked again, to compare.

        Raises:
            EngineError: it failed, or says something else.
        """
        compared = list(self.known)[-_TRIAL:]
        numbers = [*compared, *self.waiting()]
        given = [self.prompts[number] for number in numbers]
        self._stage = f"{_STAGE} in {engine.name}"
        self.show()
        said: dict[int, list[int]] = {}
        before = self.done
        begin: float | None = None
        left = max(self.left, 0.0)
        # As if it were no faster than this: then at most a part of the time is lost.
        soon = max(2 * _TRIAL, int(left / _TRIALS / max(pace, 1e-9)))
        with closing(engine.answers(given, self.params, left, soon)) as stream:
            for some in stream:
                said |= {numbers[at]: ids for at, ids in some}
                if not some or not said.keys() >= set(compared):
                    self.show()
                    continue
                if compared:
                    pairs = [(n, self.known[n].tolist(), said.pop(n)) for n in compared]
                    same_words(decoder, self.params, [(self.prompts[n], a, b) for n, a, b in pairs])
                    compared = []
                for number, ids in said.items():
                    self.take(number, ids)
                said = {}
                if begin is None:
                    begin, before = time.monotonic(), self.done
                elif self.done - before >= 2 * _TRIAL:
                    # Over all since the first: answers come in bursts, some of them small and late.
                    theirs = (time.monotonic() - begin) / (self.done - before)
                    if theirs > pace:
                        return
                    self.foretell(theirs)


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

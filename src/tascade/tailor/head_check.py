"""Guesses of a small head, and what the full head makes of them.

A request that is guessed at has two forms: what has passed the check and may be given out, and the
guesses behind it, which are a request of their own with the same prompt and options.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from tascade.core import Source
from tascade.decode.loop import Request
from tascade.decode.sampling import Chooser, log_probability
from tascade.decode.stop import StopRule

_KEEPING = {
    "PrefixConstrainedLogitsProcessor",  # asks a function of the caller's
    "SynthIDTextWatermarkLogitsProcessor",
    "UnbatchedClassifierFreeGuidanceLogitsProcessor",
}
"""Transformers' processors that keep something from call to call, or may."""


def guesses_for(request: Request, tokenizer: Any) -> Request:
    """A request for guesses behind what ``request`` has: it ends as that will, but asks no
    caller's rule, which may count what it is asked.
    """
    quiet, done = StopRule(request.stop.params, tokenizer), request.result
    made = replace(done, tokens=[*done.tokens], sources=[*done.sources], extra={})
    made.logprobs = [*done.logprobs]
    return Request(request.prompt, request.chooser, quiet, made, request.device)


def may_repeat(chooser: Chooser) -> bool:
    """Whether scores may be asked for twice at one place, which a caller's own processor may not
    bear. Transformers' own keep nothing from call to call, but for a few.
    """
    return all(map(_bears_repeats, chooser.given))


def _bears_repeats(given: Any) -> bool:
    if isinstance(given, list):  # Transformers' list of processors, which may hold anybody's
        return all(map(_bears_repeats, given))
    kind = type(given)
    return kind.__module__.startswith("transformers.") and kind.__name__ not in _KEEPING


@torch.inference_mode()
def take_checked(
    request: Request, guess: Request, logits: torch.Tensor, best: Sequence[int] | None
) -> bool:
    """Take the guesses up to the first one that the full head would not have made, and there its
    own token. Returns whether there was one; ``Generation.extra`` counts.

    Args:
        request: what has passed so far.
        guess: the same tokens, and the guesses behind them.
        logits: [K, V] the full head's at the places of the guesses.
        best: [K] the token of the largest of each, where that is what is taken.
    """
    result, chooser = request.result, request.chooser
    first = len(result.tokens)
    passed: list[int] = []
    missed = False
    for i, token in enumerate(guess.result.tokens[first:]):
        right = best[i] if best else _choice(request, logits[i], passed)
        passed.append(right)
        missed = right != token
        if (top := chooser.params.logprobs) is not None:
            result.logprobs.append(log_probability(logits[i], right, top))
        request.done = request.stop.is_last(result.tokens + passed)
        if missed or request.done:
            break
    result.extra["checks"] += 1
    result.extra["misses"] += missed
    _take(request, guess, passed)
    if missed:
        result.sources[-1] = int(Source.TARGET)
    return missed


def take_unchecked(request: Request, guess: Request) -> None:
    """Take tokens that the full head chose itself; a caller's rule may end them early."""
    result, first = request.result, len(request.result.tokens)
    result.extra["full_steps"] += 1
    passed: list[int] = []
    for token in guess.result.tokens[first:]:
        passed.append(token)
        request.done = request.stop.is_last(result.tokens + passed)
        if request.done:
            break
    result.logprobs += guess.result.logprobs[first : first + len(passed)]
    _take(request, guess, passed)


def rewind(request: Request, guess: Request) -> None:
    """Put the guesses back to what has passed, as if the last token had been guessed right."""
    result, made = request.result, guess.result
    made.stepped_tokens -= len(made.tokens) - len(result.tokens)
    made.tokens, made.sources = list(result.tokens), list(result.sources)
    made.logprobs = list(result.logprobs)
    guess.known = min(guess.known, len(result.tokens) - 1)
    guess.done = request.done


def account(request: Request, guess: Request) -> None:
    """Put down to the request what the forwards of its guesses came to."""
    result, made = request.result, guess.result
    outside = len(made.tokens) - made.stepped_tokens
    result.steps, result.forwards = made.steps, made.forwards
    result.prefill_seconds = made.prefill_seconds
    result.stepped_tokens = len(result.tokens) - outside


def _take(request: Request, guess: Request, passed: Sequence[int]) -> None:
    result, first = request.result, len(request.result.tokens)
    result.tokens += passed
    result.sources += guess.result.sources[first : first + len(passed)]


def _choice(request: Request, logits: torch.Tensor, passed: list[int]) -> int:
    """What plain decoding takes behind ``passed``. ``logits``: [V]."""
    chooser = request.chooser
    before = request.prefix(passed) if chooser.needs_prefix else logits.new_empty(1, 0).long()
    return chooser.choose(logits, before, len(request.result.tokens) + len(passed))

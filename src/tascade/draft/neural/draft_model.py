"""Chains drafted by a second, smaller model."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from itertools import takewhile

import numpy as np
import torch

from tascade.core import DraftTree, FloatArray, IntArray
from tascade.decode.target import Target
from tascade.draft.costs import Trust

_FEW = 8
"""Tokens that an assistant runs in about the time of one."""
_DEPTH = 24
"""Most tokens in a draft; it was never varied."""
_BINS, _MEMORY = 13, 256.0


class AssistantDrafter:
    """Drafts chains with a second model; a :class:`Drafter`.

    What was drafted and came true is not run again, nor is the part of a prompt that the request
    before began with too. For a request too long for the assistant, or with a token that it has
    not, nothing is drafted.

    Args:
        target: the assistant, with its own head or a smaller one; for this drafter alone.
        vocab_size: of the verifying model; those of one tokenizer differ in padded rows.
        end_tokens: ids below which nothing is drafted.
        clock: tells seconds.

    Attributes:
        seconds: of a drafted token; the part of a prompt that was not run before comes on top.
        hits: how many drafted tokens were right, if all before them were.
    """

    name = "assistant"

    def __init__(
        self,
        target: Target,
        *,
        vocab_size: int | None = None,
        end_tokens: Sequence[int] = (),
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.target, self.clock, self.seconds = target, clock, 0.0
        self.hits = Trust(1.0, 0.75, weight=1 / 32)
        self.confidence = Confidence()
        self._known = min(target.vocab_size, vocab_size or target.vocab_size)
        self._ends = frozenset(end_tokens)
        self._ran: list[int] = []  # tokens in the cache, whichever request they are of
        self.start(np.empty(0, np.int32))

    def start(self, prompt: IntArray) -> None:
        """Begin a request; nothing is run before a draft is asked for."""
        self._context: list[int] = prompt.tolist()
        self._prompt: IntArray | None = prompt
        self._heard = len(prompt)
        self._odd = any(token >= self._known for token in self._context)
        self._chain: list[int] = []
        self._chances: list[float] = []

    def expected(self) -> tuple[FloatArray, FloatArray]:
        """Survival of the nodes that a draft may have, and the seconds of its first 1..K: [K]."""
        depth = np.arange(1, _DEPTH + 1, dtype=np.float32)
        return np.float32(min(self.hits.ratio, 1.0)) ** depth, np.float32(self.seconds) * depth

    def propose(self, limit: int, floor: float = 0.0) -> DraftTree:
        """The chain of at most ``limit`` tokens that may pay (see ``Drafter.propose``)."""
        return self.draft(limit, floor)

    @torch.inference_mode()
    def draft(self, limit: int, floor: float, step: float = np.inf) -> DraftTree:
        """As :meth:`propose`, where the target takes ``step`` seconds for one token."""
        with self.target.lock:  # of two loops that draft with it in two threads
            return self._grow(limit, floor, self.seconds / step)

    def _grow(self, limit: int, floor: float, share: float) -> DraftTree:
        kept: list[float] = []
        while len(kept) < min(limit, _DEPTH):
            n, promised = len(kept), 1.0 + sum(kept)
            if n == len(self._chain):
                # A draft has to earn its own step too, at the rate of all that is promised so far.
                bar = promised * (floor + share) / (1.0 + n * share)
                ended = n > 0 and self._chain[-1] in self._ends
                if ended or not self.fits() or (n and kept[-1] * self.hits.ratio < bar):
                    break
                self._next()
            chance = self.confidence.of(self._chances[n]) * (kept[-1] if kept else 1.0)
            if chance < floor * promised:
                break
            kept.append(chance)
        return DraftTree.chain(self._chain[: len(kept)], kept)

    def fits(self) -> bool:
        """Whether the assistant can read all there is, to say what follows."""
        length, most = len(self._context) + len(self._chain), self.target.context
        room = self.target.room(length - 1)
        fits = (most is None or length <= most) and (room is None or room > 0)
        return fits and length > 0 and not self._odd

    def _shared(self) -> int:
        """How many tokens of this request, the last one left out, are in the cache."""
        text = (self._context + self._chain)[:-1]
        if text[: len(self._ran)] == self._ran:
            return len(self._ran)
        return sum(takewhile(bool, (a == b for a, b in zip(self._ran, text, strict=False))))

    def _next(self) -> None:
        """Draft one token behind the chain."""
        head, new = self.target.head, self._prompt is not None
        if head is not None:
            if self._prompt is not None:
                head.begin(self._prompt)
            head.extend(self._context[self._heard :])
        self._prompt, self._heard = None, len(self._context)
        text, shared = self._context + self._chain, self._shared()
        # Before the pass: should it break off, the cache holds no more than is said here.
        del self._ran[shared:]
        self.target.keep(shared, ())
        if new:
            self.target.cache.give_back()
        started = self.clock()
        token, chance = _likeliest(self.target.forward(text[shared:])[-1][: self._known])
        self._ran_for(len(text) - shared, self.clock() - started)
        self.target.keep(len(text), ())
        self._ran = text
        self._chain.append(token)
        self._chances.append(chance)

    def _ran_for(self, tokens: int, seconds: float) -> None:
        if tokens <= _FEW:  # quickly down and slowly up: one slow pass is not what passes cost
            self.seconds = self.seconds or seconds
            gap = min(seconds, 4 * self.seconds) - self.seconds
            self.seconds += gap / (8 if gap > 0 else 2)

    def commit(self, tokens: IntArray, verified: int, path: Sequence[int]) -> None:
        """Learn from the outcome; go on behind ``tokens``, with what was drafted behind them."""
        said: list[int] = tokens.tolist()
        right = sum(takewhile(bool, (a == b for a, b in zip(said, self._chain, strict=False))))
        for at, chance in enumerate(self._chances[: min(right + 1, len(said))]):
            self.hits.record(1.0, at < right)
            self.confidence.learn(chance, at < right)
        gone = right if right == len(said) else len(self._chain)
        del self._chain[:gone], self._chances[:gone]
        self._context += said
        self._odd = self._odd or any(token >= self._known for token in said)


def _likeliest(logits: torch.Tensor) -> tuple[int, float]:
    """The token with the largest of ``logits`` [V], and its share of the softmax."""
    row = logits.float()
    best, token = row.max(-1)
    chance = (best - row.logsumexp(-1)).exp()
    found, share = torch.stack((token.double(), chance.double())).tolist()
    return int(found), share


class Confidence:
    """How often a drafted token is right, given the probability its model gave it.

    Beta counts in bins of the probability's log-odds, from -6 to 6; each bin begins with what the
    probability says, for four trials' worth, and forgets what is older than some 256 trials.
    """

    def __init__(self) -> None:
        at = 1 / (1 + np.exp(-np.linspace(-6, 6, _BINS)))
        self._hits, self._trials = 4 * at, np.full(_BINS, 4.0)

    def of(self, probability: float) -> float:
        """Chance that a token with this probability is right, if all before it are."""
        at = self._bin(probability)
        return float(self._hits[at] / self._trials[at])

    def learn(self, probability: float, right: bool) -> None:
        """Take the outcome of one drafted token."""
        at = self._bin(probability)
        keep = min(1.0, _MEMORY / (self._trials[at] + 1))
        self._hits[at] = keep * (self._hits[at] + right)
        self._trials[at] = keep * (self._trials[at] + 1)

    @staticmethod
    def _bin(probability: float) -> int:
        p = min(max(probability, 0.0025), 0.9975)
        return round(math.log(p / (1 - p))) + _BINS // 2

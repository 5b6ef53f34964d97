"""Chains drafted by a second, smaller model."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

import numpy as np
import torch

from tascade.assistant.account import FEW, Account
from tascade.assistant.confidence import Confidence
from tascade.core import EMPTY_TREE, DraftTree, FloatArray, IntArray
from tascade.decode.target import Target


class AssistantDrafter:
    """Drafts chains with a second model; a :class:`Drafter`.

    What was drafted and came true is not run again, nor is the part of a prompt that the request
    before began with too. For a request too long for the assistant, or with a token that it has
    not, nothing is drafted.

    Args:
        target: the assistant, with its own head or a smaller one; for this drafter alone.
        vocab_size: of the verifying model; those of one tokenizer differ in padded rows.
        end_tokens: ids below which nothing is drafted.
        account: what the drafts cost and bring; by default they are made whenever asked for.
    """

    name = "assistant"

    def __init__(
        self,
        target: Target,
        *,
        vocab_size: int | None = None,
        end_tokens: Sequence[int] = (),
        account: Account | None = None,
    ) -> None:
        self.target, self.account = target, account or Account()
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

    def propose(self, limit: int, floor: float = 0.0) -> DraftTree:
        """The chain of at most ``limit`` tokens that may pay (see ``Drafter.propose``)."""
        return self.draft(limit, floor, EMPTY_TREE.survival)

    @torch.inference_mode()
    def draft(self, limit: int, floor: float, other: FloatArray) -> DraftTree:
        """As :meth:`propose`, where nodes of survival ``other`` [N] could be verified instead."""
        with self.target.lock:  # of two loops that draft with it in two threads
            account, started = self.account, self.account.clock()
            try:
                if limit <= 0 or not self._fits():
                    return EMPTY_TREE
                warm = len(self._context) - self._shared() <= FEW
                pays = account.pays(self.confidence.mean, other, warm)
                return self._grow(limit, floor) if pays else EMPTY_TREE
            finally:
                account.charge(account.clock() - started)

    def _grow(self, limit: int, floor: float) -> DraftTree:
        account = self.account
        share = 0.0 if account.cost is None else account.token / account.step()
        kept: list[float] = []
        chance = 1.0
        for n in range(limit):
            promised = 1.0 + sum(kept)
            if n == len(self._chain):
                # A draft has to earn its own step too, at the rate of all that is promised so far.
                bar = promised * (floor + share) / (1.0 + n * share)
                ended = n > 0 and self._chain[-1] in self._ends
                if ended or not self._fits() or (n and chance * self.confidence.mean < bar):
                    break
                self._next()
            chance *= self.confidence.of(self._chances[n])
            if chance < floor * promised:
                break
            kept.append(chance)
        return DraftTree.chain(self._chain[: len(kept)], kept)

    def _fits(self) -> bool:
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
        started = self.account.clock()
        token, chance = _likeliest(self.target.forward(text[shared:])[-1][: self._known])
        self.account.ran(len(text) - shared, self.account.clock() - started)
        self.target.keep(len(text), ())
        self._ran = text
        self._chain.append(token)
        self._chances.append(chance)

    def commit(self, tokens: IntArray, verified: int, path: Sequence[int]) -> None:
        """Learn from the outcome; go on behind ``tokens``, with what was drafted behind them."""
        said: list[int] = tokens.tolist()
        right = 0
        for token, drafted, chance in zip(said, self._chain, self._chances, strict=False):
            self.confidence.learn(chance, token == drafted)
            if token != drafted:
                break
            right += 1
        self.account.credit(len(path), verified)
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

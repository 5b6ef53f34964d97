"""Places of an answer that other answers do not foretell: there the prompt decides."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

from tascade.core import IntArray

_ORDERS = (8, 4, 2, 1)
_ENOUGH = 8
_MOST_ANSWERS = 20_000
_START = -1


class Foretelling:
    """An n-gram model of a task's answers, which knows no prompts.

    A token's probability is its share after the longest of the last 8, 4, 2 or 1 tokens that stood
    before at least 8 others (after the last one, whatever there is).

    Args:
        answers: token ids of each; the first 20,000 of them are counted.
    """

    def __init__(self, answers: Sequence[IntArray]) -> None:
        self._next: dict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
        for answer in answers[:_MOST_ANSWERS]:
            for contexts, token in _walk(answer):
                for context in contexts:
                    self._next[context][token] += 1
        self._total = {context: found.total() for context, found in self._next.items()}

    def unforeseen(self, answer: IntArray, least: float, *, counted: bool) -> IntArray:
        """Ascending places [D] of tokens less likely than ``least``, the first one's left out.

        Args:
            answer: token ids [T].
            least: probability from 0 to 1.
            counted: whether the answer is one of those counted, and must not foretell itself.
        """
        found = []
        for place, (contexts, token) in enumerate(_walk(answer)):
            if place and self._share(contexts, token, int(counted)) < least:
                found.append(place)
        return np.array(found, np.int32)

    def _share(self, contexts: Iterable[tuple[int, ...]], token: int, own: int) -> float:
        for context in contexts:
            others = self._total.get(context, 0) - own
            if others >= _ENOUGH or (len(context) == 1 and others > 0):
                return (self._next[context][token] - own) / others
        return 0.0


def _walk(answer: IntArray) -> Iterable[tuple[list[tuple[int, ...]], int]]:
    """Each token with the contexts before it, the longest first."""
    ids = [_START] * _ORDERS[0] + answer.tolist()
    for at in range(_ORDERS[0], len(ids)):
        yield [tuple(ids[at - order : at]) for order in _ORDERS], ids[at]

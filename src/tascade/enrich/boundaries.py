"""Places of an answer that no new token reaches over: where it says more than one step can know.

The model is uncertain there, or the task's other answers do not tell what comes, so that the
prompt has to. A token that reaches over such a place asks a model to settle two things in one step;
one that begins there asks for nothing that was not settled at its first base token.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from tascade.core import FloatArray, IntArray
from tascade.decode.exclusive import exclusive
from tascade.enrich.tokens.merger import TokenMerger
from tascade.enrich.train.samples import IGNORE_INDEX, Pair, collate, make_samples, prompt_length

MIN_BOUNDARY_FREE = 0.7
"""A token is chosen if so many of its places hold no boundary. Never varied: 0.7 since boundaries
are there, in benchmarks/tune_pilot.json and foretold.json as well."""
_BATCH = 32
_ORDERS = (8, 4, 2, 1)
_ENOUGH = 8
_MOST_ANSWERS = 20_000
_START = -1


def uncertain_positions(
    model: Any, rows: Sequence[Pair], min_prob: float, max_length: int
) -> list[IntArray]:
    """Where a model was not sure of its own answers: the places of tokens it found unlikely.

    Args:
        model: the one whose answers these are.
        rows: (prompt, answer) pairs in base ids.
        min_prob: tokens with less probability are unlikely, from 0 to 1.
        max_length: rows of more tokens are not looked at.

    Returns:
        Ascending places of each answer [D], the first token's left out; none for a row without a
        prompt, or too long.
    """
    nothing = TokenMerger((), int(model.config.get_text_config().vocab_size))
    found = [np.empty(0, np.int32)] * len(rows)
    asked = [i for i, row in enumerate(rows) if make_samples([row], nothing, max_length)]
    asked.sort(key=lambda i: prompt_length(rows[i]))
    for at in range(0, len(asked), _BATCH):
        part = asked[at : at + _BATCH]
        batch = collate(make_samples([rows[i] for i in part], nothing, max_length))
        batch = batch.to(model.device)
        with exclusive(model), torch.inference_mode():
            logprobs = batch.logits(model).float().log_softmax(-1)
            probs = logprobs.gather(-1, batch.targets.clamp_min(0)[..., None])[..., 0].exp()
        for row, i in enumerate(part):
            unlikely = probs[row][batch.targets[row] != IGNORE_INDEX] < min_prob
            places = unlikely.nonzero()[:, 0].tolist()
            found[i] = np.array([place for place in places if place], np.int32)
    return found


class NgramModel:
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

    def unlikely_positions(self, answer: IntArray, min_prob: float, *, counted: bool) -> IntArray:
        """Ascending places [D] of tokens less likely than this, the first one's left out.

        Args:
            answer: token ids [T].
            min_prob: probability from 0 to 1.
            counted: whether the answer is one of those counted, and must not foretell itself.
        """
        found = []
        for place, (contexts, token) in enumerate(_walk(answer)):
            if place and self._share(contexts, token, int(counted)) < min_prob:
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


def boundary_free_shares(
    merger: TokenMerger, answers: Sequence[IntArray], boundaries: Sequence[IntArray]
) -> FloatArray:
    """Of the places where each new token would stand, the share without a boundary inside.

    Args:
        merger: of N new tokens.
        answers: base ids of each answer.
        boundaries: ascending places of each answer.

    Returns:
        [N] from 0 to 1; 1 for a token that stands nowhere.
    """
    stands, crossing = np.zeros(len(merger), np.int64), np.zeros(len(merger), np.int64)
    for answer, places in zip(answers, boundaries, strict=True):
        ids = merger.merge(answer)
        new, lengths = ids >= merger.first, merger.lengths_of(ids)
        ends = np.cumsum(lengths)
        inside = np.searchsorted(places, ends) - np.searchsorted(places, ends - lengths, "right")
        which = ids[new] - merger.first
        np.add.at(stands, which, 1)
        np.add.at(crossing, which, inside[new] > 0)
    return (1.0 - crossing / np.maximum(stands, 1)).astype(np.float32)

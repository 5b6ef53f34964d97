"""TASC-spec as the paper has it, for comparison: n-gram tables, longest hit first, fixed mixing.

Of the tables M_n (n tokens of context, n = 1..n_max) the longest that knows the context answers;
where none does, the token most frequent in all outputs. The same construction over the prompt and
the output so far gives a second distribution, mixed in at a fixed weight; the likeliest token is
drafted, and so on until the draft has its fixed length.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from tascade.core import EMPTY_TREE, ROOT, DraftTree, IntArray, Source
from tascade.errors import ConfigError

_BEGIN = -1
_Grams = tuple[int, ...]
_Answer = tuple[int, float, dict[int, float]]
"""A table's answer to a context: the likeliest token, its probability, all probabilities."""


class PaperDrafter:
    """The published drafter: no calibration, no tree, no choice of length.

    What the paper does not say is chosen in its favour. ``n_max`` and ``length`` did best on the
    validation rows of four tasks. Nothing is drafted behind an end token. The request's own tables
    are not pruned: a prompt is short, and few of its n-grams occur five times.

    Args:
        outputs: token ids of the task's outputs, end tokens included.
        n_max: most tokens of context.
        length: tokens in a draft.
        p_min: n-grams of the outputs that occur less often are dropped (the paper's 5).
        weight: of the outputs' distribution; the request's has the rest (the paper's 0.75).
        end_tokens: ids behind which nothing is drafted.
        marker: not in the paper: let the tables know where an output begins, so that its first
            tokens are drafted from the outputs' first tokens, and not from the prompt's last ones.
    """

    name = "tasc-paper"

    def __init__(
        self,
        outputs: Iterable[Sequence[int] | IntArray],
        *,
        n_max: int = 6,
        length: int = 12,
        p_min: int = 5,
        weight: float = 0.75,
        end_tokens: Sequence[int] = (),
        marker: bool = False,
    ) -> None:
        checks = (
            ("n_max", n_max, n_max >= 1, "1 or more"),
            ("length", length, length >= 1, "1 or more"),
            ("p_min", p_min, p_min >= 1, "1 or more"),
            ("weight", weight, 0 <= weight <= 1, "a share in 0..1"),
        )
        for name, value, sound, wanted in checks:
            if not sound:
                raise ConfigError(f"{name} is out of range", got=value, wanted=wanted, where=name)
        self.n_max, self.length, self.p_min, self.weight = n_max, length, p_min, weight
        self._ends = frozenset(end_tokens)
        self._tables = _tables(outputs, n_max, p_min)
        self._marker = marker
        self.start(np.empty(0, np.int32))

    def start(self, prompt: IntArray) -> None:
        """Begin a request: count the n-grams of its prompt."""
        self._context: dict[_Grams, dict[int, int]] = {}
        self._seen: list[int] = []
        self._extend(prompt.tolist())
        begin = (_BEGIN,) if self._marker else tuple(self._seen[-self.n_max :])
        self._output_tail: _Grams = begin

    def propose(self, limit: int, floor: float = 0.0) -> DraftTree:
        """A chain of the fixed length. ``floor`` is ignored: the paper's draft has no estimate."""
        tokens: list[int] = []
        survival: list[float] = []
        sources: list[int] = []
        corpus_tail, request_tail = self._output_tail, tuple(self._seen[-self.n_max :])
        path = 1.0
        for _ in range(min(limit, self.length)):
            token, probability, source = self._next(corpus_tail, request_tail)
            if source == Source.TARGET:
                break
            path *= probability
            tokens.append(token)
            survival.append(path)
            sources.append(source)
            if token in self._ends:
                break
            corpus_tail = (*corpus_tail, token)[-self.n_max :]
            request_tail = (*request_tail, token)[-self.n_max :]
        if not tokens:
            return EMPTY_TREE
        return DraftTree(
            np.array(tokens, np.int32),
            np.arange(ROOT, len(tokens) - 1, dtype=np.int32),
            np.array(survival, np.float32),
            np.array(sources, np.int8),
        )

    def commit(self, tokens: IntArray, verified: int, path: Sequence[int]) -> None:
        """Count the new n-grams of the request."""
        new = tokens.tolist()
        self._output_tail = (*self._output_tail, *new)[-self.n_max :]
        self._extend(new)

    def _next(self, corpus_tail: _Grams, request_tail: _Grams) -> tuple[int, float, int]:
        """The likeliest next token of the mixture, its probability, and who knew it."""
        answer = self._from_outputs(corpus_tail)
        context = self._from_request(request_tail)
        if context is None:
            return (*answer[:2], Source.CORPUS) if answer else (0, 0.0, Source.TARGET)
        scale = (1.0 - self.weight) / sum(context.values())
        best, score, known = -1, -1.0, answer[2] if answer else {}
        if answer:
            best = answer[0]
            score = self.weight * answer[1] + scale * context.get(best, 0)
        for token, count in context.items():
            mixed = self.weight * known.get(token, 0.0) + scale * count
            if mixed > score:
                best, score = token, mixed
        if best not in context:
            return best, score, Source.CORPUS
        return best, score, Source.BOTH if best in known else Source.CONTEXT

    def _from_outputs(self, tail: _Grams) -> _Answer | None:
        for at in range(len(tail) + 1):
            answer = self._tables.get(tail[at:])
            if answer is not None:
                return answer
        return None

    def _from_request(self, tail: _Grams) -> dict[int, int] | None:
        for at in range(len(tail)):
            counts = self._context.get(tail[at:])
            if counts is not None:
                return counts
        return None

    def _extend(self, tokens: list[int]) -> None:
        seen, context = self._seen, self._context
        for token in tokens:
            tail = tuple(seen[-self.n_max :])
            for at in range(len(tail)):
                counts = context.setdefault(tail[at:], {})
                counts[token] = counts.get(token, 0) + 1
            seen.append(token)


def _tables(
    outputs: Iterable[Sequence[int] | IntArray], n_max: int, p_min: int
) -> dict[_Grams, _Answer]:
    """All tables in one dictionary, by context; the empty context is the table of last resort."""
    documents = [[_BEGIN, *(int(token) for token in output)] for output in outputs]
    out: dict[_Grams, _Answer] = {}
    for n in range(n_max + 1):
        grams: Counter[_Grams] = Counter()
        for document in documents:
            grams.update(zip(*(document[i:] for i in range(n + 1)), strict=False))
        after: dict[_Grams, dict[int, int]] = {}
        for gram, count in grams.items():
            if count >= p_min and gram[-1] != _BEGIN:
                after.setdefault(gram[:-1], {})[gram[-1]] = count
        for context, counts in after.items():
            total = sum(counts.values())
            shares = {token: count / total for token, count in counts.items()}
            top = max(shares, key=shares.__getitem__)
            out[context] = (top, shares[top], shares)
    return out

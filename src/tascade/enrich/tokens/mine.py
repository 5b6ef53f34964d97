"""Which n-grams of a task's outputs become tokens.

Three selections: ``flat`` takes the most frequent n-grams as they are; ``paper`` is the loop of
TASC-ft (arXiv 2602.24174, Algorithm 1), which merges the best one and counts again; ``pruned``
goes on with that loop to more tokens than wanted, then drops the ones that save least given all
the others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from tascade.core import IntArray
from tascade.enrich.tokens.counts import Documents, NgramCounts
from tascade.enrich.tokens.merger import TokenMerger
from tascade.errors import ConfigError

Method = Literal["best", "pruned", "paper", "flat"]
Spell = Callable[[Sequence[int]], str | None]
"""Base ids as the string of one token; ``None`` where they must not become one
(see :mod:`tascade.enrich.tokens.family`)."""

_DROPPED = 0.05


@dataclass(frozen=True, slots=True)
class MiningRules:
    """How new tokens are chosen.

    tokens: How many at most.
    items: How many tokens of the moment may become one at a time.
    longest: Base ids a token stands for at most; beyond that it is memorisation.
    least: How often it must occur.
    overgenerate: How many times more are made before pruning.
    method: One of the three, or ``best``: held-out outputs tell
        (:func:`tascade.enrich.tokens.curve.choose_among`).
    """

    tokens: int = 500
    items: int = 4
    longest: int = 16
    least: int = 20
    overgenerate: float = 2.0
    method: Method = "best"


class OutputCounts:
    """Outputs of a task, each kind once, with how often it came.

    Args:
        outputs: base ids of each output, special ids left out or replaced by ``BARRIER``.
        count: how many outputs there are, where those given are pieces of them.
    """

    def __init__(
        self, outputs: Sequence[Sequence[int] | IntArray], count: int | None = None
    ) -> None:
        kinds = Counter(np.asarray(output, np.int32).tobytes() for output in outputs)
        self.kinds = [np.frombuffer(raw, np.int32) for raw in kinds]
        self.weights = list(kinds.values())
        self.flat = np.concatenate([*self.kinds, np.empty(0, np.int32)])
        self.starts = np.cumsum([0] + [len(kind) for kind in self.kinds])
        self.n_outputs = len(outputs) if count is None else count

    @property
    def n_ids(self) -> int:
        """Base ids of all outputs."""
        return int(np.diff(self.starts) @ np.array(self.weights, np.int64))

    def steps(self, merger: TokenMerger) -> int:
        """Steps to say all outputs: their ids after merging, and an end token for each."""
        total, _ = merger.usage(self.flat, self.starts, np.array(self.weights, np.int64))
        return total + self.n_outputs


def choose(
    outputs: OutputCounts, first: int, rules: MiningRules, spell: Spell = repr
) -> list[tuple[int, ...]]:
    """Choose new tokens, the most useful first: any number from the start is a good choice.

    Args:
        outputs: what the tokens shall shorten.
        first: the id the first new token will have, above every base id.
        rules: how to choose; ``best`` is ``pruned`` here.
        spell: how base ids become one token; no two have the same string.

    Returns:
        At most ``rules.tokens`` tuples of base ids.

    Raises:
        ConfigError: a rule is out of range.
    """
    _check(rules)
    if rules.method == "flat":
        return _flat(outputs, rules, spell)
    prune = rules.method != "paper"
    wanted = round(rules.tokens * (rules.overgenerate if prune else 1.0))
    found = _merge_on(outputs, first, rules, wanted, spell)
    if prune and found:
        found = _prune_order(outputs, found, first)
    return found[: rules.tokens]


def _check(rules: MiningRules) -> None:
    ranges = {"tokens": (1, 100_000), "items": (2, 8), "longest": (2, 64), "least": (1, 10**9)}
    for name, (low, high) in ranges.items():
        if not low <= getattr(rules, name) <= high:
            raise ConfigError(
                "a rule for choosing tokens is out of range",
                got=getattr(rules, name),
                wanted=f"{low} to {high}",
                where=name,
            )
    if not 1.0 <= rules.overgenerate <= 10.0 or rules.method not in (
        "best",
        "pruned",
        "paper",
        "flat",
    ):
        raise ConfigError(
            "a rule for choosing tokens is out of range",
            got=(rules.method, rules.overgenerate),
            wanted="best, pruned, paper or flat, and 1.0 to 10.0 times as many before pruning",
            where="method, overgenerate",
        )


def _flat(outputs: OutputCounts, rules: MiningRules, spell: Spell) -> list[tuple[int, ...]]:
    counts = NgramCounts(Documents(outputs.kinds, outputs.weights), rules.items, rules.least)
    n = len(counts)
    scores = counts.counts[:n] * (counts.depth[:n] - 1)
    scores[(counts.counts[:n] < rules.least) | (counts.span[:n] > rules.longest)] = 0
    found: dict[str, tuple[int, ...]] = {}
    for node in np.argsort(-scores, kind="stable").tolist():
        if scores[node] <= 0 or len(found) == rules.tokens:
            break
        expansion = tuple(counts.items_of(node))
        name = spell(expansion)
        if name is not None:
            found.setdefault(name, expansion)
    return list(found.values())


def _merge_on(
    outputs: OutputCounts, first: int, rules: MiningRules, wanted: int, spell: Spell
) -> list[tuple[int, ...]]:
    """The loop: the best n-gram of the moment becomes a token, and everything is counted again."""
    counts = NgramCounts(Documents(outputs.kinds, outputs.weights), rules.items, rules.least)
    made: set[str] = set()
    spelled: list[tuple[int, ...]] = []
    refused: set[int] = set()
    while len(made) < wanted:
        node = _best(counts, rules, refused)
        if node is None:
            break
        expansion = tuple(
            base
            for item in counts.items_of(node)
            for base in (spelled[item - first] if item >= first else (item,))
        )
        name = spell(expansion)
        if name is None or name in made:
            refused.add(node)
            continue
        made.add(name)
        counts.merge(node, first + len(spelled))
        spelled.append(expansion)
    return spelled


def _best(counts: NgramCounts, rules: MiningRules, refused: set[int]) -> int | None:
    """The node with the highest frequency times items saved; of equals the lowest items."""
    n = len(counts)
    scores = counts.counts[:n] * (counts.depth[:n] - 1)
    scores[(counts.counts[:n] < rules.least) | (counts.span[:n] > rules.longest)] = 0
    scores[list(refused)] = 0
    top = int(scores.max())
    if top <= 0:
        return None
    return min(np.flatnonzero(scores == top).tolist(), key=counts.items_of)


def _prune_order(
    outputs: OutputCounts, tokens: list[tuple[int, ...]], first: int
) -> list[tuple[int, ...]]:
    """Order tokens by when they would be dropped, if the least useful ones always went first.

    A token's use is what its absence would cost, the others taking its place as they can. Those
    without any are left out.
    """
    merger = TokenMerger(tokens, first)
    weights = np.array(outputs.weights, np.int64)
    alive = np.ones(len(tokens), np.bool_)
    dropped: list[int] = []
    while alive.any():
        _, uses = merger.usage(outputs.flat, outputs.starts, weights, alive)
        saved = uses * (merger.cost_without(alive) - 1)
        living = np.flatnonzero(alive)
        # Of equals the one made last goes first.
        order = living[np.lexsort((-living, saved[living]))]
        gone = order[: max(1, int(_DROPPED * len(living)))]
        alive[gone] = False
        dropped += gone[saved[gone] > 0].tolist()
    return [tokens[i] for i in dropped[::-1]]

"""How many steps an answer takes by how many tokens are added, and where to stop adding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tascade.enrich.tokens.merger import TokenMerger
from tascade.enrich.tokens.mine import MiningRules, OutputCounts, Spell, choose

STRIDE = 25
"""Tokens between two points of a curve, fewer where it is short."""
_POINTS = 8
_LEAST_GAIN = 0.005


_RARE = 5


@dataclass(frozen=True, slots=True)
class StepCurve:
    """Steps to say the held-out outputs, end tokens included, with the first ``sizes[i]`` tokens.

    ``steps[0]`` is without any. ``outputs``: how many there are.
    """

    sizes: tuple[int, ...]
    steps: tuple[int, ...]
    outputs: int

    def at(self, size: int) -> float:
        """Steps with ``size`` tokens, between two points by the line."""
        return float(np.interp(size, self.sizes, self.steps))

    def fewer(self, size: int) -> float:
        """Base steps over steps with ``size`` tokens."""
        return self.steps[0] / self.at(size)

    def to_json(self) -> dict[str, Any]:
        """One JSON-ready object."""
        return {"sizes": self.sizes, "steps": self.steps, "outputs": self.outputs}


def step_curve(tokens: Sequence[tuple[int, ...]], first: int, held_out: OutputCounts) -> StepCurve:
    """Count steps on held-out outputs, ``STRIDE`` tokens by ``STRIDE`` or in smaller steps.

    Args:
        tokens: base ids of the new tokens, the most useful first.
        first: the id of the first one.
        held_out: outputs that the tokens were not chosen from.
    """
    stride = min(STRIDE, max(1, len(tokens) // _POINTS))
    sizes = [*range(0, len(tokens), stride), len(tokens)] if tokens else [0]
    merger = TokenMerger(tokens, first)
    weights = np.array(held_out.weights, np.int64)
    steps = []
    for size in sizes:
        alive = np.arange(len(tokens)) < size
        total, _ = merger.usage(held_out.flat, held_out.starts, weights, alive)
        steps.append(total + held_out.n_outputs)
    return StepCurve(tuple(sizes), tuple(steps), held_out.n_outputs)


@dataclass(frozen=True, slots=True)
class Choice:
    """New tokens, the most useful first, and the rules that led to them."""

    rules: MiningRules
    tokens: list[tuple[int, ...]]
    curve: StepCurve


def choose_among(
    train: OutputCounts, held_out: OutputCounts, first: int, rules: MiningRules, spell: Spell
) -> list[Choice]:
    """Choose tokens by several rules: which of them generalises best, held-out outputs tell.

    Pruning makes the most of the outputs it counts; where others will come, the tokens it drops
    may serve as fallback. Where outputs are few, rarer n-grams are worth a token, or are not.

    Args:
        train: outputs to choose from.
        held_out: outputs for the curves.
        first: the id of the first new token.
        rules: the rules to vary; a method other than ``best`` is taken as it is.
        spell: see :func:`tascade.enrich.tokens.mine.choose`.
    """
    tried = [rules]
    if rules.method == "best":
        tried = [
            replace(rules, method=method, least=least)
            for method in ("pruned", "paper")
            for least in sorted({rules.least, min(rules.least, _RARE)}, reverse=True)
        ]
    made = [(each, choose(train, first, each, spell)) for each in tried]
    return [Choice(each, tokens, step_curve(tokens, first, held_out)) for each, tokens in made]


def best_at(choices: Sequence[Choice], size: int) -> Choice:
    """The choice whose first ``size`` tokens take the fewest held-out steps."""
    return max(choices, key=lambda choice: choice.curve.fewer(size))


def best_curve(choices: Sequence[Choice]) -> StepCurve:
    """The fewest steps of any choice, size by size."""
    sizes = max((choice.curve.sizes for choice in choices), key=len)
    steps = [round(best_at(choices, n).curve.at(n)) for n in sizes]
    return StepCurve(sizes, tuple(steps), choices[0].curve.outputs)


def stop_at(curve: StepCurve, row_share: float = 0.0) -> tuple[int, str]:
    """How many tokens are worth adding, and why no more.

    Stops where ``STRIDE`` more tokens would save less than half a percent of held-out steps, or
    less than their rows add to a step.

    Args:
        curve: held-out steps.
        row_share: one row of the LM head, as a share of all parameters a step reads.
    """
    for i in range(len(curve.sizes) - 1):
        more = curve.sizes[i + 1] - curve.sizes[i]
        saved = 1.0 - curve.steps[i + 1] / curve.steps[i]
        least = _LEAST_GAIN * min(1.0, more / STRIDE)
        if saved < least:
            why = f"{more} more tokens would save less than {least:.1%} of the steps"
            return curve.sizes[i], why
        if saved < more * row_share:
            return curve.sizes[i], f"{more} more tokens would cost more than they save"
    return curve.sizes[-1], "no more tokens were chosen"

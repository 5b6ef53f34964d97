"""What a task would gain, predicted by replaying reference outputs: nothing is generated.

The decoding loop itself runs, with drafter and budget as in use, over a target that says the
references instead of a model's words. It is as right as the references are what the model will say.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tascade.core import FloatArray, Generation, IntArray, Source
from tascade.draft.budget import Budget
from tascade.draft.costs import CostTable
from tascade.draft.ngram.drafter import NgramDrafter
from tascade.errors import ConfigError
from tascade.forecast.rescue import Rescue, misses, ratio_of_sums, rescues
from tascade.forecast.scripted import TableBudget, replay
from tascade.forecast.statistics import OutputStatistics, Pair, statistics_of
from tascade.index.corpus import CorpusIndex
from tascade.index.similar import SimilarIndex

PROFITS, PROFITS_LITTLE = 1.5, 1.1
"""Predicted speed-ups from which a task profits, and from which it profits at least a little."""

FEWEST = {"references": 30, "own answers": 20}
"""Replayed outputs below which there is no verdict: fewer of the model's own, since it is those
that drafts must foresee.
"""
_NEXT = {
    "references": "; give 60 held-out rows (--held-out), or have the model say some (--answers 20)",
    "own answers": "; have it say more (--answers)",
}

DRAFT_SECONDS = 150e-6
"""Assumed time of one draft where the cost table holds seconds."""

_ASSUMED_SLOPE = 0.01
_UNLIKE = 0.2
"""A share of 4-grams below which answers and references are of different kinds."""
_MARK = "forecast"


@dataclass(frozen=True, slots=True)
class Forecast:
    """What TASC-spec would gain on held-out rows.

    tokens_per_step: committed tokens a target forward, as the decoder counts them
    drafted_per_step: nodes verified a forward
    speedup: against plain decoding, reading the prompt counted as one step of each: a long prompt
        makes it less. A plain step is taken to cost what the cheapest step in the table does.
    low, high: between them 95 % of the speed-ups that other outputs like these would give, by
        resampling the replayed ones (percentile bootstrap)
    answers: what was replayed, ``references`` or the model's ``own answers``
    cost: the step cost it rests on, ``measured`` or the curve that was assumed
    sources: share of output tokens by who drafted them; ``target`` is the model itself
    calibrated_on, replayed: held-out rows that taught the drafter, and the others, replayed after
        them, that gave every number here
    missed: of each replayed output, the places of the tokens that ended a step: those that a
        drafter trained on the task might have
    rescues: what it would gain at most, by the share of them that it has
    """

    verdict: str
    reason: str
    tokens_per_step: float
    drafted_per_step: float
    speedup: float
    low: float
    high: float
    answers: str
    cost: str
    sources: dict[str, float]
    calibrated_on: int
    replayed: int
    output_tokens: int
    forwards: int
    statistics: OutputStatistics
    missed: tuple[tuple[int, ...], ...]
    rescues: tuple[Rescue, ...]

    @property
    def misses(self) -> int:
        """How many tokens ended a step."""
        return sum(map(len, self.missed))

    def to_dict(self) -> dict[str, Any]:
        """Nested plain dictionaries, JSON-ready."""
        found = dataclasses.asdict(self)
        del found["missed"]
        rescued = [dataclasses.asdict(r) for r in self.rescues]
        return found | {"misses": self.misses, "rescues": rescued}

    def describe(self) -> str:
        """A few lines for a person."""
        s = self.statistics
        names = {"target": "the model itself"}
        shares = ", ".join(
            f"{names.get(name, name)} {share:.0%}" for name, share in self.sources.items() if share
        )
        return "\n".join(
            (
                f"{self.verdict}{self._condition()}: {self.reason}",
                f"  predicted    {self.tokens_per_step:.2f} tokens per step, {self.speedup:.2f}x "
                f"decoding speed [{self.low:.2f}x to {self.high:.2f}x], "
                f"{self.drafted_per_step:.1f} drafted tokens a step",
                f"  step cost    {self.cost}",
                f"  drafted by   {shares}",
                f"  replayed     {self.replayed} held-out outputs, {self.output_tokens} tokens; "
                f"calibrated on {self.calibrated_on} others, never on these",
                *self._doubts(),
                f"  outputs      {s.examples} examples, {s.length_mean:.0f} tokens on average "
                f"(median {s.length_median:.0f}, 95% up to {s.length_p95:.0f})",
                f"  variety      {s.distinct_tokens} distinct tokens, {s.entropy_bits:.1f} bits "
                "a token",
                f"  repetition   {s.whole_in_train:.0%} of held-out outputs and "
                f"{s.grams_in_train:.0%} of their 4-grams occur in the training outputs",
            )
        )

    def _condition(self) -> str:
        if not self.verdict.startswith("profits"):
            return ""
        if self.answers == "references":
            return ", if the model answers as the references do"
        return ", if this model is to be used as it is" if self._unlike else ""

    @property
    def _unlike(self) -> bool:
        """Whether the model says something else than the references."""
        return self.answers != "references" and self.statistics.grams_in_train < _UNLIKE

    def _doubts(self) -> list[str]:
        if self.answers == "references":
            return [
                "               reference answers stand in for the model's own, which may repeat "
                "themselves more or less; --answers 20 asks the model (some minutes)"
            ]
        said = [
            "               the model's own answers, drafted from an index of the references, as "
            "`adapt` makes it without --self; with --self a step usually yields more"
        ]
        if self._unlike:
            said.append(
                "               they have little in common with the references: is this what the "
                "model should say? If not, fine-tune it first; drafts come mostly from what a "
                "request repeats"
            )
        return said


def forecast(
    train_outputs: Sequence[IntArray],
    held_out: Sequence[Pair],
    *,
    cost: CostTable | None = None,
    vocab_size: int,
    end_tokens: Sequence[int] = (),
    max_nodes: int = 63,
    train_prompts: Sequence[IntArray | None] = (),
    own: Sequence[Pair] = (),
) -> Forecast:
    """Predict tokens per step and speed-up from reference outputs alone.

    The training examples are indexed in a temporary folder. The first half of the held-out rows
    calibrates the drafter; every number comes from the second half, which the drafter meets as it
    would in use: unseen, learning on the way.

    Args:
        train_outputs: token ids of the training outputs, each with its end token.
        held_out: prompts and outputs of other examples.
        cost: seconds of a step by its tokens, as measured; left as it is. ``None`` assumes a
            curve, which the result names.
        vocab_size: V; every token id is below.
        end_tokens: ids that end an output.
        max_nodes: most nodes in a draft.
        train_prompts: what the training outputs answered, in the same order, where that is known:
            outputs of similar examples are then a source too.
        own: prompts with what the model itself answers. Where there are any, they are replayed, and
            all of ``held_out`` calibrates the drafter.

    Raises:
        ConfigError: no training outputs, or fewer than two held-out rows.
        DataError: an output is empty or has an id outside the vocabulary.
    """
    _check(train_outputs, held_out)
    table, basis, draft_cost = _cost(cost, max_nodes)
    budget = TableBudget(table, max_nodes=max_nodes)
    budget.draft_cost = draft_cost
    calibrating, replayed = held_out, own
    if not own:
        half = len(held_out) // 2
        calibrating, replayed = held_out[:half], held_out[half:]
    with tempfile.TemporaryDirectory(prefix="tascade-") as folder:
        corpus = CorpusIndex.build(
            Path(folder) / "corpus", train_outputs, vocab_size=vocab_size, fingerprint=_MARK
        )
        similar = _similar(Path(folder), train_outputs, train_prompts)
        drafter = NgramDrafter(corpus, similar=similar, end_tokens=end_tokens)
        replay(drafter, budget, calibrating, end_tokens)
        budget.drafts = 0
        said = replay(drafter, budget, replayed, end_tokens)
        corpus.close()
    tally = _Tally(said, budget, budget.drafts * draft_cost)
    answers = "own answers" if own else "references"
    statistics = statistics_of(train_outputs, own or held_out)
    verdict, reason = _verdict(tally, statistics, answers, len(said), len(calibrating))
    return Forecast(
        verdict=verdict,
        reason=reason,
        tokens_per_step=tally.tokens_per_step,
        drafted_per_step=tally.drafted / max(1, tally.forwards),
        speedup=tally.speedup,
        low=tally.low,
        high=tally.high,
        answers=answers,
        cost=basis,
        sources=tally.shares,
        calibrated_on=len(calibrating),
        replayed=len(replayed),
        output_tokens=tally.tokens,
        forwards=tally.forwards,
        statistics=statistics,
        missed=tuple(tuple(misses(made)) for made in said),
        rescues=tally.rescues,
    )


def _check(train_outputs: Sequence[IntArray], held_out: Sequence[Pair]) -> None:
    if not len(train_outputs):
        raise ConfigError("no training outputs", got=0, wanted="at least 1", where="train_outputs")
    if len(held_out) < 2:
        raise ConfigError(
            "too few held-out rows to predict from",
            got=len(held_out),
            wanted="at least 2, one to calibrate on and one to measure",
            where="held_out",
        )


def _similar(
    folder: Path, outputs: Sequence[IntArray], prompts: Sequence[IntArray | None]
) -> SimilarIndex | None:
    known = [(i, prompt) for i, prompt in enumerate(prompts) if prompt is not None and len(prompt)]
    if not known:
        return None
    return SimilarIndex.build(
        folder / "similar",
        known,
        fingerprint=_MARK,
        fetch=lambda i: np.asarray(outputs[i], np.int32),
    )


def _cost(cost: CostTable | None, max_nodes: int) -> tuple[CostTable, str, float]:
    """The table to use (the budget changes it), what it rests on, the cost of one draft."""
    if cost is not None:
        return cost.copy(), "measured", DRAFT_SECONDS
    sizes = (1, max(2, 1 + max_nodes))
    seconds = [1.0 + _ASSUMED_SLOPE * (n - 1) for n in sizes]
    basis = f"assumed: each drafted token makes a step {_ASSUMED_SLOPE:.0%} dearer"
    return CostTable(sizes, seconds), basis, 0.0


class _Tally:
    """Counts over replayed outputs. A prefill costs what a step does: its prompt is left out."""

    def __init__(self, said: Sequence[Generation], budget: Budget, drafts: float) -> None:
        curve = _rising(budget.cost.upto(budget.cost.limit))
        steps = [step for made in said for step in made.steps]
        self.tokens = sum(len(made.tokens) for made in said)
        self.forwards = sum(made.forwards for made in said)
        self.drafted = sum(step.drafted for step in steps)
        stepped = sum(made.stepped_tokens for made in said)
        self.tokens_per_step = stepped / self.forwards if self.forwards else 1.0
        # By output: plain's cost, and what was spent.
        plain = np.asarray([float(curve[0]) * len(made.tokens) for made in said])
        spent = np.asarray([_spent(made, curve) for made in said]) + drafts / max(1, len(said))
        self.speedup = self.low = self.high = 1.0
        if self.tokens:
            self.speedup, self.low, self.high = ratio_of_sums(plain, spent)
        self.rescues = rescues(said, curve[: 1 + budget.max_nodes], drafts / max(1, len(said)))
        counts = Counter(source for made in said for source in made.sources)
        self.shares = {s.name.lower(): counts[s] / max(1, self.tokens) for s in Source}


def _rising(curve: FloatArray) -> FloatArray:
    """A table of costs without what busy moments put into it: fewer tokens never take longer."""
    found: FloatArray = np.minimum.accumulate(curve[::-1])[::-1]
    return found


def _spent(made: Generation, curve: FloatArray) -> float:
    """What an output's steps cost; one token of a prefill without a draft costs a step."""
    steps = float(curve[[step.drafted for step in made.steps]].sum())
    return steps + (len(made.tokens) - made.stepped_tokens) * float(curve[0])


def _verdict(
    tally: _Tally, s: OutputStatistics, answers: str, replayed: int, others: int
) -> tuple[str, str]:
    seen = f"{s.grams_in_train:.0%} of held-out 4-grams occur in the training outputs"
    span = f"{tally.low:.1f}x to {tally.high:.1f}x"
    gain = f"{tally.tokens_per_step:.1f} tokens per step, {span}"
    if replayed < (least := FEWEST[answers]):
        asked = f"{replayed} held-out {answers}"
        if answers == "references":
            asked += f" ({others} others calibrate)"
        return (
            "cannot tell",
            f"{asked} are too few, {least} or more would do; on these {span}{_NEXT[answers]}",
        )
    if tally.speedup >= PROFITS:
        return "profits", f"{gain}; {seen}"
    if tally.speedup >= PROFITS_LITTLE:
        return "profits little", f"{gain}; only {seen}"
    why = "the outputs are too varied to draft"
    if answers != "references":
        why = (
            "the model does not say what the training outputs say (`adapt --self` indexes its own)"
        )
    return (
        "will not profit",
        f"{gain}: {why}; only {seen}. The budget will mostly decode plainly",
    )

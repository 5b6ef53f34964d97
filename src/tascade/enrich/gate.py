"""Whether a tuned model may replace its base: what it says, how well, and in how many steps."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from tascade.config import GateConfig
from tascade.core import IntArray
from tascade.decode.exclusive import exclusive
from tascade.enrich.tokens.merger import TokenMerger
from tascade.errors import TascadeError

Score = Callable[[str, str], float]
"""Of a text against what was wanted, from 0 to 1."""
_DRAWS = 2000


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer: the model's ids [T], and its text."""

    ids: IntArray
    text: str


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean difference and its 95% interval, from a paired bootstrap over rows."""

    value: float
    low: float
    high: float


def paired_bootstrap(ours: Sequence[float], theirs: Sequence[float], seed: int = 0) -> Interval:
    """How much more ``ours`` is than ``theirs``, row by row."""
    gaps = np.asarray(ours, float) - np.asarray(theirs, float)
    rng = np.random.default_rng(seed)
    means = gaps[rng.integers(0, len(gaps), (_DRAWS, len(gaps)))].mean(1)
    low, high = np.quantile(means, (0.025, 0.975)).tolist()
    return Interval(float(gaps.mean()), low, high)


@dataclass(slots=True)
class GateResult:
    """What the gate found.

    ``rows``: held-out prompts asked. ``left_out``: those that the base model was given no time to
    answer, and that neither was asked for that. ``agreement``: share of answers that are the base
    model's, and the LoRA-only control's where there is one. ``score``, ``base_score``,
    ``control_score``: mean task score; ``against_base``, ``against_control``: the differences.
    ``bytes_ratio``: length of the texts over the base's. ``valid``, ``base_valid``: share that
    parses, where the task writes JSON. ``adoption``: steps saved over those that the same texts
    could save. ``drift``: KL(base || tuned) a token, in nats, on text of the base model's own.
    ``failures``: why not.
    """

    rows: int
    fewer_steps: float
    adoption: float
    agreement: float
    bytes_ratio: float
    drift: float
    score: float
    base_score: float
    against_base: Interval
    valid: float | None = None
    base_valid: float | None = None
    control_agreement: float | None = None
    control_score: float | None = None
    against_control: Interval | None = None
    left_out: int = 0
    failures: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether nothing failed."""
        return not self.failures

    def to_json(self) -> dict[str, Any]:
        """One JSON-ready object."""
        return {"passed": self.passed, **asdict(self)}

    def describe(self) -> str:
        """A few lines for a person."""
        gap = self.against_base
        lines = [
            f"{self.rows} held-out prompts: {self.fewer_steps:.2f}x fewer steps, "
            f"{self.adoption:.1%} of the saving possible",
            f"  same answer as the base model: {self.agreement:.1%}"
            + _beside(self.control_agreement),
            f"  task score: {self.score:.1%}, base {self.base_score:.1%} "
            f"({100 * gap.value:+.1f} points, 95% {100 * gap.low:+.1f} to {100 * gap.high:+.1f})"
            + _beside(self.control_score),
            f"  length in bytes: {self.bytes_ratio:.2f} of the base's; "
            f"KL divergence on other text: {self.drift:.3f} nats a token",
        ]
        if self.left_out:
            lines.append(f"  {self.left_out} others were not reached in own_seconds, and left out")
        if self.valid is not None and self.base_valid is not None:
            lines.append(f"  valid JSON: {self.valid:.1%}, base {self.base_valid:.1%}")
        return "\n".join([*lines, *(f"  refused: {failure}" for failure in self.failures)])


def _beside(control: float | None) -> str:
    return "" if control is None else f" (LoRA alone: {control:.1%})"


def evaluate(
    tuned: Sequence[Answer],
    base: Sequence[Answer],
    references: Sequence[str],
    merger: TokenMerger,
    config: GateConfig,
    score: Score,
    *,
    drift: float = 0.0,
    control: Sequence[Answer] = (),
    left_out: int = 0,
) -> GateResult:
    """Compare a tuned model's answers with the base model's, and with a control's.

    Args:
        tuned: its answers to held-out prompts.
        base: the base model's to the same.
        references: what was wanted.
        merger: writes base ids with the new tokens.
        config: what is let pass.
        score: the task's metric.
        drift: KL(base || tuned) on other text.
        control: answers of the model with LoRA alone.
        left_out: how many prompts the base model had no time for.

    Raises:
        TascadeError: no rows, or not as many of each.
    """
    counts = {len(tuned), len(base), len(references), len(control) or len(tuned)}
    if len(counts) > 1 or not tuned:
        raise TascadeError("nothing to judge, or not in pairs", got=f"{sorted(counts)} rows")
    scores = [[score(s.text, r) for s, r in zip(answers, references, strict=True)]
              for answers in (tuned, base, control or base)]  # fmt: skip
    taken, written, spelled = _steps(tuned, merger)
    result = GateResult(
        rows=len(tuned),
        fewer_steps=spelled / taken,
        adoption=(spelled - taken) / max(1, spelled - written),
        agreement=_agreement(tuned, base),
        bytes_ratio=_bytes(tuned) / max(1, _bytes(base)),
        drift=drift,
        score=float(np.mean(scores[0])),
        base_score=float(np.mean(scores[1])),
        against_base=paired_bootstrap(scores[0], scores[1]),
        left_out=left_out,
    )
    if sum(_parses(r) for r in references) > len(references) / 2:
        result.valid = float(np.mean([_parses(answers.text) for answers in tuned]))
        result.base_valid = float(np.mean([_parses(answers.text) for answers in base]))
    if control:
        result.control_agreement = _agreement(control, base)
        result.control_score = float(np.mean(scores[2]))
        result.against_control = paired_bootstrap(scores[0], scores[2])
    result.failures = _failures(result, config)
    return result


def _steps(answers: Sequence[Answer], merger: TokenMerger) -> tuple[int, int, int]:
    """(steps taken, fewest for the same texts, steps in base tokens)."""
    base = [merger.unmerge(s.ids) for s in answers]
    fewest = sum(len(merger.merge(ids)) for ids in base)
    return sum(len(s.ids) for s in answers), fewest, sum(map(len, base))


def _agreement(ours: Sequence[Answer], theirs: Sequence[Answer]) -> float:
    return float(np.mean([a.text == b.text for a, b in zip(ours, theirs, strict=True)]))


def _bytes(answers: Sequence[Answer]) -> int:
    return sum(len(s.text.encode()) for s in answers)


def _parses(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict | list)
    except (ValueError, RecursionError):
        return False


def _failures(found: GateResult, config: GateConfig) -> list[str]:
    failures = []

    def least(what: str, value: float, bound: float) -> None:
        if value < bound:
            failures.append(f"{what} is {value:.3f}, {bound - value:.3f} below {bound:.3f}")

    drop = config.max_score_drop
    least("the task score less the base model's", found.against_base.value, -drop)
    if found.against_control is not None:
        least("the task score less the control's", found.against_control.value, -drop)
    least("agreement with the base model", found.agreement, config.min_agreement)
    least("the share of possible steps saved", found.adoption, config.min_adoption)
    if found.valid is not None and found.base_valid is not None:
        least(
            "the share of valid JSON less the base model's", found.valid - found.base_valid, -drop
        )
    if not 1 / config.max_length_ratio <= found.bytes_ratio <= config.max_length_ratio:
        failures.append(
            f"answers are {found.bytes_ratio:.3f} times as long as the base model's, "
            f"not within {config.max_length_ratio} times"
        )
    if found.drift > config.max_kl:
        what = "KL divergence on other text"
        failures.append(f"{what} is {found.drift:.3f}, above {config.max_kl:.3f}")
    return failures


@torch.inference_mode()
def log_probs(model: Any, text: torch.Tensor, size: int) -> torch.Tensor:
    """Log-probabilities of the next base token: [rows * tokens, size]."""
    with exclusive(model):
        logits = model(input_ids=text.to(model.device)).logits.float()
    found: torch.Tensor = logits.log_softmax(-1)[..., :size].reshape(-1, size).cpu()
    return found


def kl_divergence(base: torch.Tensor, tuned: torch.Tensor) -> float:
    """KL(base || tuned) in nats a token, from log-probabilities [N, V] of each."""
    return float(functional.kl_div(tuned, base, reduction="batchmean", log_target=True))

"""From a base model to one that says new tokens: rows, a start for them, LoRA, and the merge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tascade.config import TuneConfig
from tascade.errors import DataError
from tascade.tokens.segment import Merger
from tascade.train.adapter import merge, wrap
from tascade.train.loop import Tell, Trainer
from tascade.train.loss import AnswerLoss
from tascade.train.rows import STARTS, make_room, start_rows
from tascade.train.samples import Sample, merged

_PROBED = 256


@dataclass(frozen=True, slots=True)
class Taught:
    """A plain model with everything learned in its weights, and how that went.

    ``start``: how the new rows began; ``probe``: held-out loss by start, where several were tried;
    ``losses``: of every step.
    """

    model: Any
    start: str
    probe: dict[str, float]
    losses: list[float]


def teach(
    model: Any,
    merger: Merger,
    train: Sequence[Any],
    held_out: Sequence[Any],
    config: TuneConfig,
    state: Path,
    tell: Tell,
) -> Taught:
    """Train a model to answer in the merger's tokens; the model itself is changed.

    Args:
        model: the base model.
        merger: of the new tokens; one without any trains LoRA alone.
        train: (prompt, answer) pairs in base ids to learn from.
        held_out: pairs by which a start is chosen.
        config: how.
        state: folder to save the state in, and to go on from if there is one.
        tell: called with (stage, done, total).

    Raises:
        DataError: no pair is short enough.
    """
    samples = merged(train, merger, config.longest)
    if not samples:
        raise DataError(
            "no examples to train on",
            got=f"{len(train)} examples, none with a prompt and at most {config.longest} tokens",
            wanted="one or more",
            where="tune.longest",
            fix="raise tune.longest, or give examples with prompts",
        )
    probed: dict[str, float] = {}
    start = config.start
    if len(merger):
        make_room(model, merger.first + len(merger))
        if start == "probe":
            kept = merged(held_out, merger, config.longest)[:_PROBED]
            probed = _probe(model, merger, samples, kept or samples[:_PROBED], config, tell)
            start = min(probed, key=probed.__getitem__)
        start_rows(model, merger.expansions, merger.first, start)
    trainer = _trainer(model, merger, samples, replace(config, start=start))
    trainer.run_saving(state, tell)
    return Taught(merge(trainer.model).eval(), start, probed, trainer.course.losses)


def _trainer(model: Any, merger: Merger, samples: Sequence[Sample], config: TuneConfig) -> Trainer:
    wrapped = wrap(model, merger.first, len(merger), config)
    return Trainer(wrapped, samples, AnswerLoss(config, merger.expansions, merger.first), config)


def _probe(
    model: Any,
    merger: Merger,
    samples: Sequence[Sample],
    kept: Sequence[Sample],
    config: TuneConfig,
    tell: Tell,
) -> dict[str, float]:
    """Held-out loss after a few steps with the rows alone, by how they started.

    The loss before any step does not tell the starts apart as later ones do (arXiv 2608.03494).
    """
    found = {}
    short = replace(config, epochs=0, row_steps=config.probe_steps)
    for number, start in enumerate(STARTS):
        tell("trying starts", number, len(STARTS))
        start_rows(model, merger.expansions, merger.first, start)
        trainer = _trainer(model, merger, samples, short)
        trainer.run()
        found[start] = trainer.held_out_loss(kept)
        trainer.model.unload()
    return found

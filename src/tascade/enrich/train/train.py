"""From a base model to one that says new tokens: rows, a start for them, LoRA, and the merge."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tascade.config import TuneConfig
from tascade.core import Progress
from tascade.enrich.tokens.merger import Merger
from tascade.enrich.train.distributed import Fleet
from tascade.enrich.train.embeddings import STARTS, make_room, start_rows
from tascade.enrich.train.lora import merge, wrap
from tascade.enrich.train.loss import AnswerLoss
from tascade.enrich.train.quantised import merge_into
from tascade.enrich.train.samples import Sample
from tascade.enrich.train.trainer import Trainer
from tascade.errors import DataError

_PROBED = 256
_SHORT = 256


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
    samples: Sequence[Sample],
    held_out: Sequence[Sample],
    config: TuneConfig,
    state: Path,
    tell: Progress,
    fleet: Fleet | None = None,
    full: Any = None,
) -> Taught:
    """Train a model to answer in the merger's tokens; the model itself is changed.

    Args:
        model: the base model.
        merger: of the new tokens; one without any trains LoRA alone.
        samples: what to learn, answers in the merger's tokens.
        held_out: samples by which a start is chosen.
        config: how.
        state: folder to save the state in, and to go on from if there is one.
        tell: called with (stage, done, total).
        fleet: the processes that train together.
        full: where ``model`` is quantised, the base to merge into; it is changed instead.

    Raises:
        DataError: no samples.
    """
    if not samples:
        raise DataError(
            "no examples to train on",
            got=f"none with a prompt and at most {config.longest} tokens",
            wanted="one or more",
            where="tune.longest",
            fix="raise tune.longest, or give examples with prompts",
        )
    probed: dict[str, float] = {}
    start = config.start
    if len(merger):
        for each in (model, full):
            if each is not None:
                make_room(each, merger.first + len(merger))
        if start == "probe":
            kept = held_out[:_PROBED] or samples[:_PROBED]
            probed = _probe(model, merger, samples, kept, config, tell)
            start = min(probed, key=probed.__getitem__)
        start_rows(model, merger.expansions, merger.first, start)
    with _short_attention(model, samples):
        trainer = _trainer(model, merger, samples, replace(config, start=start), fleet)
        trainer.run_saving(state, tell)
    plain = merge(trainer.model) if full is None else merge_into(trainer.model, full)
    return Taught(plain.eval(), start, probed, trainer.course.losses)


@contextmanager
def _short_attention(model: Any, samples: Sequence[Sample]) -> Iterator[None]:
    """On a CPU the fused kernel's way back is slower than plain products of short sequences."""
    before = getattr(model.config, "_attn_implementation", None)
    short = max(map(len, samples)) <= _SHORT
    if before != "sdpa" or not short or model.device.type != "cpu":
        yield
        return
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _trainer(
    model: Any,
    merger: Merger,
    samples: Sequence[Sample],
    config: TuneConfig,
    fleet: Fleet | None = None,
) -> Trainer:
    wrapped = wrap(model, merger.first, len(merger), config)
    loss = AnswerLoss(config, merger.expansions, merger.first)
    return Trainer(wrapped, samples, loss, config, fleet)


def _probe(
    model: Any,
    merger: Merger,
    samples: Sequence[Sample],
    kept: Sequence[Sample],
    config: TuneConfig,
    tell: Progress,
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

"""From a base model to one that says new tokens: rows, their init, LoRA, and the merge."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tascade.config import TuneConfig
from tascade.core import Progress
from tascade.enrich.tokens.merger import TokenMerger
from tascade.enrich.train.embeddings import INITS, init_rows, resize_embeddings
from tascade.enrich.train.lora import merge, wrap
from tascade.enrich.train.samples import Sample
from tascade.enrich.train.trainer import Trainer
from tascade.errors import DataError

PROBE_STEPS = 50
"""Of each trial. Never varied: the 50 of arXiv 2608.03494."""
_PROBED = 256
_SHORT = 256


@dataclass(frozen=True, slots=True)
class TrainResult:
    """A plain model with everything learned in its weights, and how that went.

    ``init``: how the new rows began; ``probe``: held-out loss by init, where several were tried;
    ``losses``: of every step.
    """

    model: Any
    init: str
    probe: dict[str, float]
    losses: list[float]


def train(
    model: Any,
    merger: TokenMerger,
    samples: Sequence[Sample],
    held_out: Sequence[Sample],
    config: TuneConfig,
    state: Path,
    tell: Progress,
) -> TrainResult:
    """Train a model to answer in the merger's tokens; the model itself is changed.

    Args:
        model: the base model.
        merger: of the new tokens; one without any trains LoRA alone.
        samples: what to learn, answers in the merger's tokens.
        held_out: samples by which an init is chosen.
        config: how.
        state: folder to save the state in, and to go on from if there is one.
        tell: called with (stage, done, total).

    Raises:
        DataError: no samples.
    """
    if not samples:
        raise DataError(
            "no examples to train on",
            got=f"none with a prompt and at most {config.max_length} tokens",
            wanted="one or more",
            where="tune.max_length",
            fix="raise tune.max_length, or give examples with prompts",
        )
    probed: dict[str, float] = {}
    init = config.init
    if len(merger):
        resize_embeddings(model, merger.first + len(merger))
        if init == "probe":
            kept = held_out[:_PROBED] or samples[:_PROBED]
            probed = _probe(model, merger, samples, kept, config, tell)
            init = min(probed, key=probed.__getitem__)
        init_rows(model, merger.expansions, merger.first, init)
    with _short_attention(model, samples):
        wrapped = wrap(model, merger.first, len(merger), config)
        trainer = Trainer(wrapped, samples, replace(config, init=init))
        trainer.run_saving(state, tell)
    return TrainResult(merge(trainer.model).eval(), init, probed, trainer.state.losses)


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


def _probe(
    model: Any,
    merger: TokenMerger,
    samples: Sequence[Sample],
    kept: Sequence[Sample],
    config: TuneConfig,
    tell: Progress,
) -> dict[str, float]:
    """Held-out loss after a few steps with the rows alone, by how they began.

    The loss before any step does not tell the inits apart as later ones do (arXiv 2608.03494).
    """
    found = {}
    short = replace(config, epochs=0)
    for number, init in enumerate(INITS):
        tell("trying inits", number, len(INITS))
        init_rows(model, merger.expansions, merger.first, init)
        wrapped = wrap(model, merger.first, len(merger), config)
        trainer = Trainer(wrapped, samples, short, PROBE_STEPS)
        trainer.run()
        found[init] = trainer.held_out_loss(kept)
        trainer.model.unload()
    return found

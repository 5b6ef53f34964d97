"""`tascade drafter`: train a drafter on a task, into its pack (TAPS)."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Unpack

import numpy as np

from tascade.answers.own import Answer, enough_own, own_held_out
from tascade.builder import PackBuilder, open_with_rows
from tascade.config import Recipe
from tascade.core import Progress, Row
from tascade.data.prepare import Prepared, spread
from tascade.draft.neural.canary import Canary
from tascade.draft.neural.stored import DrafterInfo, save_drafter, weights_mark
from tascade.draft.neural.training import (
    DraftVocabulary,
    Pair,
    acceptance,
    draftable,
    read_states,
    train,
    within,
)
from tascade.enrich.train.checkpoint import begin_run, has_state, model_digest, rows_digest
from tascade.errors import ConfigError
from tascade.forecast.probe import probe
from tascade.forecast.replay import forecast
from tascade.forecast.rescue import gain_at
from tascade.model import TaskModel
from tascade.options import RowOptions
from tascade.own_answers import bulk_answerer
from tascade.util.progress import shows_progress, teller

VOCABULARY = 2048
"""Most tokens that a drafter can say."""
TOKENS = 200_000
"""Most tokens of prompts and answers that it learns from; their states are kept in memory."""
ROUNDS, HELD_OUT = 6, 100
_STATE, _NO_MORE = "state", 1e-6
"""Where training stands, in the folder of a run; seconds for answers where there are enough."""
WORTH = 1.05
"""Forecast gain over the drafts without it below which none is trained."""


@dataclass(frozen=True, slots=True)
class TrainedPack:
    """What was trained, and where it lies."""

    pack: str
    info: DrafterInfo

    def to_json(self) -> dict[str, Any]:
        """JSON-ready."""
        info = self.info
        return {
            "pack": self.pack,
            "rows": info.rows,
            "tokens": info.tokens,
            "own_answers": info.own_answers,
            "rounds": info.rounds,
            "held_out": info.held_out,
            "acceptance": list(info.acceptance),
            "coverage": info.coverage,
        }

    def describe(self) -> str:
        """A few lines for a person."""
        info = self.info
        shares = ", ".join(f"{share:.0%}" for share in info.acceptance)
        return (
            f"trained a drafter into {self.pack}\n"
            f"  learned from {info.rows} answers ({info.own_answers} the model's own, "
            f"{info.tokens} tokens with their prompts), {info.rounds} times\n"
            f"  right        {shares} of its likeliest tokens at depth 1, 2, ... on "
            f"{info.held_out} held-out answers, if all before were\n"
            f"  vocabulary   has {info.coverage:.1%} of the tokens of these answers\n"
            "  it drafts beside the task's outputs from now on, where that pays (`tascade bench`)"
        )


@dataclass(frozen=True, slots=True)
class Worth:
    """What a trained drafter would add to the task's outputs, at most.

    misses: of the ``tokens`` of replayed answers, those that the outputs' drafts missed
    foreseen: shares of these that are a probe's likeliest token, and among its four likeliest
    gain: in speed, if all of the latter were drafted
    """

    misses: int
    tokens: int
    foreseen: tuple[float, float]
    gain: float

    @property
    def pays(self) -> bool:
        """Whether it is worth training one."""
        return self.gain >= WORTH

    def describe(self) -> str:
        """What was found, in a few words."""
        return (
            f"{self.gain:.2f}x over the task's outputs alone at most: they miss {self.misses} of "
            f"{self.tokens} tokens, and a probe has {self.foreseen[1]:.0%} of these among its four "
            "likeliest"
        )


@shows_progress
def train_drafter(
    pack: str | Path,
    data: Any,
    *,
    held_out: Any = None,
    own: bool = True,
    force: bool = False,
    rounds: int = ROUNDS,
    seed: int = 0,
    resume: bool = False,
    progress: Progress | bool | None = None,
    **options: Unpack[RowOptions],
) -> TrainedPack:
    """Train a small network that drafts for a pack's model, from the model's own hidden states.

    What is said stays the model's: the network only drafts, beside the task's outputs, and the
    pack's budget asks it where that pays.

    Args:
        pack: an adapted task.
        data: training examples with prompts (see :func:`tascade.adapt`).
        held_out: examples to measure on; a share of ``data`` if absent.
        own: learn from the model's own answers, as many as a quarter of an hour allows, and not
            from the references.
        force: train one even where the forecast says that it would not pay.
        rounds: how often all of them are learned.
        seed: of the network's first weights, and of the order of rows.
        resume: go on with the answers, and the training, of a run that was stopped; they lie beside
            the pack (:func:`drafter_folder`).
        progress: called with (stage, done, total); bars by default (see
            :func:`tascade.util.progress.shown`).
        options: how rows are read (see :class:`tascade.options.RowOptions`); the pack's own fields
            by default.

    Raises:
        PackError: no pack there.
        DataError: a row cannot be used, or there are none.
        ConfigError: rows without prompts, no time for enough own answers, a forecast that it would
            not pay, or a run to go on with that was another.
    """
    tell = teller(progress)
    if rounds < 1:
        raise ConfigError("rounds is out of range", got=rounds, wanted="1 or more", where="rounds")
    task, recipe, prepared = open_with_rows(pack, data, held_out, options, tell)
    rows, checked = _learnable(prepared.train, prepared.validation)
    work = drafter_folder(task.pack.path)
    about: dict[str, Any] = {"own answers": own, "max_new_tokens": recipe.max_new_tokens}
    about |= {"model": model_digest(task.model), "dtype": str(task.model.dtype)}
    about |= {"rows": rows_digest(rows), "held out": rows_digest(checked)}
    begin_run(work, about, resume=resume)
    if own:
        rows, checked = _own(rows, checked, task, recipe, tell, work)
    worth = forecast_drafter(task, rows, checked, tell)
    if not worth.pays and not force:
        raise ConfigError(
            "a trained drafter would not pay here",
            got=worth.describe(),
            wanted=f"{WORTH:g}x or more",
            where=str(task.pack.path),
            fix="leave it; --force (force=True) trains one all the same, with --resume from the "
            "answers of this run",
        )
    made = _train(task, rows, checked, tell, work, own=own, rounds=rounds, seed=seed)
    task.pack.save()
    shutil.rmtree(work, ignore_errors=True)
    return TrainedPack(str(task.pack.path), made)


def drafter_folder(pack: Path) -> Path:
    """Where a run keeps its answers, and the state of its training, until it is done."""
    pack = pack.absolute()
    return pack.with_name(f".{pack.name}.drafter")


def network_stage(
    task: PackBuilder,
    prepared: Prepared,
    recipe: Recipe,
    progress: Progress,
    *,
    work: Path | None = None,
    resume: bool = False,
) -> None:
    """Train a drafter on what the pack indexes, and draft with it too (TAPS).

    Where it would not pay there is none, and a warning says so. ``work``: a folder to keep the
    state of training in meanwhile, beside the own answers; ``resume``: go on with the one there, if
    it learned from the same rows.

    Raises:
        ConfigError: rows without prompts, or no time for enough own answers.
    """
    task_model, own = task.task_model, recipe.spec.own_answers
    train = prepared.train
    if own:
        enough_own(len(prepared.own), train, "training prompts", recipe.spec.own_seconds)
        train = [train[at] for at in prepared.own]
    rows, checked = _learnable(train, prepared.validation)
    if own:
        answer = bulk_answerer(task_model, task.stored, recipe, progress)
        checked = _own_checked(checked, answer, recipe)
    worth = forecast_drafter(task_model, rows, checked, progress)
    if not worth.pays:
        said = f"no drafter was trained, it would not pay: {worth.describe()}"
        warnings.warn(said, stacklevel=2)
        return
    if work is not None:
        about = {"model": model_digest(task_model.model), "rows": rows_digest(rows)}
        # Where there was time for more answers, it is these that are learned from.
        begin_run(work, about, resume=resume, or_anew=True)
    _train(task_model, rows, checked, progress, work, own=own)
    task_model.reload()


def forecast_drafter(
    task: TaskModel, rows: list[Pair], checked: list[Pair], tell: Progress
) -> Worth:
    """Forecast what a drafter trained on ``rows`` would add, and note it in the pack."""
    tell("forecasting what it would add", 0, None)
    found = forecast(
        [answer for _, answer in rows],
        checked,
        cost=task.cost,
        vocab_size=task.target.vocab_size,
        end_tokens=task.ends,
        train_prompts=[prompt for prompt, _ in rows],
    )
    replayed = checked[len(checked) // 2 :]
    seen = probe(task.model, list[Row](rows), replayed, found.missed, tell)
    first, four = seen.at_misses[:2]
    worth = Worth(found.misses, found.output_tokens, (first, four), gain_at(found.rescues, four))
    task.pack.note(
        drafter={
            "misses": found.misses,
            "tokens": found.output_tokens,
            "foreseen": first,
            "foreseen_among_4": four,
            "most_gain": worth.gain,
        }
    )
    return worth


def _learnable(train: Sequence[Row], validation: Sequence[Row]) -> tuple[list[Pair], list[Pair]]:
    """Training rows, as many as there are tokens for, and held-out ones.

    Raises:
        ConfigError: there are none of either.
    """
    rows = within(draftable(train), TOKENS)
    checked = spread(draftable(validation), HELD_OUT)
    if not rows or not checked:
        raise ConfigError(
            "nothing to train a drafter on",
            got=f"{len(rows)} training rows with prompts, {len(checked)} held-out ones",
            wanted="prompts, and answers of two tokens or more",
            where="data",
        )
    return rows, checked


def _own(
    rows: list[Pair],
    checked: list[Pair],
    task: TaskModel,
    recipe: Recipe,
    tell: Progress,
    work: Path,
) -> tuple[list[Pair], list[Pair]]:
    """The same prompts, as many as there is time for, with the model's own answers.

    They are kept in ``work``; once training has begun there, no more are asked for.
    """
    if has_state(work / _STATE):
        recipe = replace(recipe, spec=replace(recipe.spec, own_seconds=_NO_MORE))
    # Without the drafter that is there, which may be of other weights.
    alone = task.new_decoder(task.new_drafter(), task.new_budget())
    given = partial(bulk_answerer, task, task.pack.model, recipe, tell, decoder=alone)
    asked, seconds = list[Row](rows), recipe.spec.own_seconds
    found, _ = given(kept=work / "answers.jsonl")(asked)
    enough_own(len(found), asked, "training prompts", seconds)
    return draftable(found), _own_checked(checked, given(kept=work / "held-out.jsonl"), recipe)


def _own_checked(checked: list[Pair], answer: Answer, recipe: Recipe) -> list[Pair]:
    """The same held-out prompts, as many as there is time for, with the model's own answers."""
    held, _ = own_held_out(answer, list[Row](checked), recipe.spec.own_seconds)
    return draftable(held)


def _train(
    task: TaskModel,
    rows: list[Pair],
    checked: list[Pair],
    tell: Progress,
    work: Path | None,
    *,
    own: bool,
    rounds: int = ROUNDS,
    seed: int = 0,
) -> DrafterInfo:
    """Train a drafter, put it into the pack's folder, and note it as a stage."""
    model, info = task.model, task.pack.info
    vocabulary = DraftVocabulary.of([answer for _, answer in rows], VOCABULARY)
    prefixes = task.target.prefixes
    samples, tried = (read_states(model, part, prefixes, tell) for part in (rows, checked))
    kept = None if work is None else work / _STATE
    network = train(model, samples, vocabulary, tell, rounds=rounds, seed=seed, kept=kept)
    shares, _ = acceptance(network, tried, model.get_input_embeddings(), vocabulary)
    said = np.concatenate([answer for _, answer in checked])
    made = DrafterInfo(
        target=weights_mark(model),
        fingerprint=info.fingerprint,
        rows=len(samples),
        tokens=sum(map(len, samples)),
        own_answers=len(samples) if own else 0,
        rounds=rounds,
        held_out=len(tried),
        acceptance=tuple(shares),
        coverage=float(np.isin(said, vocabulary.ids.numpy()).mean()),
        canary=Canary.of(model, network, vocabulary, checked),
    )
    save_drafter(task.pack.drafter, network, vocabulary.ids, made, model.dtype)
    if "drafter" not in info.stages:
        task.pack.note(stages=[*info.stages, "drafter"])
    return made

"""`tascade drafter`: train a drafter on a task, into its pack (TAPS)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Unpack

import numpy as np

from tascade.answers.own import enough_own, own_answers, own_held_out
from tascade.builder import open_with_rows
from tascade.config import Recipe
from tascade.core import Progress, Row
from tascade.data.prepare import Prepared, spread
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
from tascade.errors import ConfigError
from tascade.forecast.probe import probe
from tascade.forecast.replay import forecast
from tascade.forecast.rescue import gain_at
from tascade.model import TaskModel
from tascade.options import RowOptions
from tascade.util.progress import shows_progress, teller

VOCABULARY = 2048
"""Most tokens that a drafter can say."""
TOKENS = 200_000
"""Most tokens of prompts and answers that it learns from; their states are kept in memory."""
ROUNDS, HELD_OUT = 6, 100
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
        progress: called with (stage, done, total); bars by default (see
            :func:`tascade.util.progress.shown`).
        options: how rows are read (see :class:`tascade.options.RowOptions`); the pack's own fields
            by default.

    Raises:
        PackError: no pack there.
        DataError: a row cannot be used, or there are none.
        ConfigError: rows without prompts, no time for enough own answers, or a forecast that it
            would not pay.
    """
    tell = teller(progress)
    if rounds < 1:
        raise ConfigError("rounds is out of range", got=rounds, wanted="1 or more", where="rounds")
    task, recipe, prepared = open_with_rows(pack, data, held_out, options, tell)
    info = task.pack.info
    rows, checked = _answers(task, prepared, recipe, own, tell)
    prefixes, model = task.target.prefixes, task.model
    if not force:
        _check_worth(task, rows, checked, tell)
    vocabulary = DraftVocabulary.of([answer for _, answer in rows], VOCABULARY)
    samples, tried = (read_states(model, part, prefixes, tell) for part in (rows, checked))
    network = train(model, samples, vocabulary, tell, rounds=rounds, seed=seed)
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
    )
    save_drafter(task.pack.drafter, network, vocabulary.ids, made, model.dtype)
    if "drafter" not in info.stages:
        task.pack.note(stages=[*info.stages, "drafter"])
        task.pack.save()
    return TrainedPack(str(task.pack.path), made)


def _check_worth(task: TaskModel, rows: list[Pair], checked: list[Pair], tell: Progress) -> None:
    """Forecast what a trained drafter would add to the task's outputs, and refuse a loss.

    Raises:
        ConfigError: less than :data:`WORTH` at most.
    """
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
    gain = gain_at(found.rescues, seen.at_misses[1])
    if gain < WORTH:
        raise ConfigError(
            "a trained drafter would not pay here",
            got=f"{gain:.2f}x over the task's outputs alone at most: they miss {found.misses} of "
            f"{found.output_tokens} tokens, and a probe has {seen.at_misses[1]:.0%} of these among "
            "its four likeliest",
            wanted=f"{WORTH:g}x or more",
            where=str(task.pack.path),
            fix="leave it; --force (force=True) trains one all the same",
        )


def _answers(
    task: TaskModel, prepared: Prepared, recipe: Recipe, own: bool, tell: Progress
) -> tuple[list[Pair], list[Pair]]:
    """Training rows, as many as there are tokens for, and held-out ones; with own answers."""
    rows = within(draftable(prepared.train), TOKENS)
    checked = spread(draftable(prepared.validation), HELD_OUT)
    if not rows or not checked:
        raise ConfigError(
            "nothing to train a drafter on",
            got=f"{len(rows)} training rows with prompts, {len(checked)} held-out ones",
            wanted="prompts, and answers of two tokens or more",
            where="data",
        )
    if not own:
        return rows, checked
    seconds, asked = recipe.spec.own_seconds, list[Row](rows)
    answer = partial(
        own_answers,
        # Without the drafter that is there, which may be of other weights.
        task.new_decoder(task.new_drafter(), task.new_budget()),
        params=task.params(max_new_tokens=recipe.max_new_tokens, temperature=0),
        seconds=seconds,
        tell=tell,
    )
    found, _ = answer(asked)
    enough_own(len(found), asked, "training prompts", seconds)
    held, _ = own_held_out(answer, list[Row](checked), seconds)
    return draftable(found), draftable(held)

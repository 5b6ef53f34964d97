"""`tascade drafter`: train a drafter on a task, into its pack (TAPS)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

import numpy as np

from tascade.answers.own import enough_own, own_held_out
from tascade.builder import answerer
from tascade.config import Recipe
from tascade.core import Progress, Row
from tascade.data.prepare import Prepared, prepare, spread
from tascade.draft.neural.stored import DrafterInfo, save_drafter, weights_mark
from tascade.draft.neural.training import DraftVocabulary, Pair, acceptance, read_states, train
from tascade.enrich.tokens.stored import read_tokens
from tascade.errors import ConfigError
from tascade.model import TaskModel
from tascade.options import RowOptions, laid_over
from tascade.util.progress import shows_progress, teller

VOCABULARY = 2048
"""Most tokens that a drafter can say."""
TOKENS = 200_000
"""Most tokens of prompts and answers that it learns from; their states are kept in memory."""
ROUNDS, HELD_OUT = 6, 100


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
        own: learn from the model's own answers, as many as ``spec.own_seconds`` allow, and not from
            the references.
        rounds: how often all of them are learned.
        seed: of the network's first weights, and of the order of rows.
        progress: called with (stage, done, total); bars by default (see
            :func:`tascade.util.progress.shown`).
        options: how rows are read (see :class:`tascade.options.RowOptions`); the pack's own fields
            by default.

    Raises:
        PackError: no pack there.
        DataError: a row cannot be used, or there are none.
        ConfigError: rows without prompts, or no time for enough own answers.
    """
    tell = teller(progress)
    if rounds < 1:
        raise ConfigError("rounds is out of range", got=rounds, wanted="1 or more", where="rounds")
    tell("loading the model", 0, None)
    task = TaskModel.from_pretrained(pack, head="full")
    info = task.pack.info
    recipe = Recipe(max_new_tokens=info.max_new_tokens, chat=task.chat, data=task.pack.reading)
    recipe = laid_over(recipe, options)
    merger = read_tokens(task.pack.model)
    prepared = prepare(task.tokenizer, task.ends, data, held_out, recipe, tell, merger)
    rows, checked = _answers(task, prepared, recipe, own, tell)
    prefixes, model = task.target.prefixes, task.model
    vocabulary = DraftVocabulary.of([answer for _, answer in rows], VOCABULARY)
    samples = read_states(model, rows, prefixes, tell)
    tried = read_states(model, checked, prefixes, tell)
    if not samples or not tried:
        raise ConfigError(
            "nothing to train a drafter on",
            got=f"{len(samples)} training answers, {len(tried)} held-out ones",
            wanted="answers of two tokens or more, with prompts",
            where="data",
        )
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


def _answers(
    task: TaskModel, prepared: Prepared, recipe: Recipe, own: bool, tell: Progress
) -> tuple[list[Pair], list[Pair]]:
    """Training rows, as many as there are tokens for, and held-out ones; with own answers."""
    rows, checked = _with_prompts(prepared.train), _with_prompts(prepared.validation)
    mean = sum(len(p) + len(a) for p, a in rows) / max(1, len(rows))
    rows, checked = spread(rows, int(TOKENS / max(1.0, mean))), spread(checked, HELD_OUT)
    if not own:
        return rows, checked
    seconds, asked = recipe.spec.own_seconds, list[Row](rows)
    answer = answerer(task, recipe, tell, temperature=0)
    found, _ = answer(asked)
    enough_own(len(found), asked, "training prompts", seconds)
    held, _ = own_held_out(answer, list[Row](checked), seconds)
    return _with_prompts(found), _with_prompts(held)


def _with_prompts(rows: Sequence[Row]) -> list[Pair]:
    return [(prompt, answer) for prompt, answer in rows if prompt is not None and len(prompt)]

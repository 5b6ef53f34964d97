"""What a new pack is put through before it is saved: calibration, and the comparison with plain."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tascade.config import Recipe
from tascade.core import IntArray, Progress, Row
from tascade.data.choose import spread
from tascade.decode.equality import NearTies
from tascade.decode.loop import AllNodes
from tascade.errors import TascadeError
from tascade.model import TaskModel
from tascade.tailor.tailored import GUARANTEES

_CHECKED_ROWS, _CHECKED_TOKENS, _CHECKED_NODES = 4, 64, 16
_REPLAYED = 4
"""Outputs replayed for each prompt that would be decoded: a replay runs no model."""


def calibrate(
    task_model: TaskModel,
    rows: Sequence[Row],
    recipe: Recipe,
    tell: Progress,
) -> int:
    """Decode validation prompts, learning on the way; saves what was learned, notes step costs.

    Returns how many rows were decoded: ``calibration_rows`` at most, spread over the file, and
    within ``calibration_seconds``. Where no row has a prompt, outputs are replayed instead.
    """
    pack, most = task_model.pack, recipe.spec.calibration_rows
    pack.note(costs={**pack.info.costs, task_model.cost_key: task_model.cost.to_json()})
    prompts = [prompt for prompt, _ in rows if prompt is not None]
    chosen = spread(prompts, most)
    params = task_model.params(max_new_tokens=recipe.max_new_tokens)
    deadline = time.monotonic() + recipe.spec.calibration_seconds
    done = 0
    for done, prompt in enumerate(chosen, 1):
        tell("calibrating", done, len(chosen))
        task_model.decoder.generate(prompt, params)
        if time.monotonic() > deadline:
            break
    if not prompts:
        done = replay_references(task_model, spread([a for _, a in rows], _REPLAYED * most))
    tell("calibrating", done, max(done, 1))
    task_model.calibration.save(pack.calibration)
    return done


def replay_references(task_model: TaskModel, answers: Sequence[IntArray]) -> int:
    """Calibrate on reference outputs alone, where the data has no prompts to decode."""
    drafter = task_model.decoder.drafter
    for answer in answers:
        drafter.start(np.empty(0, np.int32))
        at = 0
        while at < len(answer):
            drafter.propose(16, 0.02)
            drafter.commit(answer[at : at + 2], 0, ())
            at += 2
    return len(answers)


@dataclass(frozen=True, slots=True)
class Checked:
    """How many answers were compared with plain decoding's, how many of them differ, and how many
    of those part where plain decoding itself could hardly decide.
    """

    checked: int
    differing: int = 0
    near_ties: int = 0


def check(task_model: TaskModel, rows: Sequence[Row], recipe: Recipe) -> Checked:
    """Compare a few answers with plain decoding's; what it finds is not learned from.

    A difference that is a near tie (see :class:`tascade.decode.equality.NearTies`) is counted and
    let pass. Any other means in float32 that verification is broken. In half precision it need
    not: there attention over one row and over several may round apart by more than a near tie
    allows, so it is warned of.

    A head that is approximate changes words on purpose: with it nothing is compared.

    Raises:
        TascadeError: an answer in float32 differs, and it is no near tie.
    """
    import torch

    tailored = task_model.tailored
    if tailored is not None and GUARANTEES[tailored.config.head] != "lossless":
        return Checked(0)
    params = task_model.params(max_new_tokens=min(_CHECKED_TOKENS, recipe.max_new_tokens))
    # A budget may decide that no draft pays here, and then there would be nothing to compare.
    drafted = task_model.new_decoder(task_model.new_drafter(), AllNodes(_CHECKED_NODES))
    near_ties = NearTies(task_model.target, params)
    prompts = spread([prompt for prompt, _ in rows if prompt is not None], _CHECKED_ROWS)
    differing = ties = 0
    for prompt in prompts:
        fast = drafted.generate(prompt, params).tokens
        plain = task_model.plain.generate(prompt, params).tokens
        if fast == plain:
            continue
        differing += 1
        if near_ties.is_near_tie(prompt, plain, fast):
            ties += 1
        elif task_model.model.dtype == torch.float32:
            raise TascadeError(
                "speculative decoding changed an answer: please report this",
                got=fast[:20],
                wanted=f"{plain[:20]} (plain decoding)",
                where=type(task_model.model).__name__,
                fix="use the model without tascade until this is understood",
            )
    if differing > ties:
        warnings.warn(
            f"{differing - ties} of {len(prompts)} answers differ from plain decoding's, and by "
            f"more than a near tie: in {task_model.model.dtype} rounding may do that; adapt in "
            "float32 to be sure that it is no more",
            stacklevel=2,
        )
    return Checked(len(prompts), differing, ties)

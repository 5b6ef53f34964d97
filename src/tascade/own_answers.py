"""The stage of a pack that is made of the model's own answers: in bulk, and gone on with."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tascade.answers.engine import VllmEngine, why_not_vllm
from tascade.answers.own import Answer, Bulk, count_prompts, own_answers
from tascade.builder import PackBuilder, check
from tascade.config import Recipe
from tascade.core import Progress, Row
from tascade.data.prepare import Prepared
from tascade.decode.loop import Decoder
from tascade.decode.sampling import SamplingParams
from tascade.enrich.train.checkpoint import begin_run, model_digest, rows_digest
from tascade.errors import ConfigError
from tascade.model import TaskModel
from tascade.util.files import checksum

_BATCH = {"cpu": 8, "cuda": 32}
"""Size of a batch without drafts, by the kind of device."""


def index_own(
    task: PackBuilder,
    prepared: Prepared,
    recipe: Recipe,
    progress: Progress,
    *,
    work: Path | None = None,
    resume: bool = False,
) -> None:
    """Index the model's own greedy answers to the training prompts instead of the references.

    The references' index drafts for this pass, so that it runs at the task's speed already. A
    prompt that time does not reach keeps its reference; the pack says how many do. ``work``: a
    folder to keep the answers in meanwhile (:func:`answers_folder`); ``None`` keeps none.
    ``resume``: go on with those that a run left there which was stopped.

    Raises:
        ConfigError: the run to go on with was another.
        TascadeError: drafts change words (see :func:`tascade.builder.check`), which is better
            known before this work than after it.
    """
    task_model, pack = task.task_model, task.pack
    check(task_model, prepared.asked, recipe, progress, most=1)  # all are compared in the end
    logged = set(prepared.own)
    at = [place for place in range(len(prepared.train)) if place not in logged]
    asked = [prepared.train[place] for place in at]
    kept = None if work is None else _begin(work, task, asked, recipe, resume=resume)
    answer = bulk_answerer(task_model, task.stored, recipe, progress, kept)
    own, places = answer(asked)
    left = count_prompts(asked) - len(own)
    for place, row in zip(places, own, strict=True):
        prepared.train[at[place]] = row
    prepared.own = sorted([*logged, *(at[place] for place in places)])
    costs = {**pack.info.costs, **task_model.measured}
    pack.note(
        costs=costs, own_answers=len(prepared.own), rows={**pack.info.rows, "references_kept": left}
    )
    task.index(prepared.train, recipe, progress)


def check_logs(logs: object, tune: bool) -> None:
    """Refuse logs where the model is tuned first.

    Raises:
        ConfigError: both are asked for.
    """
    if tune and logs is not None and not (isinstance(logs, str) and not logs):
        raise ConfigError(
            "what the model served are not the tuned model's answers",
            got="logs, and tune",
            wanted="one of them",
            where="logs",
            fix="leave the logs out; or tune first, serve the tuned model, and adapt with its logs",
        )


def answers_folder(target: Path) -> Path:
    """Where the model's own answers are kept until the pack ``target`` is made."""
    return target.with_name(f".{target.name}.answers")


def bulk_answerer(
    task_model: TaskModel,
    stored: str,
    recipe: Recipe,
    tell: Progress,
    kept: Path | None = None,
    decoder: Decoder | None = None,
) -> Answer:
    """What answers training prompts with a pack's drafts: greedy, in vLLM or batches if sooner.

    Args:
        task_model: over the pack.
        stored: the folder or hub id that another process would load the same model by; empty for
            one that is in memory alone.
        recipe: its ``max_new_tokens`` and ``spec.own_seconds``.
        tell: called with (stage, done, total).
        kept: a file of the answers so far, which are not given again.
        decoder: what answers one by one; the model's own by default.
    """
    model = task_model.model
    params = task_model.params(max_new_tokens=recipe.max_new_tokens, temperature=0)
    engine = None
    if not why_not_vllm(model, stored, params):
        engine = VllmEngine(model, stored, task_model.pack)
    size = _BATCH.get(model.device.type, _BATCH["cpu"])
    bulk = Bulk(partial(task_model.batches, size), engine, kept)
    given: dict[str, Any] = {"params": params, "seconds": recipe.spec.own_seconds, "tell": tell}
    return partial(own_answers, decoder or task_model.decoder, bulk=bulk, **given)


def _begin(
    work: Path, task: PackBuilder, rows: Sequence[Row], recipe: Recipe, *, resume: bool
) -> Path:
    """The file in ``work`` that answers to these rows' prompts are kept in.

    Raises:
        ConfigError: those that are there are another model's, or to other prompts. After a tuning
            they are thrown away instead.
    """
    params = task.task_model.params(max_new_tokens=recipe.max_new_tokens, temperature=0)
    about = _answered_by(task, rows, params)
    # After a tuning it is that which is gone on with.
    begin_run(work, about, resume=resume, or_anew=task.tuned is not None)
    return work / "answers.jsonl"


def _answered_by(task: PackBuilder, rows: Sequence[Row], params: SamplingParams) -> dict[str, Any]:
    """What answers depend on: those of another run are others where any of it is."""
    nothing = np.empty(0, np.int32)
    config = getattr(task.loaded[0], "generation_config", None)
    asks = {} if config is None else config.to_dict()
    asks.pop("transformers_version", None)
    return {
        "model": model_digest(task.loaded[0]),
        "dtype": str(task.loaded[0].dtype),
        "tokenizer": task.pack.info.fingerprint,
        "prompts": rows_digest([(prompt, nothing) for prompt, _ in rows]),
        "max_new_tokens": params.max_new_tokens,
        "end tokens": list(params.end_tokens),
        "generation config": checksum(json.loads(json.dumps(asks, default=str))),
    }

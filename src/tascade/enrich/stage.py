"""TASC-ft's stage: a model that answers in the task's own tokens, checked, and exported plain.

What lies above is handed in: the model, the examples, and what gives the model's own answers.
"""

from __future__ import annotations

import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tascade.answers.own import Answering
from tascade.config import Recipe
from tascade.core import Progress
from tascade.data.encode import end_tokens, fingerprint
from tascade.data.prepare import Prepared, spread
from tascade.enrich.distill_data import DistillData, make_distill_data
from tascade.enrich.gate import Score
from tascade.enrich.run import Tuned, TuningRun
from tascade.enrich.tokens.family import TokenizerFamily
from tascade.enrich.train.checkpoint import begin_run, model_digest, rows_digest
from tascade.enrich.train.lora import load_peft
from tascade.errors import ConfigError, DataError
from tascade.load import ModelRef, load_model

_HELD_OUT_ROWS = 600
_DATA = "distill_data.safetensors"


def load_to_tune(model: ModelRef, recipe: Recipe) -> tuple[Any, Any, str]:
    """Load a model that is to be tuned; what cannot be done is said at once.

    Raises:
        ConfigError: several processes were started, PEFT is not installed, or the tokenizer cannot
            be given tokens.
    """
    if os.environ.get("WORLD_SIZE", "1") not in ("", "1"):  # as torchrun and accelerate set it
        raise ConfigError(
            "several processes were started to tune one model",
            got=f"WORLD_SIZE={os.environ['WORLD_SIZE']}",
            wanted="one process",
            fix="run `tascade tune` without torchrun or accelerate launch",
        )
    load_peft()
    loaded = load_model(model, dtype=_dtype(recipe), device=recipe.device)
    TokenizerFamily(loaded[1])
    return loaded


def tune_loaded(
    loaded: tuple[Any, Any, str],
    prepared: Prepared,
    target: Path,
    recipe: Recipe,
    answering: Answering,
    tell: Progress,
    *,
    resume: bool = False,
    score: Score | None = None,
) -> Tuned:
    """Teach a loaded model new tokens, and export it to ``target`` if it passes the gate.

    For the rest see :func:`tascade.pipeline.tune`. The model and the examples are left as they are;
    what there is to resume from stays, beside ``target``, in :func:`work_folder`.

    Raises:
        DataError: too few examples with prompts, or nothing in them is worth a token.
        ConfigError: the stopped run was another, or too few answers in the time allowed.
    """
    prepared = _with_prompts(prepared)
    work = work_folder(target)
    begin_run(work, _made_from(loaded, prepared, recipe), resume=resume)
    _make_data(loaded, prepared, recipe, work / _DATA, answering, tell)
    distilled = DistillData.load(work / _DATA)
    run = TuningRun(loaded, end_tokens(*loaded[:2]), distilled, recipe, work, tell)
    references = [
        loaded[1].decode(prepared.validation[at][1], skip_special_tokens=True)
        for at in distilled.places[1::2]
    ]
    return run.finish(target, references, score or _equal)


def work_folder(target: Path) -> Path:
    """Where a run keeps what it can go on from."""
    return target.with_name(f".{target.name}.tuning")


def _dtype(recipe: Recipe) -> str:
    """Training in half precision pays on a GPU alone."""
    import torch

    on_cpu = recipe.device == "cpu" or (recipe.device == "auto" and not torch.cuda.is_available())
    return "float32" if recipe.dtype == "auto" and on_cpu else recipe.dtype


def _with_prompts(given: Prepared) -> Prepared:
    """The examples that there are prompts of, and of those held out as many as are used."""
    asked = [row for row in given.validation if row[0] is not None]
    prepared = replace(
        given,
        train=[row for row in given.train if row[0] is not None],
        validation=spread(asked, _HELD_OUT_ROWS),
    )
    if not prepared.train or len(prepared.validation) < 4:
        raise DataError(
            "too few examples with prompts",
            got=f"{len(prepared.train)} to train on, {len(prepared.validation)} held out",
            wanted="one or more, and at least 4 held out",
            where=", ".join(report.source for report in given.reports),
            fix="add examples, or pass held-out ones with --held-out",
        )
    return prepared


def _made_from(loaded: tuple[Any, Any, str], prepared: Prepared, recipe: Recipe) -> dict[str, Any]:
    """What a run may only be gone on with if it is the same; what comes after training is not."""
    settings = asdict(recipe.tune)
    for name in ("gate", "control"):
        settings.pop(name)
    return {
        "model": model_digest(loaded[0]),
        "tokenizer": fingerprint(loaded[1]),
        "training rows": rows_digest(prepared.train),
        "held-out rows": rows_digest(prepared.validation),
        "max_new_tokens": recipe.max_new_tokens,
        **{f"tune.{name}": value for name, value in settings.items()},
    }


def _make_data(
    loaded: tuple[Any, Any, str],
    prepared: Prepared,
    recipe: Recipe,
    file: Path,
    answering: Answering,
    tell: Progress,
) -> None:
    """Write the model's own answers, unless the stopped run did."""
    if file.is_file():
        return
    made = make_distill_data(
        loaded,
        prepared,
        recipe,
        tell,
        answering,
        held_out=_HELD_OUT_ROWS,
        prompts=recipe.tune.prompts,
        replay=recipe.tune.replay,
    )
    tell("looking for boundaries", 0, None)
    made.mark_boundaries(loaded[0], recipe.tune)
    made.save(file)


def _equal(text: str, reference: str) -> float:
    """Equal once runs of whitespace are one space."""
    return float(text.split() == reference.split())

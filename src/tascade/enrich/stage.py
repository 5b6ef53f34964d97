"""`tascade tune`: a model that answers in the task's own tokens, checked, and exported plain."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tascade.config import Recipe
from tascade.core import Progress
from tascade.data.choose import spread
from tascade.data.encode import end_tokens, fingerprint
from tascade.data.load import reread
from tascade.enrich.distill_data import DistillData, make_distill_data
from tascade.enrich.gate import Score
from tascade.enrich.run import Tuned, TuningRun
from tascade.enrich.tokens.family import TokenizerFamily
from tascade.enrich.train.checkpoint import begin_run, model_digest, rows_digest
from tascade.enrich.train.lora import load_peft
from tascade.errors import ConfigError, DataError, GateError
from tascade.load import ModelRef, load_model
from tascade.model import TaskModel
from tascade.pack import Pack
from tascade.pipeline import Prepared, adapt, prepare, silent
from tascade.util.files import install_folder
from tascade.util.places import place_for

_HELD_OUT_ROWS = 600
_DATA = "distill_data.safetensors"


def tune(
    model: ModelRef,
    data: Any,
    *,
    out: str | Path,
    held_out: Any = None,
    recipe: Recipe | None = None,
    score: Score | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> Tuned:
    """Teach a model new tokens for a task, and export it if it passes the gate (TASC-ft).

    The export is a plain Hugging Face checkpoint with a stock tokenizer. What it says is judged
    anew: unlike drafts, training changes answers, and the gate says by how much.

    Args:
        model: a hub id, a folder, or a loaded ``(model, tokenizer)``, which is left as it is.
        data: training examples with prompts (see :func:`tascade.adapt`).
        out: a new folder for the tuned model.
        held_out: held-out examples, half to steer by and half for the gate; a share of ``data``
            when absent.
        recipe: its ``tune`` section, ``dtype``, ``device`` and ``max_new_tokens``.
        score: of an answer against its reference, from 0 to 1; equal or not by default.
        resume: go on with the run that was stopped; its state lies beside ``out``.
        progress: called with (stage, done, total).

    Raises:
        DataError: a row cannot be used, or there are too few.
        ConfigError: a tokenizer that cannot be given tokens, ``out`` exists, PEFT is not
            installed, several processes were started, or the stopped run was another.
    """
    recipe, target = recipe or Recipe(), place_for(out)
    tuned = _tune(model, data, target, held_out, recipe, score or _equal, resume, progress)
    if tuned.path is not None:
        shutil.rmtree(_work(target), ignore_errors=True)
    return tuned


def _tune(
    model: ModelRef,
    data: Any,
    target: Path,
    held_out: Any,
    recipe: Recipe,
    score: Score,
    resume: bool,
    progress: Progress | None,
) -> Tuned:
    """:func:`tune`, but what there is to resume from stays."""
    if os.environ.get("WORLD_SIZE", "1") not in ("", "1"):  # as torchrun and accelerate set it
        raise ConfigError(
            "several processes were started to tune one model",
            got=f"WORLD_SIZE={os.environ['WORLD_SIZE']}",
            wanted="one process",
            fix="run `tascade tune` without torchrun or accelerate launch",
        )
    load_peft()  # what cannot be done is said at once
    tell = progress or silent
    loaded = load_model(model, dtype=_dtype(recipe), device=recipe.device)
    TokenizerFamily(loaded[1])
    ends = end_tokens(*loaded[:2])
    prepared = _prepare(loaded[1], ends, data, held_out, recipe, tell)
    work = _work(target)
    begin_run(work, _made_from(loaded, prepared, recipe), resume=resume)
    _make_data(loaded, prepared, recipe, work / _DATA, tell)
    distilled = DistillData.load(work / _DATA)
    run = TuningRun(loaded, ends, distilled, recipe, work, tell)
    references = [
        loaded[1].decode(prepared.validation[at][1], skip_special_tokens=True)
        for at in distilled.places[1::2]
    ]
    return run.finish(target, references, score)


def _work(target: Path) -> Path:
    """Where a run keeps what it can go on from."""
    return target.with_name(f".{target.name}.tuning")


def adapt_tuned(
    model: ModelRef,
    data: Any,
    *,
    out: str | Path,
    validation: Any = None,
    recipe: Recipe | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> tuple[TaskModel, Tuned]:
    """Tune a model, then learn the tuned one's answers: a pack with both (TASC-ft and TASC-spec).

    Args:
        model: see :func:`tune`.
        data: training examples with prompts.
        out: folder of the pack.
        validation: held-out examples; a share of ``data`` when absent.
        recipe: see :func:`tune`, and :func:`tascade.adapt`.
        resume: go on with the run that was stopped, or whose model could not be packed.
        overwrite: replace a pack that exists, in one step, and nothing else that does.
        progress: called with (stage, done, total).

    Raises:
        GateError: the gate refused the tuned model. What was trained lies beside ``out``.
        ConfigError: a head for drafts alone, which a tuned model cannot have.
        DataError, ConfigError: see :func:`tune` and :func:`tascade.adapt`.
    """
    used, recipe = (model, data, validation), recipe or Recipe()
    target = place_for(out, overwrite=overwrite, used=used)
    data = reread(data, "train")  # by tuning, and by adapting what was tuned
    validation = None if validation is None else reread(validation, "validation")
    if recipe.vocab.head == "draft-only":
        raise ConfigError(
            "a tuned model cannot have a head for drafts alone",
            got="tune, and a head 'draft-only', which is an assistant's",
            wanted="a head of the tuned model's own: full, exact or masked",
            where="vocab.head",
            fix="no assistant knows the new tokens: tune, or tailor for drafts, not both",
        )
    staged = target.with_name(f".{target.name}.staged")
    shutil.rmtree(staged / "model", ignore_errors=True)
    # The run's folder stays until the pack is made: if that fails, nothing is trained again.
    model_folder = staged / "model"
    tuned = _tune(model, data, model_folder, validation, recipe, _equal, resume, progress)
    if tuned.path is None:
        raise GateError(
            "the gate refused the tuned model",
            got="; ".join(tuned.verdict.failures),
            wanted="a model no worse than its base",
            where=str(data),
            fix="train longer or on more, add fewer tokens, or loosen tune.gate in the recipe",
        )
    made = _pack(tuned, data, staged, validation, recipe, progress)
    place_for(target, overwrite=overwrite, used=used)
    install_folder(made.path, target)
    shutil.rmtree(staged, ignore_errors=True)
    opened = TaskModel.from_pretrained(target, dtype=recipe.dtype, device=recipe.device)
    return opened, replace(tuned, path=target / "model")


def _pack(
    tuned: Tuned,
    data: Any,
    staged: Path,
    validation: Any,
    recipe: Recipe,
    progress: Progress | None,
) -> Pack:
    """A pack of a tuned model and drafts from its own answers."""
    assert tuned.path is not None
    own = replace(recipe, spec=replace(recipe.spec, own_answers=True))
    shutil.rmtree(staged / "pack", ignore_errors=True)
    made = adapt(
        tuned.path, data, validation=validation, out=staged / "pack", recipe=own, progress=progress
    )
    made.corpus.close()
    name = tuned.enrichment.model
    base = str(Path(name).resolve()) if Path(name).is_dir() else name
    made.pack.save_info(
        replace(made.pack.info, model=base, stages=["tasc-ft", *made.pack.info.stages])
    )
    tuned.path.rename(made.pack.tuned)
    return made.pack


def _dtype(recipe: Recipe) -> str:
    """Training in half precision pays on a GPU alone."""
    import torch

    on_cpu = recipe.device == "cpu" or (recipe.device == "auto" and not torch.cuda.is_available())
    return "float32" if recipe.dtype == "auto" and on_cpu else recipe.dtype


def _prepare(
    tokenizer: Any, ends: Sequence[int], data: Any, held_out: Any, recipe: Recipe, tell: Progress
) -> Prepared:
    prepared = prepare(tokenizer, ends, data, held_out, recipe, tell)
    prepared.train = [row for row in prepared.train if row[0] is not None]
    asked = [row for row in prepared.validation if row[0] is not None]
    prepared.validation = spread(asked, _HELD_OUT_ROWS)
    if not prepared.train or len(prepared.validation) < 4:
        raise DataError(
            "too few examples with prompts",
            got=f"{len(prepared.train)} to train on, {len(prepared.validation)} held out",
            wanted="one or more, and at least 4 held out",
            where=str(data),
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
    loaded: tuple[Any, Any, str], prepared: Prepared, recipe: Recipe, file: Path, tell: Progress
) -> None:
    """Write the model's own answers, unless the stopped run did."""
    if file.is_file():
        return
    made = make_distill_data(
        loaded,
        prepared,
        recipe,
        tell,
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

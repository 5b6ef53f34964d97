"""The main path: task data in, a pack out; each step of it, or some, over what there is already.

1. load the model, and the examples as token ids
2. if asked: tune the model, which then says the task's own tokens
3. index the training outputs, and the prompts they answered
4. if asked, or tuned: answer the training prompts, and index those answers instead
5. if asked: train a drafter on the answers that are indexed, where that pays
6. if asked: list the tokens that the task needs, and use a head of those
7. calibrate: decode validation prompts, learning how far each source can be trusted
8. check: a few answers must equal plain decoding
9. save, under the final name only when all is done
"""

from __future__ import annotations

import os
import shutil
import weakref
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Unpack

from tascade.answers.own import count_prompts, enough_own, own_held_out
from tascade.builder import (
    PackBuilder,
    Stage,
    answerer,
    answering,
    calibrate,
    check,
    compare_precisions,
    foretell,
    half_precision,
    open_with_rows,
)
from tascade.config import Recipe, VocabConfig
from tascade.core import Progress
from tascade.data.encode import end_tokens
from tascade.data.prepare import Prepared, describe_sources, prepare
from tascade.decode.supported import table_rows
from tascade.enrich.gate import Score
from tascade.enrich.run import Tuned
from tascade.enrich.stage import load_to_tune, tune_loaded, work_folder
from tascade.enrich.tokens.merger import TokenMerger
from tascade.enrich.tokens.stored import read_tokens
from tascade.errors import ConfigError, GateError
from tascade.load import ModelRef, check_ref, load_model, torch_threads
from tascade.model import TaskModel
from tascade.options import AdaptOptions, ReadOptions, RecipeLike, RowOptions, laid_over
from tascade.own_answers import answers_folder, check_logs, index_own
from tascade.tailor.profile import list_tokens
from tascade.tailor.savings import Tailoring, head_savings
from tascade.tailor.tailored import keep_vocabulary, with_vocabulary
from tascade.train_drafter import drafter_folder, network_stage
from tascade.util.files import folder_beside, remove_folder, temporary_folder
from tascade.util.places import named_place, place_for
from tascade.util.progress import shown, shows_progress, teller


def adapt(
    model: ModelRef,
    data: Any,
    *,
    validation: Any = None,
    logs: Any = None,
    out: str | Path | None = None,
    recipe: RecipeLike | None = None,
    tune: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    threads: int = 0,
    progress: Progress | bool | None = None,
    **options: Unpack[AdaptOptions],
) -> TaskModel:
    """Learn a task from examples, training-free, and return a model that is fast at it.

    Args:
        model: a hub id, a folder, or a loaded ``(model, tokenizer)``.
        data: training examples: a file, a folder, a hub id, or an iterable of rows.
        validation: examples to calibrate on; a share of ``data`` is held out when absent.
        logs: requests that the model served, with its answers, in the same kinds of places (see
            :mod:`tascade.data.served`): they count as own answers, and are asked no more.
        out: folder of the pack; when absent a temporary one, which goes with the last object that
            uses it (see ``save_pretrained``).
        recipe: everything else: a :class:`Recipe`, a dict, or the path of a YAML file.
        tune: teach the model the task's tokens first, which needs ``out`` (:func:`adapt_tuned`).
        resume: go on with the answers, or the tuning, of a run that was stopped (they lie beside
            ``out``).
        overwrite: replace a pack that exists, in one step, and nothing else that does.
        threads: CPU threads that torch may use meanwhile; 0 leaves its choice.
        progress: called with (stage, done, total); bars by default (see
            :func:`tascade.util.progress.shown`).
        options: what wins over the recipe: ``own_answers``, ``drafter``, ``tailor``,
            ``dtype``, ``max_new_tokens``, ``system``, ``chat_template_kwargs``, ``on_error``,
            ``prompt_field``, ``completion_field``, ``prompt_template`` (see
            :class:`tascade.options.AdaptOptions`).

    Raises:
        DataError: a row cannot be used, or there are none.
        ConfigError: the model cannot be loaded, an option is none or out of range, ``out``
            exists and must not be replaced, or the stopped run was another.
        UnsupportedModelError: the model's state cannot be rewound.
        GateError: see :func:`adapt_tuned`.
    """
    check_ref(model)
    used, chosen, target = (model, data, validation, logs), laid_over(recipe, options), None
    check_logs(logs, tune)
    with torch_threads(threads):
        if tune:
            given = {"validation": validation, "recipe": chosen, "overwrite": overwrite}
            given |= {"resume": resume, "progress": progress}
            return adapt_tuned(model, data, out=named_place(out), **given)[0]
        if out is not None:
            target = place_for(out, overwrite=overwrite, used=used)
        with shown(progress) as tell:
            return _make(*used, target, chosen, overwrite, tell, resume=resume).task_model


def adapt_tuned(
    model: ModelRef,
    data: Any,
    *,
    out: str | Path,
    validation: Any = None,
    recipe: RecipeLike | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | bool | None = None,
    **options: Unpack[AdaptOptions],
) -> tuple[TaskModel, Tuned]:
    """Tune a model, then learn the tuned one's answers: a pack with both (TASC-ft and TASC-spec).

    It is given what :func:`adapt` is, examples with prompts; ``resume``: go on with the run that
    was stopped, or whose model could not be packed.

    Raises:
        GateError: the gate refused the tuned model. What was trained lies beside ``out``.
        ConfigError: a head for drafts alone, which a tuned model cannot have.
        DataError, ConfigError: see :func:`tune` and :func:`tascade.adapt`.
    """
    used, recipe = (model, data, validation, None), laid_over(recipe, options)
    target = place_for(out, overwrite=overwrite, used=used)
    if recipe.vocab.head == "draft-only":
        raise ConfigError(
            "a tuned model cannot have a head for drafts alone",
            got="tune, and a head 'draft-only', which is an assistant's",
            wanted="a head of the tuned model's own: full, exact or masked",
            where="vocab.head",
            fix="no assistant knows the new tokens: tune, or tailor for drafts, not both",
        )
    # The run's folder stays until the pack is made: if that fails, nothing is trained again.
    staged = target.with_name(f".{target.name}.staged")
    shutil.rmtree(staged / "model", ignore_errors=True)
    tuning = partial(tune_first, to=staged / "model", resume=resume)
    with shown(progress) as tell:
        made = _make(*used, target, recipe, overwrite, tell, tuning, resume=resume)
    assert made.tuned is not None
    shutil.rmtree(staged, ignore_errors=True)
    return made.task_model, replace(made.tuned, path=target / "model")


def _make(
    model: ModelRef,
    data: Any,
    validation: Any,
    logs: Any,
    target: Path | None,
    recipe: Recipe,
    overwrite: bool,
    tell: Progress,
    tuning: Stage | None = None,
    *,
    resume: bool,
) -> PackBuilder:
    """Load, prepare, have each stage do its part, and save."""
    wanted = recipe
    if tuning is not None:
        wanted = replace(recipe, spec=replace(recipe.spec, own_answers=True))
    with temporary_folder() if target is None else folder_beside(target) as folder:
        tell("loading the model", 0, None)
        if tuning is not None:
            made = PackBuilder(folder, load_to_tune(model, recipe), wanted)
        else:
            loaded = load_model(model, dtype=recipe.dtype, device=recipe.device)
            made = PackBuilder(
                folder, loaded, wanted, "" if isinstance(model, tuple) else loaded[2]
            )
        tokenizer, name = made.loaded[1:]
        merger = read_tokens(name) if tuning is None else None
        ends = end_tokens(*made.loaded[:2])
        rows = table_rows(made.loaded[0])
        prepared = prepare(tokenizer, ends, data, validation, recipe, tell, merger, rows, logs)
        made.pack.note(data=describe_sources(data, validation, prepared.reports, logs))
        made.pack.note(own_answers=len(prepared.own))
        work = None if target is None else answers_folder(target)
        kept = None if target is None else drafter_folder(target)
        own = partial(index_own, work=work, resume=resume)
        learned = partial(network_stage, work=kept, resume=resume)
        for stage in _stages(wanted, tuning, own, learned):
            stage(made, prepared, wanted, tell)
        if target is None:
            made.save()
            weakref.finalize(made.pack, remove_folder, folder, os.getpid())
        else:
            # What is there now may not be what was there when all this began.
            place_for(target, overwrite=overwrite, used=(name, data, validation, logs))
            made.install(target)
            for left in (answers_folder(target), drafter_folder(target)):
                shutil.rmtree(left, ignore_errors=True)
    return made


def _stages(recipe: Recipe, tuning: Stage | None, own: Stage, network: Stage) -> Iterator[Stage]:
    """What is done for a pack, in this order."""
    if tuning is not None:
        yield tuning
    yield index_references
    yield compare_precisions
    yield foretell
    if recipe.spec.own_answers:
        yield own
    if recipe.spec.drafter:
        yield network
    if recipe.vocab.head != "full":
        yield tailor_head
    yield prove


def tune_first(
    task: PackBuilder,
    prepared: Prepared,
    recipe: Recipe,
    progress: Progress,
    *,
    to: Path,
    resume: bool,
) -> None:
    """Teach the model the task's tokens, in a folder of its own, and go on with what it became.

    Raises:
        GateError: the gate refused it.
    """
    given = task.loaded, prepared, to, recipe, answering, progress
    task.tuned = tuned = tune_loaded(*given, resume=resume)
    if tuned.path is None:
        raise GateError(
            "the gate refused the tuned model",
            got="; ".join(tuned.verdict.failures),
            wanted="a model no worse than its base",
            where=str(task.pack.info.data[0]["path"]),
            fix="train longer or on more, add fewer tokens, or loosen tune.gate in the recipe",
        )
    loaded = load_model(tuned.path, dtype=recipe.dtype, device=recipe.device)
    task.use(loaded, str(tuned.path))
    task.pack.note(stages=["tasc-ft"])
    prepared.merge_answers(TokenMerger(tuned.enrichment.expansions, tuned.enrichment.first))


def index_references(
    task: PackBuilder, prepared: Prepared, recipe: Recipe, progress: Progress
) -> None:
    """Index the training outputs, and the prompts they answered (TASC-spec)."""
    task.pack.note(stages=[*task.pack.info.stages, "tasc-spec"])
    task.index(prepared.train, recipe, progress)


def tailor_head(task: PackBuilder, prepared: Prepared, recipe: Recipe, progress: Progress) -> None:
    """List the tokens of the task's answers in the pack, and go on with a head of those.

    The model's own answers alone are counted, where there are any, and the list measured on such.

    Raises:
        ConfigError: too few of the model's own answers in the time allowed.
    """
    pack, rows, held_out = task.pack, prepared.train, prepared.validation
    own, seconds = recipe.spec.own_answers, recipe.spec.own_seconds
    if own:
        enough_own(len(prepared.own), rows, "training prompts", seconds)
        rows = [rows[at] for at in prepared.own]
        held_out, _ = own_held_out(answerer(task.task_model, recipe, progress), held_out, seconds)
    progress("counting tokens", 0, len(rows))
    config, mark = recipe.vocab, pack.info.fingerprint
    profile = list_tokens(task.loaded[:2], rows, held_out, config, own=own, fingerprint=mark)
    pack.info = with_vocabulary(pack.info, config)
    profile.save(pack.vocabulary, task.loaded[1])
    task.task_model.reload(head="")


def prove(task: PackBuilder, prepared: Prepared, recipe: Recipe, progress: Progress) -> None:
    """Calibrate, compare with plain decoding, and note in the pack on how many rows."""
    rows = prepared.validation
    counts = {
        "held_out": len(rows),
        "held_out_of": prepared.held_out_of,
        **calibrate(task.task_model, rows, recipe, progress),
        **check(task.task_model, prepared.asked, recipe, progress),
        **half_precision(task.task_model),
    }
    task.pack.note(rows={**task.pack.info.rows, **counts})


def tune(
    model: ModelRef,
    data: Any,
    *,
    out: str | Path,
    held_out: Any = None,
    recipe: RecipeLike | None = None,
    score: Score | None = None,
    resume: bool = False,
    progress: Progress | bool | None = None,
    **options: Unpack[ReadOptions],
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
        recipe: its ``tune`` section, ``dtype``, ``device`` and ``max_new_tokens``; as a
            :class:`Recipe`, a dict or a path.
        score: of an answer against its reference, from 0 to 1; equal or not by default.
        resume: go on with the run that was stopped; its state lies beside ``out``.
        progress: called with (stage, done, total); bars by default (see
            :func:`tascade.util.progress.shown`).
        options: what wins over the recipe (see :class:`tascade.options.ReadOptions`).

    Raises:
        DataError: a row cannot be used, or there are too few.
        ConfigError: a tokenizer that cannot be given tokens, ``out`` exists, PEFT is not
            installed, several processes were started, or the stopped run was another.
    """
    recipe, target = laid_over(recipe, options), place_for(out)
    with shown(progress) as tell:
        tell("loading the model", 0, None)
        loaded = load_to_tune(model, recipe)
        ends, rows = end_tokens(*loaded[:2]), table_rows(loaded[0])
        prepared = prepare(loaded[1], ends, data, held_out, recipe, tell, size=rows)
        given = loaded, prepared, target, recipe, answering, tell
        tuned = tune_loaded(*given, resume=resume, score=score)
    if tuned.path is not None:
        shutil.rmtree(work_folder(target), ignore_errors=True)
    return tuned


@shows_progress
def tailor(
    pack: str | Path,
    data: Any,
    *,
    held_out: Any = None,
    config: VocabConfig | None = None,
    own: bool = False,
    progress: Progress | bool | None = None,
    **options: Unpack[RowOptions],
) -> Tailoring:
    """List the tokens that a task's answers need, and have its pack use a head of those.

    Args:
        pack: an adapted task.
        data: the training examples.
        held_out: examples to measure coverage on; a share of ``data`` if absent.
        config: tolerance, scripts and head; ``exact`` by default.
        own: count the model's own answers, not the references.
        progress: called with (stage, done, total); bars by default (see
            :func:`tascade.util.progress.shown`).
        options: how rows are read (see :class:`tascade.options.RowOptions`); the pack's own fields
            by default.

    Raises:
        PackError: no pack there.
        DataError: a row cannot be used, or there are none.
        ConfigError: a setting is out of range, or there was no time for enough own answers.
    """
    config, tell = config or VocabConfig(head="exact"), teller(progress)
    task_model, recipe, prepared = open_with_rows(pack, data, held_out, options, tell)
    loaded, made = (task_model.model, task_model.tokenizer), task_model.pack
    rows, checked, left_out = prepared.train, prepared.validation, None
    if own:
        answer, seconds = answerer(task_model, recipe, tell), recipe.spec.own_seconds
        rows, _ = answer(rows)
        enough_own(len(rows), prepared.train, "training prompts", seconds)
        checked, late = own_held_out(answer, checked, seconds)
        left_out = {"train": count_prompts(prepared.train) - len(rows), "held_out": late}
    mark = made.info.fingerprint
    profile = list_tokens(loaded, rows, checked, config, own=own, fingerprint=mark)
    keep_vocabulary(made, loaded[1], profile, config)
    tell("measuring the model's steps", 0, None)
    gain = head_savings(loaded[0], profile, checked, float(task_model.cost.upto(1)[-1]))
    return Tailoring(str(made.path), config.head, gain, config.tables, left_out)

"""`tascade tune`: a model that answers in the task's own tokens, checked, and exported plain."""

from __future__ import annotations

import copy
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tascade.config import Recipe
from tascade.core import IntArray
from tascade.decode.loop import Decoder
from tascade.decode.sample import SamplingParams
from tascade.decode.target import Target
from tascade.draft.none import NoDrafter
from tascade.encode import end_tokens
from tascade.enrichment import Enrichment, choose_tokens, write_tokens
from tascade.errors import ConfigError, DataError, GateError, TascadeError
from tascade.lessons import Lessons, own_lessons
from tascade.load import ModelRef, load_model
from tascade.model import TaskModel
from tascade.own import Row
from tascade.pack import provenance
from tascade.pipeline import Prepared, Progress, adapt, prepare, silent, spread
from tascade.tokens.check import check_extension
from tascade.tokens.family import TokenizerFamily
from tascade.tokens.mine import MiningRules
from tascade.tokens.segment import Merger
from tascade.train.adapter import load_peft
from tascade.train.certainty import decisive_pieces
from tascade.train.drift import divergence, free_text, next_tokens
from tascade.train.export import reopen, write_about, write_model
from tascade.train.judge import Said, Verdict, judge
from tascade.train.teach import Taught, teach

_HELD_OUT_ROWS = 600
_COMPARED = 3
Score = Callable[[str, str], float]
"""Of an answer against its reference, from 0 to 1."""


@dataclass(frozen=True, slots=True)
class Tuned:
    """What tuning made: where it lies (``None`` if the gate refused it), and how it did.

    ``control``: the model with LoRA alone, if one was asked for; it is not exported.
    """

    path: Path | None
    enrichment: Enrichment
    taught: Taught
    verdict: Verdict
    control: Taught | None = None

    def to_json(self) -> dict[str, Any]:
        """One JSON-ready object."""
        return {
            "path": None if self.path is None else self.path.name,
            "tokens": len(self.enrichment.expansions),
            "predicted_fewer_steps": self.enrichment.fewer_steps,
            "start": self.taught.start,
            "probe": self.taught.probe,
            "steps": len(self.taught.losses),
            "gate": self.verdict.to_json(),
        }


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
            installed, or the stopped run was another.
    """
    recipe, tell, target = recipe or Recipe(), progress or silent, Path(out)
    if target.exists():
        raise ConfigError("the folder exists already", got=str(out), wanted="a new folder")
    load_peft()  # what cannot be done is said at once
    loaded = load_model(model, dtype=_dtype(recipe), device=recipe.device)
    TokenizerFamily(loaded[1])
    ends = end_tokens(*loaded[:2])
    prepared = _prepare(loaded[1], ends, data, held_out, recipe, tell)
    work = target.with_name(f".{target.name}.tuning")
    if not resume:
        shutil.rmtree(work, ignore_errors=True)
    lessons = _lessons(loaded, prepared, recipe, work, tell)
    run = _Run(loaded, ends, lessons, recipe, work, tell)
    references = [
        loaded[1].decode(answer, skip_special_tokens=True)
        for _, answer in prepared.validation[1::2]
    ]
    tuned = run.finish(target, references, score or _equal)
    if tuned.path is not None:
        shutil.rmtree(work, ignore_errors=True)
    return tuned


def adapt_tuned(
    model: ModelRef,
    data: Any,
    *,
    out: str | Path,
    validation: Any = None,
    recipe: Recipe | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> tuple[TaskModel, Tuned]:
    """Tune a model, then learn the tuned one's answers: a pack with both (TASC-ft and TASC-spec).

    Args:
        model: see :func:`tune`.
        data: training examples with prompts.
        out: a new folder for the pack.
        validation: held-out examples; a share of ``data`` when absent.
        recipe: see :func:`tune`, and :func:`tascade.adapt`.
        resume: go on with the run that was stopped.
        progress: called with (stage, done, total).

    Raises:
        GateError: the gate refused the tuned model. What was trained lies beside ``out``.
        DataError, ConfigError: see :func:`tune` and :func:`tascade.adapt`.
    """
    target, recipe = Path(out), recipe or Recipe()
    if target.exists():
        raise ConfigError("the folder exists already", got=str(out), wanted="a new folder")
    staged = target.with_name(f".{target.name}.staged")
    shutil.rmtree(staged / "model", ignore_errors=True)
    tuned = tune(
        model,
        data,
        out=staged / "model",
        held_out=validation,
        recipe=recipe,
        resume=resume,
        progress=progress,
    )
    if tuned.path is None:
        raise GateError(
            "the gate refused the tuned model",
            got="; ".join(tuned.verdict.failures),
            wanted="a model no worse than its base",
            where=str(data),
            fix="train longer or on more, add fewer tokens, or loosen tune.gate in the recipe",
        )
    own = replace(recipe, spec=replace(recipe.spec, own_answers=True))
    shutil.rmtree(staged / "pack", ignore_errors=True)
    made = adapt(
        tuned.path, data, validation=validation, out=staged / "pack", recipe=own, progress=progress
    )
    made.corpus.close()
    name = tuned.enrichment.model
    base = str(Path(name).resolve()) if Path(name).is_dir() else name
    made.pack.save_info(replace(made.pack.info, model=base, stages=["tasc-ft", "tasc-spec"]))
    tuned.path.rename(made.pack.tuned)
    made.pack.path.rename(target)
    shutil.rmtree(staged, ignore_errors=True)
    return TaskModel.from_pretrained(target), replace(tuned, path=target / "model")


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
    prepared.validation = [
        row for row in spread(prepared.validation, _HELD_OUT_ROWS) if row[0] is not None
    ]
    if not prepared.train or len(prepared.validation) < 4:
        raise DataError(
            "too few examples with prompts",
            got=f"{len(prepared.train)} to train on, {len(prepared.validation)} held out",
            wanted="one or more, and at least 4 held out",
            where=str(data),
            fix="add examples, or pass held-out ones with --held-out",
        )
    return prepared


def _lessons(
    loaded: tuple[Any, Any, str], prepared: Prepared, recipe: Recipe, work: Path, tell: Progress
) -> Lessons:
    """The model's own answers, from the stopped run if there was one."""
    file = work / "lessons.safetensors"
    if file.is_file():
        return Lessons.load(file)
    prompts = recipe.tune.prompts
    lessons = own_lessons(loaded, prepared, recipe, tell, held_out=_HELD_OUT_ROWS, prompts=prompts)
    if recipe.tune.targets == "gold":
        lessons.train, lessons.written = prepared.train, []
    lessons.save(file)
    return lessons


class _Run:
    """One tuning, from its lessons on."""

    def __init__(
        self,
        loaded: tuple[Any, Any, str],
        ends: tuple[int, ...],
        lessons: Lessons,
        recipe: Recipe,
        work: Path,
        tell: Progress,
    ) -> None:
        self.loaded, self.ends, self.lessons, self.work = loaded, ends, lessons, work
        self.recipe, self.tell = recipe, tell
        self.rows: list[Row] = [*lessons.train, *lessons.written]
        self.steer, self.asked = lessons.held_out[::2], lessons.held_out[1::2]

    def finish(self, target: Path, references: Sequence[str], score: Score) -> Tuned:
        """Train, judge, export."""
        model, made = self.loaded[0], self._choose()
        merger = Merger(made.expansions, made.first)
        text = free_text(model, made.first)
        before = next_tokens(model, text, made.first)
        nothing = Merger((), merger.first)
        control = self._teach(nothing, "control") if self.recipe.tune.control else None
        beside = [] if control is None else self._answers(control.model, nothing)
        taught = self._teach(merger, "tuned")
        target.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent))
        try:
            opened = self._export(made, taught, merger, part)
            verdict = judge(
                self._answers(opened, merger),
                [self._said(answer, merger) for _, answer in self.asked],
                references,
                merger,
                self.recipe.tune.gate,
                score,
                drift=divergence(before, next_tokens(opened, text, made.first)),
                control=beside,
            )
            exported = verdict.passed or not self.recipe.tune.gate.refuse
            tuned = Tuned(target if exported else None, made, taught, verdict, control)
            if exported:
                about = {"recipe": asdict(self.recipe.tune), **provenance(), **tuned.to_json()}
                write_about(part, about)
                part.rename(target)
        finally:
            shutil.rmtree(part, ignore_errors=True)
        return tuned

    def _choose(self) -> Enrichment:
        config, rows = self.recipe.tune, self.rows
        rules = MiningRules(tokens=config.tokens) if config.tokens else MiningRules()
        self.tell("choosing tokens", 0, None)
        if config.sure:
            pieces = decisive_pieces(self.loaded[0], rows, config.sure, config.longest)
            rows = [(None, piece) for piece in pieces]
        own = config.targets == "own"
        parts = rows, self.steer
        made = choose_tokens(parts, self.loaded, rules, wanted=config.tokens, own=own)
        if not made.expansions:
            raise DataError(
                "nothing in these answers is worth a token",
                got=f"{len(self.rows)} answers; {made.stopped}",
                wanted="runs of tokens that come often",
                fix="more examples, a lower tune.sure, or leave the vocabulary as it is",
            )
        return made

    def _teach(self, merger: Merger, name: str) -> Taught:
        model = copy.deepcopy(self.loaded[0])
        config = self.recipe.tune
        return teach(model, merger, self.rows, self.steer, config, self.work / name, self.tell)

    def _export(self, made: Enrichment, taught: Taught, merger: Merger, part: Path) -> Any:
        """Write the model, open it again as anyone would, and compare."""
        tokenizer = self.loaded[1]
        write_model(taught.model, tokenizer, made.expansions, made.first, part)
        write_tokens(made, part)
        prompts = [prompt for prompt, _ in self.asked if prompt is not None]
        compared = [prompt.tolist() for prompt in spread(prompts, _COMPARED)]
        opened, extended = reopen(part, taught.model, compared)
        texts = [tokenizer.decode(prompt) for prompt in prompts]
        answers = [self._said(answer, merger).text for _, answer in self.asked]
        report = check_extension(tokenizer, extended, merger, texts, answers)
        if not report.passed:
            raise TascadeError(
                "the exported tokenizer does not read and write as the base one",
                got=report.failures,
                where=str(part),
                fix="please report this",
            )
        return opened

    def _said(self, ids: IntArray, merger: Merger) -> Said:
        text = self.loaded[1].decode(merger.unmerge(ids), skip_special_tokens=True)
        return Said(ids, text)

    def _answers(self, model: Any, merger: Merger) -> list[Said]:
        decoder = Decoder(Target(model), NoDrafter(), None, self.loaded[1])
        most = self.recipe.max_new_tokens
        params = SamplingParams(max_new_tokens=most, end_tokens=self.ends)
        said = []
        for number, (prompt, _) in enumerate(self.asked):
            self.tell("answering held-out prompts", number, len(self.asked))
            assert prompt is not None
            ids = np.array(decoder.generate(prompt, params).tokens, np.int32)
            said.append(self._said(ids, merger))
        return said


def _equal(text: str, reference: str) -> float:
    """Equal once runs of whitespace are one space."""
    return float(text.split() == reference.split())

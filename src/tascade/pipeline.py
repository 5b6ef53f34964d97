"""The main path: task data in, a pack out.

1. load the model, and the examples as token ids
2. index the training outputs, and the prompts they answered
3. measure what a step costs on this machine
4. if asked: answer the training prompts, and index those answers in place of the references
5. if asked: list the tokens that the task needs, and use a head of those
6. calibrate: decode validation prompts, learning how far each source can be trusted
7. check: a few answers must equal plain decoding
8. save, under the final name only when all is done
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from tascade.answers import count_prompts, enough_own, own_answers
from tascade.calibration import calibrate, check
from tascade.config import DataConfig, Recipe
from tascade.core import Example, Progress, Row
from tascade.data.choose import spread, thin
from tascade.data.encode import encode_example, end_tokens, fingerprint
from tascade.data.load import LoadReport, load_examples, source_hash
from tascade.enrich.tokens.merger import TokenMerger
from tascade.enrich.tokens.stored import read_tokens
from tascade.errors import DataError
from tascade.index.corpus import CorpusIndex
from tascade.index.similar import SimilarIndex
from tascade.load import ModelRef, load_model
from tascade.model import TaskModel
from tascade.pack import Pack, PackInfo, provenance
from tascade.tailor.counts import count_documents
from tascade.tailor.profile import build_profile
from tascade.tailor.tailored import keep_vocabulary
from tascade.util.files import folder_beside, install_folder, remove_folder
from tascade.util.places import place_for

MAX_PROMPTS = 500_000
MOST_HELD_OUT = 2000
"""Held-out rows kept, spread over the file; each use takes its own number of these."""
_OWN_HELD_OUT = 400
_LISTED_ROWS = 100
_HELD_OUT_SHARE, _HELD_OUT_MOST = 20, 200


@dataclass(slots=True)
class Prepared:
    """Examples as token ids: (prompt or ``None``, answer) pairs.

    ``held_out_of``: how many held-out rows there were, of which ``validation`` was chosen;
    ``own``: where in ``train`` the answers are the model's own.
    """

    train: list[Row] = field(default_factory=list)
    validation: list[Row] = field(default_factory=list)
    reports: list[LoadReport] = field(default_factory=list)
    held_out_of: int = 0
    own: list[int] = field(default_factory=list)

    @property
    def asked(self) -> list[Row]:
        """Rows with prompts to compare with plain decoding on: held-out ones where there are."""
        return [row for row in self.validation if row[0] is not None] or self.train


def adapt(
    model: ModelRef,
    data: Any,
    *,
    validation: Any = None,
    out: str | Path | None = None,
    recipe: Recipe | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> TaskModel:
    """Learn a task from examples, training-free, and return a model that is fast at it.

    Args:
        model: a hub id, a folder, or a loaded ``(model, tokenizer)``.
        data: training examples: a file, a folder, a hub id, or an iterable of rows.
        validation: examples to calibrate on; a share of ``data`` is held out when absent.
        out: folder of the pack; when absent a temporary one, which goes with the last object that
            uses it (see ``save_pretrained``).
        recipe: everything else.
        overwrite: replace a pack that exists, in one step, and nothing else that does.
        progress: called with (stage, done, total).

    Raises:
        DataError: a row cannot be used, or there are none.
        ConfigError: the model cannot be loaded, or ``out`` exists and must not be replaced.
        UnsupportedModelError: the model's state cannot be rewound.
    """
    recipe = recipe or Recipe()
    tell = progress or silent
    if out is not None:
        place_for(out, overwrite=overwrite, used=(model, data, validation))
    loaded = load_model(model, dtype=recipe.dtype, device=recipe.device)
    tokenizer, name = loaded[1:]
    ends = end_tokens(*loaded[:2])
    prepared = prepare(tokenizer, ends, data, validation, recipe, tell, read_tokens(name))
    sources = _sources(data, validation, prepared.reports)
    if out is None:
        return _learn_for_now(loaded, prepared, sources, recipe, tell)
    target = place_for(out, overwrite=overwrite, used=(name, data, validation))
    with folder_beside(target) as part:
        _learn(part, loaded, prepared, sources, recipe, tell).corpus.close()
        # What is there now may not be what was there when all this began.
        place_for(target, overwrite=overwrite, used=(name, data, validation))
        install_folder(part, target)
    return TaskModel(loaded[0], tokenizer, Pack.open(target), name)


def _learn(
    folder: Path,
    loaded: tuple[Any, Any, str],
    prepared: Prepared,
    sources: list[dict[str, Any]],
    recipe: Recipe,
    tell: Progress,
) -> TaskModel:
    """Fill the folder of a pack."""
    pack = build(folder, loaded, prepared, recipe, tell)
    pack.save_info(dataclasses.replace(pack.info, data=sources))
    task_model = TaskModel(*loaded[:2], pack, loaded[2], head="full")
    if recipe.spec.own_answers:
        task_model = learn_own(task_model, prepared, recipe, tell)
    if recipe.vocab.head != "full":
        task_model = tailor(task_model, prepared, recipe, tell)
    prove(task_model, prepared, recipe, tell)
    return task_model


def _learn_for_now(loaded: tuple[Any, Any, str], *given: Any) -> TaskModel:
    """A pack in a temporary folder that goes with it, or at the end of the process."""
    folder = Path(tempfile.mkdtemp(prefix="tascade-"))
    try:
        task_model = _learn(folder, loaded, *given)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    weakref.finalize(task_model.pack, remove_folder, folder, os.getpid())
    return task_model


def prepare(
    tokenizer: Any,
    ends: Sequence[int],
    data: Any,
    validation: Any,
    recipe: Recipe,
    tell: Progress,
    merger: TokenMerger | None = None,
) -> Prepared:
    """Load and encode all examples; hold a share out for calibration if there is no other.

    ``merger``: the new tokens of a tuned model, which says its answers in them.
    """
    out = Prepared()
    rows = _examples(data, recipe.data, "train", out.reports, tell)
    out.train = [encode_example(tokenizer, row, ends, recipe.chat) for row in rows]
    if not out.train:
        raise DataError(
            "no examples",
            got="0 rows",
            wanted="at least one",
            where=str(data),
            fix="check the file",
        )
    if validation is not None:
        rows = _examples(validation, recipe.data, "validation", out.reports, tell)
        kept, out.held_out_of = thin(rows, MOST_HELD_OUT)
        out.validation = [encode_example(tokenizer, row, ends, recipe.chat) for row in kept]
    elif len(out.train) >= 2 * _HELD_OUT_SHARE:
        step = max(_HELD_OUT_SHARE, len(out.train) // _HELD_OUT_MOST)
        out.validation = out.train[::step]
        out.train = [row for i, row in enumerate(out.train) if i % step]
        out.held_out_of = len(out.validation)
    if merger is not None:
        out.train, out.validation = _written(out.train, merger), _written(out.validation, merger)
    if recipe.spec.own_answers and all(prompt is None for prompt, _ in out.train):
        raise DataError(
            "no prompts to answer",
            got="outputs alone",
            wanted="rows with a prompt",
            where="spec.own_answers",
            fix="add prompts to the examples, or leave --self out",
        )
    return out


def _written(rows: Sequence[Row], merger: TokenMerger) -> list[Row]:
    return [(prompt, merger.merge(answer)) for prompt, answer in rows]


def _examples(
    data: Any, config: DataConfig, split: str, reports: list[LoadReport], tell: Progress
) -> Iterator[Example]:
    report = LoadReport()
    reports.append(report)
    rows = load_examples(data, on_error=config.on_error, split=split, report=report)
    limit = config.max_examples or None
    for i, example in enumerate(islice(rows, limit)):
        if i % 256 == 0:
            tell(f"reading {split}", i, limit)
        yield example


def _sources(data: Any, validation: Any, reports: Sequence[LoadReport]) -> list[dict[str, Any]]:
    """What each source was, and what was left out of it."""
    out = []
    given = [("train", data), ("validation", validation)]
    for (role, source), report in zip(given, reports, strict=False):
        entry: dict[str, Any] = {"role": role, "rows": report.rows_kept, "skipped": report.skipped}
        entry |= source_hash(source, split=role, report=report)
        if report.skipped:
            entry["skipped_rows"] = [list(row) for row in report.skipped_rows[:_LISTED_ROWS]]
        out.append(entry)
    return out


def build(
    path: Path, loaded: tuple[Any, Any, str], prepared: Prepared, recipe: Recipe, tell: Progress
) -> Pack:
    """Write the indexes of a new pack."""
    model, tokenizer, name = loaded
    mark = fingerprint(tokenizer)
    size = int(model.config.get_text_config().vocab_size)
    info = PackInfo(
        model=str(Path(name).resolve()) if Path(name).is_dir() else name,
        fingerprint=mark,
        vocab_size=size,
        recipe=recipe.to_dict(),
        stages=["tasc-spec"],
        max_new_tokens=recipe.max_new_tokens,
        **provenance(),
    )
    pack = Pack.create(path, info)
    index(pack, prepared.train, recipe, tell)
    return pack


def index(pack: Pack, rows: Sequence[Row], recipe: Recipe, tell: Progress) -> None:
    """Write a pack's indexes of outputs and prompts, in place of those it has."""
    mark, size = pack.info.fingerprint, pack.info.vocab_size
    for folder in (pack.corpus, pack.similar):
        shutil.rmtree(folder, ignore_errors=True)
    tell("indexing outputs", 0, len(rows))
    CorpusIndex.build(
        pack.corpus,
        [answer for _, answer in rows],
        vocab_size=size,
        fingerprint=mark,
        shards=recipe.spec.shards,
    ).close()
    with_prompts = [(i, p) for i, (p, _) in enumerate(rows) if p is not None]
    if recipe.spec.similar and with_prompts:
        tell("indexing prompts", 0, len(with_prompts))
        SimilarIndex.build(pack.similar, with_prompts[:MAX_PROMPTS], fingerprint=mark)


def learn_own(
    task_model: TaskModel, prepared: Prepared, recipe: Recipe, tell: Progress
) -> TaskModel:
    """Index the model's own answers to the training prompts instead of the references.

    The references' index drafts for this pass, so that it runs at the task's speed already. A
    prompt that time does not reach keeps its reference; the pack says how many do.

    Raises:
        TascadeError: drafts change words (see :func:`tascade.calibration.check`), which is better
            known before this work than after it.
    """
    check(task_model, prepared.asked, recipe)
    own, places = own_answers(
        task_model.decoder,
        prepared.train,
        task_model.params(max_new_tokens=recipe.max_new_tokens),
        seconds=recipe.spec.own_seconds,
        tell=tell,
    )
    kept = {"references_kept": count_prompts(prepared.train) - len(own)}
    for at, row in zip(places, own, strict=True):
        prepared.train[at] = row
    prepared.own = places
    pack, cost = task_model.pack, task_model.cost.to_json()
    task_model.corpus.close()
    index(pack, prepared.train, recipe, tell)
    costs = {**pack.info.costs, task_model.cost_key: cost}
    pack.save_info(dataclasses.replace(pack.info, costs=costs, own_answers=len(own), rows=kept))
    return TaskModel(task_model.model, task_model.tokenizer, pack, pack.info.model, head="full")


def tailor(task_model: TaskModel, prepared: Prepared, recipe: Recipe, tell: Progress) -> TaskModel:
    """List the tokens of the task's answers in the pack, and go on with a head of those.

    Where the pack has the model's own answers, they alone are counted, and held-out prompts are
    answered to measure the list on.

    Raises:
        ConfigError: too few of the model's own answers in the time allowed.
    """
    pack, rows, held_out = task_model.pack, prepared.train, prepared.validation
    tokenizer, config = task_model.tokenizer, recipe.vocab
    if recipe.spec.own_answers:
        enough_own(len(prepared.own), rows, "training prompts", recipe.spec.own_seconds)
        rows = [rows[at] for at in prepared.own]
        held_out, _ = own_held_out(task_model, held_out, recipe, tell)
    tell("counting tokens", 0, len(rows))
    profile = build_profile(
        count_documents(rows),
        tokenizer,
        task_model.ends,
        vocab_size=pack.info.vocab_size,
        tolerance=config.tolerance,
        scripts=config.scripts,
        counted="own" if recipe.spec.own_answers else "gold",
        held_out=held_out,
    )
    keep_vocabulary(pack, tokenizer, profile, config)
    task_model.corpus.close()
    return TaskModel(task_model.model, tokenizer, pack, pack.info.model)


def own_held_out(
    task_model: TaskModel,
    rows: Sequence[Row],
    recipe: Recipe,
    tell: Progress,
    most: int = _OWN_HELD_OUT,
) -> tuple[list[Row], int]:
    """The model's own answers to held-out prompts, at most ``most`` of them spread over ``rows``;
    and how many of these prompts were not reached, which are left out.

    Raises:
        ConfigError: too few were reached in ``spec.own_seconds``.
    """
    asked = spread([row for row in rows if row[0] is not None], most)
    params = task_model.params(max_new_tokens=recipe.max_new_tokens)
    seconds = recipe.spec.own_seconds
    own, _ = own_answers(task_model.decoder, asked, params, seconds=seconds, tell=tell)
    enough_own(len(own), asked, "held-out prompts", seconds)
    return own, len(asked) - len(own)


def prove(task_model: TaskModel, prepared: Prepared, recipe: Recipe, tell: Progress) -> None:
    """Calibrate, compare with plain decoding, and note in the pack on how many rows."""
    pack, rows = task_model.pack, prepared.validation
    counts = {
        "held_out": len(rows),
        "held_out_of": prepared.held_out_of,
        "calibrated": calibrate(task_model, rows, recipe, tell),
        **asdict(check(task_model, prepared.asked, recipe)),
    }
    pack.save_info(dataclasses.replace(pack.info, rows={**pack.info.rows, **counts}))


def silent(stage: str, done: int, total: int | None) -> None:
    """No progress shown."""

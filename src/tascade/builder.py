"""A pack while it is made (one model, one TaskModel, one ``pack.json``), and what proves it."""

from __future__ import annotations

import copy
import logging
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tascade.answers.own import Answer, own_answers
from tascade.config import Recipe
from tascade.core import IntArray, Progress, Row
from tascade.data.beginnings import shared_beginnings
from tascade.data.encode import fingerprint
from tascade.data.prepare import Prepared, prepare, spread
from tascade.decode.equality import NearTies
from tascade.decode.loop import AllNodes
from tascade.decode.target import Target
from tascade.draft.costs import CostTable
from tascade.draft.measure import measure_cost
from tascade.draft.ngram.warm_up import is_warm, warm_up
from tascade.enrich.run import Tuned
from tascade.enrich.tokens.stored import read_tokens
from tascade.errors import TascadeError
from tascade.index.corpus import CorpusIndex
from tascade.index.similar import SimilarIndex
from tascade.model import TaskModel
from tascade.options import RowOptions, laid_over
from tascade.pack import Pack, PackInfo, provenance
from tascade.tailor.tailored import GUARANTEES
from tascade.util.files import install_folder
from tascade.util.progress import duration, in_time, spelt

MAX_PROMPTS = 500_000
_log = logging.getLogger("tascade.data")
_CHECKED_ROWS, _CHECKED_TOKENS, _CHECKED_NODES = 4, 64, 16
_MOST_COPIED, _DRAFT = 2 << 30, 16
"""Bytes of a model that is copied to be timed in float32, and tokens in the pass that is timed."""
SOONER = 80
"""Percent of half precision's time up to which float32 is the better choice."""
_SHORT = 10.0
"""Seconds that nobody needs to be told of before."""
_REPLAYED = 4
"""Outputs replayed for each prompt that would be decoded: a replay runs no model."""
Loaded = tuple[Any, Any, str]


class PackBuilder:
    """A pack while it is made; stages fill it (:data:`Stage`), and :meth:`save` makes it a pack.

    Args:
        folder: to fill, an empty one.
        loaded: model, tokenizer and name.
        recipe: what ``pack.json`` will hold.
        stored: see the attribute.

    Attributes:
        pack: the folder, and what its ``pack.json`` will say.
        loaded: the model that the pack is for now; a tuned one takes the place of its base.
        tuned: how the model was tuned, if it was; its folder becomes the pack's.
        stored: the folder or hub id that another process would load the same model by; empty for
            one that is in memory alone.
    """

    def __init__(self, folder: Path, loaded: Loaded, recipe: Recipe, stored: str = "") -> None:
        name = loaded[2]
        info = PackInfo(
            model=str(Path(name).resolve()) if Path(name).is_dir() else name,
            fingerprint="",
            vocab_size=0,
            recipe=recipe.to_dict(),
            max_new_tokens=recipe.max_new_tokens,
            **provenance(),
        )
        self.pack = Pack(folder, info)
        self.tuned: Tuned | None = None
        self.use(loaded, stored)

    def use(self, loaded: Loaded, stored: str = "") -> None:
        """Go on with this model; nothing may be indexed yet for another one's tokens."""
        self.loaded: Loaded = loaded
        self.stored = stored
        self._task_model: TaskModel | None = None
        size = int(loaded[0].config.get_text_config().vocab_size)
        self.pack.note(fingerprint=fingerprint(loaded[1]), vocab_size=size)

    @property
    def task_model(self) -> TaskModel:
        """The model over what is indexed, with its full head until a stage gives it another."""
        if self._task_model is None:
            model, tokenizer, name = self.loaded
            self._task_model = TaskModel(
                model, tokenizer, self.pack, name, head="full", checked=True
            )
        return self._task_model

    def index(self, rows: Sequence[Row], recipe: Recipe, tell: Progress) -> None:
        """Index answers, in place of those that are indexed already, and once their prompts.

        Rows given later have the same prompts in the same order.
        """
        info, first = self.pack.info, not self.pack.corpus.exists()
        if not is_warm():
            tell("compiling kernels, once", 0, None)
            warm_up()
        shutil.rmtree(self.pack.corpus, ignore_errors=True)
        tell("indexing outputs", 0, len(rows))
        CorpusIndex.build(
            self.pack.corpus,
            [answer for _, answer in rows],
            vocab_size=info.vocab_size,
            fingerprint=info.fingerprint,
            shards=recipe.spec.shards,
        )
        prompts = [(i, p) for i, (p, _) in enumerate(rows) if p is not None]
        if first:
            self.pack.note(prefixes=shared_beginnings([prompt for _, prompt in prompts]))
        if first and recipe.spec.similar and prompts:
            tell("indexing prompts", 0, len(prompts))
            SimilarIndex.build(
                self.pack.similar, prompts[:MAX_PROMPTS], fingerprint=info.fingerprint
            )
        if self._task_model is not None:
            self._task_model.reload()

    def save(self) -> None:
        """Write ``pack.json``, the last of its files; a tuned model is in the folder before."""
        if self.tuned is not None and self.tuned.path is not None:
            self.tuned.path.rename(self.pack.tuned)
        self.pack.save()

    def install(self, target: Path) -> TaskModel:
        """Save, give the folder its final name in one step, and open the pack there."""
        self.save()
        install_folder(self.pack.path, target)
        made = self.task_model
        self.pack = made.pack = Pack.open(target)
        made.reload()
        if self.tuned is not None:  # where it was loaded from is gone
            for part in self.loaded[:2]:
                part.name_or_path = str(self.pack.tuned)
        return made


Stage = Callable[[PackBuilder, Prepared, Recipe, Progress], None]
"""One step on the way to a pack: ``stage(task, prepared, recipe, progress)``.

``task`` is the builder, not a TaskModel: tuning comes before there is an index to make one over,
and changes the model itself. A stage may change the examples too: to the model's own answers.
"""


def answerer(task_model: TaskModel, recipe: Recipe, tell: Progress, **options: Any) -> Answer:
    """What answers prompts with a pack's drafts, as many as ``spec.own_seconds`` allows."""
    return partial(
        own_answers,
        task_model.decoder,
        params=task_model.params(max_new_tokens=recipe.max_new_tokens, **options),
        seconds=recipe.spec.own_seconds,
        tell=tell,
    )


@contextmanager
def answering(
    loaded: Loaded, prepared: Prepared, recipe: Recipe, tell: Progress
) -> Iterator[Answer]:
    """Have a model that has no pack answer prompts, drafted for from the references' index.

    So it runs at the task's speed already; the index is in a temporary folder. Answers are greedy,
    whatever the checkpoint says: they are learned from, and compared with.

    Raises:
        TascadeError: drafts change words (see :func:`check`), which is better
            known before long work than after it.
    """
    with tempfile.TemporaryDirectory(prefix="tascade-lessons-") as folder:
        made = PackBuilder(Path(folder), loaded, recipe)
        made.index(prepared.train, recipe, tell)
        check(made.task_model, prepared.asked, recipe, tell)
        yield answerer(made.task_model, recipe, tell, temperature=0)


def open_with_rows(
    pack: str | Path, data: Any, held_out: Any, options: RowOptions, tell: Progress
) -> tuple[TaskModel, Recipe, Prepared]:
    """A pack's model with its full head, how rows are read for it, and the rows.

    Raises:
        PackError: no pack there.
        DataError: a row cannot be used, or there are none.
    """
    tell("loading the model", 0, None)
    task = TaskModel.from_pretrained(pack, head="full")
    made, tokens = task.pack, task.pack.info.max_new_tokens
    recipe = Recipe(max_new_tokens=tokens, chat=task.chat, data=made.reading)
    recipe, merger = laid_over(recipe, options), read_tokens(made.model)
    return task, recipe, prepare(task.tokenizer, task.ends, data, held_out, recipe, tell, merger)


def calibrate(
    task_model: TaskModel,
    rows: Sequence[Row],
    recipe: Recipe,
    tell: Progress,
) -> dict[str, int]:
    """Decode validation prompts, learning on the way; saves what was learned, notes step costs.

    ``calibration_rows`` at most, spread over the file, and within ``calibration_seconds``. Where no
    row has a prompt, outputs are replayed instead.

    Returns:
        How many rows were ``calibrated``, and in how many ``steps`` the model said how many
        ``stepped_tokens``, and how many were ``cut`` at the limit of tokens, where it said any.
    """
    pack, most = task_model.pack, recipe.spec.calibration_rows
    tell("measuring the model's steps", 0, None)
    pack.note(costs={**pack.info.costs, **task_model.measured})
    prompts = [prompt for prompt, _ in rows if prompt is not None]
    chosen = spread(prompts, most)
    params = task_model.params(max_new_tokens=recipe.max_new_tokens)
    begin, seconds = time.monotonic(), recipe.spec.calibration_seconds
    done, counts, fits = 0, {"steps": 0, "stepped_tokens": 0, "cut": 0}, len(chosen)
    for done, prompt in enumerate(chosen, 1):
        took = time.monotonic() - begin
        if done > 1:  # what comes is begun before the time is over
            fits = min(len(chosen), done + in_time(done - 1, took, seconds - took, len(chosen)))
        tell("calibrating", done - 1, fits)
        said = task_model.decoder.generate(prompt, params)
        counts["steps"] += said.forwards
        counts["stepped_tokens"] += said.stepped_tokens
        counts["cut"] += said.finish_reason == "length"
        if time.monotonic() > begin + seconds:
            break
    if not prompts:
        done = replay_references(task_model, spread([a for _, a in rows], _REPLAYED * most))
    tell("calibrating", done, max(done, 1))
    task_model.calibration.save(pack.calibration)
    return {"calibrated": done, **(counts if counts["steps"] else {})}


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


def check(
    task_model: TaskModel,
    rows: Sequence[Row],
    recipe: Recipe,
    tell: Progress,
    most: int = _CHECKED_ROWS,
) -> dict[str, int]:
    """Compare a few answers, ``most``, with plain decoding's; what it finds is not learned from.

    A difference at a tie up to rounding (:class:`tascade.decode.equality.NearTies`) is counted and
    let pass. Any other means in float32 that verification is broken. In half precision it need
    not: there attention over one row and over several may round apart by more than such a
    tie allows, so it is warned of.

    A head that is approximate changes words on purpose: with it nothing is compared.

    Raises:
        TascadeError: an answer in float32 differs, and not at a tie up to rounding.
    """
    import torch

    tailored = task_model.tailored
    if tailored is not None and GUARANTEES[tailored.config.head] != "lossless":
        return {"checked": 0, "differing": 0, "near_ties": 0}
    params = task_model.params(max_new_tokens=min(_CHECKED_TOKENS, recipe.max_new_tokens))
    # A budget may decide that no draft pays here, and then there would be nothing to compare.
    drafted = task_model.new_decoder(task_model.new_drafter(), AllNodes(_CHECKED_NODES))
    near_ties = NearTies(task_model.target, params)
    if task_model.model.dtype != torch.float32:
        tell("comparing how half precision rounds by the rows of a pass", 0, None)
        task_model.target.begin()
    prompts = spread([prompt for prompt, _ in rows if prompt is not None], most)
    differing = ties = 0
    for done, prompt in enumerate(prompts):
        tell("comparing with plain decoding", done, len(prompts))
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
            f"more than a tie up to rounding: {task_model.model.dtype} may round so far; adapt in "
            "float32 to exclude any other cause",
            stacklevel=2,
        )
    return {"checked": len(prompts), "differing": differing, "near_ties": ties}


def half_precision(task_model: TaskModel) -> dict[str, int]:
    """In how many rows half precision rounds alike here (``rows_alike``), if it does."""
    counts = task_model.target.counts
    return {} if counts is None else {"rows_alike": counts.most}


def float32_percent(model: Any, cost: CostTable) -> int | None:
    """What a float32 pass over a draft takes, in percent of one in the model's half precision.

    CPUs that have no instructions for the latter may take twice as long, and where rounding is not
    alike words are the same in float32 alone. ``None`` but on a CPU, and for a model whose copy has
    room, up to :data:`_MOST_COPIED` bytes.

    Args:
        model: a causal model.
        cost: what its steps take.
    """
    import torch

    size = 4 * sum(part.numel() for part in model.parameters())
    half = model.dtype in (torch.bfloat16, torch.float16)
    if not half or model.device.type != "cpu" or size > _MOST_COPIED:
        return None
    whole = measure_cost(Target(copy.deepcopy(model).float()), seconds=1.0)
    percent = round(100 * float(whole.upto(_DRAFT)[-1] / cost.upto(_DRAFT)[-1]))
    better = "--dtype float32 is the better choice on this machine"
    _log.info(
        "a float32 pass over %d tokens takes %d%% of the time of one in the model's half precision "
        "here: %s",
        _DRAFT,
        percent,
        better if percent <= SOONER else "little or nothing to gain from --dtype float32",
    )
    return percent


def compare_precisions(
    task: PackBuilder, prepared: Prepared, recipe: Recipe, progress: Progress
) -> None:
    """Say it, before all that takes long, where float32 would be the sooner choice here."""
    if task.task_model.model.dtype.itemsize > 2:
        return
    progress("comparing with float32's speed", 0, None)
    percent = float32_percent(task.task_model.model, task.task_model.cost)
    if percent is not None:
        task.pack.note(rows={**task.pack.info.rows, "float32_percent": percent})


def foretell(task: PackBuilder, prepared: Prepared, recipe: Recipe, progress: Progress) -> None:
    """Say how long the rest may take, part by part, before any of it that takes long.

    An upper limit: as if every answer were as long as may be, and no draft were taken. Tuning and a
    drafter's training say their own.
    """
    progress("measuring the model's steps", 0, None)
    costs, spec = task.task_model.cost.upto(_CHECKED_NODES), recipe.spec
    step = float(costs[0])
    answer = step * recipe.max_new_tokens
    rows = [prompt for prompt, _ in prepared.validation if prompt is not None]
    passes = (step + float(costs[-1])) * min(_CHECKED_TOKENS, recipe.max_new_tokens)
    compared = min(_CHECKED_ROWS, len(prepared.asked)) + spec.own_answers
    parts = {
        "calibration": min(
            spec.calibration_seconds, answer * min(len(rows), spec.calibration_rows)
        ),
        "comparing with plain decoding": passes * compared,
    }
    if spec.own_answers:
        own = min(spec.own_seconds, answer * len(prepared.train))
        parts = {"own answers (--own-seconds)": own, **parts}
        if recipe.vocab.head != "full":
            parts["own held-out answers"] = min(spec.own_seconds, answer * len(rows))
    if sum(parts.values()) >= _SHORT:
        told = ", ".join(f"{name} {duration(seconds)}" for name, seconds in parts.items())
        _log.info("this takes %s at most: %s", spelt(sum(parts.values())), told)

"""A pack while it is made: one folder, one model, one TaskModel, one ``pack.json`` at the end."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from tascade.answers import Answer, own_answers
from tascade.calibration import check
from tascade.config import Recipe
from tascade.core import Progress, Row
from tascade.data.encode import end_tokens, fingerprint
from tascade.data.prepare import Prepared
from tascade.enrich.run import Tuned
from tascade.index.corpus import CorpusIndex
from tascade.index.similar import SimilarIndex
from tascade.model import TaskModel
from tascade.pack import Pack, PackInfo, provenance
from tascade.util.files import install_folder

MAX_PROMPTS = 500_000
Loaded = tuple[Any, Any, str]


class PackBuilder:
    """A pack while it is made; stages fill it (:data:`Stage`), and :meth:`save` makes it a pack.

    Args:
        folder: to fill, an empty one.
        loaded: model, tokenizer and name.
        recipe: what ``pack.json`` will hold.

    Attributes:
        pack: the folder, and what its ``pack.json`` will say.
        loaded: the model that the pack is for now; a tuned one takes the place of its base.
        tuned: how the model was tuned, if it was; its folder becomes the pack's.
    """

    def __init__(self, folder: Path, loaded: Loaded, recipe: Recipe) -> None:
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
        self.use(loaded)

    def use(self, loaded: Loaded) -> None:
        """Go on with this model; nothing may be indexed yet for another one's tokens."""
        self.loaded: Loaded = loaded
        self._task_model: TaskModel | None = None
        size = int(loaded[0].config.get_text_config().vocab_size)
        self.pack.note(fingerprint=fingerprint(loaded[1]), vocab_size=size)

    @property
    def ends(self) -> tuple[int, ...]:
        """Ids that end the model's answers."""
        return end_tokens(*self.loaded[:2])

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
        self.pack.save_info(self.pack.info)

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


def answerer(task_model: TaskModel, recipe: Recipe, tell: Progress) -> Answer:
    """What answers prompts with a pack's drafts, as many as ``spec.own_seconds`` allows."""
    return partial(
        own_answers,
        task_model.decoder,
        params=task_model.params(max_new_tokens=recipe.max_new_tokens),
        seconds=recipe.spec.own_seconds,
        tell=tell,
    )


@contextmanager
def answering(
    loaded: Loaded, prepared: Prepared, recipe: Recipe, tell: Progress
) -> Iterator[Answer]:
    """Have a model that has no pack answer prompts, drafted for from the references' index.

    So it runs at the task's speed already; the index is in a temporary folder.

    Raises:
        TascadeError: drafts change words (see :func:`tascade.calibration.check`), which is better
            known before long work than after it.
    """
    with tempfile.TemporaryDirectory(prefix="tascade-lessons-") as folder:
        made = PackBuilder(Path(folder), loaded, recipe)
        made.index(prepared.train, recipe, tell)
        check(made.task_model, prepared.asked, recipe)
        yield answerer(made.task_model, recipe, tell)

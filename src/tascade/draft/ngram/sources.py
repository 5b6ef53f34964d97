"""Task: what a pack knows about its task, opened for a drafter."""

from __future__ import annotations

from dataclasses import dataclass, field

from tascade.draft.ngram.drafter import SimilarView
from tascade.draft.ngram.mixer_calibration import Calibration
from tascade.index.corpus import CorpusIndex
from tascade.index.similar import SimilarIndex
from tascade.index.view import CorpusView
from tascade.pack import Pack


@dataclass(frozen=True, slots=True)
class Task:
    """What drafts are made from: a task's outputs, its similar examples, its learned trust.

    ``corpus`` is ``None`` to draft from the requests alone, ``similar`` to go without examples.
    """

    corpus: CorpusView | None
    similar: SimilarView | None = None
    calibration: Calibration = field(default_factory=Calibration)


@dataclass(frozen=True, slots=True)
class PackTask(Task):
    """A pack's task; its corpus is an index on disk."""

    corpus: CorpusIndex


def open_task(pack: Pack, fingerprint: str, rows: int) -> PackTask:
    """Open what a pack holds for drafting.

    Args:
        pack: the pack.
        fingerprint: that of the tokenizer whose ids will be drafted.
        rows: of the verifying model's vocabulary: no id that it has no row for is ever drafted.

    Raises:
        PackError: an index is damaged.
        FingerprintError: an index was made for another tokenizer.
    """
    corpus = CorpusIndex.open(pack.corpus, fingerprint=fingerprint, limit=rows)
    similar = None
    if pack.info.recipe.get("spec", {}).get("similar", True) and pack.similar.exists():
        similar = SimilarIndex.open(pack.similar, fetch=corpus.document, fingerprint=fingerprint)
    saved = Calibration.load(pack.calibration) if pack.calibration.exists() else Calibration()
    return PackTask(corpus, similar, saved)

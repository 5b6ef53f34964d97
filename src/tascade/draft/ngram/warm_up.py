"""Compiling every kernel beforehand, for container images: no first request waits for it."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

from tascade.decode import products
from tascade.draft.ngram.batch import BatchDrafter
from tascade.draft.ngram.batch_budget import BatchBudget
from tascade.draft.ngram.drafter import NgramDrafter
from tascade.draft.ngram.sources import Task
from tascade.draft.ngram.tree_search import grow_tree
from tascade.index.corpus import CorpusIndex
from tascade.index.similar import SimilarIndex
from tascade.util import jit

_MOST = 12


def is_warm() -> bool:
    """Whether kernels were compiled here before: for this version, and for this machine."""
    return jit.is_compiled(grow_tree)


def warm_up() -> None:
    """Compile what indexing, drafting, batches and passes need, and keep it in numba's cache.

    That is ``NUMBA_CACHE_DIR``, or beside the sources where they can be written to. The indexes
    are made and opened as a pack's are, since a kernel is compiled for the arrays it is given.
    """
    products.warm_up()
    rng = np.random.default_rng(0)
    outputs = [rng.integers(0, 50, 40).astype(np.int32) for _ in range(8)]
    with tempfile.TemporaryDirectory(prefix="tascade-warm-up-") as folder:
        corpus = CorpusIndex.build(
            Path(folder) / "corpus", outputs, vocab_size=64, fingerprint="warm-up"
        )
        prompts = list(enumerate(outputs))
        SimilarIndex.build(Path(folder) / "similar", prompts, fingerprint="warm-up")
        similar = SimilarIndex.open(
            Path(folder) / "similar", fetch=corpus.document, fingerprint="warm-up"
        )
        drafter = NgramDrafter(corpus, similar=similar, end_tokens=(63,))
        drafter.start(outputs[0])
        drafter.commit(outputs[1][:8], 0, ())
        drafter.propose(_MOST)
        BatchDrafter(
            [Task(corpus, similar)],
            end_tokens=(63,),
            requests=2,
            length=64,
            most=_MOST,
            budget=BatchBudget(_MOST),
        )

"""Which new tokens never reach over a decision of the model that is to say them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tascade.core import FloatArray, IntArray
from tascade.enrich.tokens.merger import Merger


def firm_shares(
    merger: Merger, answers: Sequence[IntArray], cuts: Sequence[IntArray]
) -> FloatArray:
    """Of the places where each new token would stand, the share without a decision inside.

    Args:
        merger: of N new tokens.
        answers: base ids of each answer.
        cuts: ascending places of each answer where a decision falls.

    Returns:
        [N] from 0 to 1; 1 for a token that stands nowhere.
    """
    stands, broken = np.zeros(len(merger), np.int64), np.zeros(len(merger), np.int64)
    for answer, places in zip(answers, cuts, strict=True):
        ids = merger.merge(answer)
        new, lengths = ids >= merger.first, merger.lengths_of(ids)
        ends = np.cumsum(lengths)
        inside = np.searchsorted(places, ends) - np.searchsorted(places, ends - lengths, "right")
        which = ids[new] - merger.first
        np.add.at(stands, which, 1)
        np.add.at(broken, which, inside[new] > 0)
    return (1.0 - broken / np.maximum(stands, 1)).astype(np.float32)

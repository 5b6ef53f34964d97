"""The drafter that proposes nothing: plain decoding is this drafter in the same loop."""

from __future__ import annotations

from collections.abc import Sequence

from tascade.core import EMPTY_TREE, DraftTree, IntArray


class NoDrafter:
    """Never drafts."""

    name = "plain"

    def start(self, prompt: IntArray) -> None:
        """Nothing to do."""

    def propose(self, limit: int, floor: float = 0.0) -> DraftTree:
        """An empty tree."""
        return EMPTY_TREE

    def commit(self, tokens: IntArray, verified: int, path: Sequence[int]) -> None:
        """Nothing to learn."""

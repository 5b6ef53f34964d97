"""What became of the drafted nodes: a recorder between the decoding loop and a drafter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from tascade.core import EMPTY_TREE, Drafter, DraftTree, IntArray
from tascade.decode.loop import best_chain
from tascade.decode.mask import depths


@dataclass(slots=True)
class VerifiedNodes:
    """Every draft node whose fate the target decided, in parallel lists.

    depths: 1 below the last committed token; survival: as the drafter predicted; accepted: whether
    plain decoding went through the node.
    """

    depths: list[int] = field(default_factory=list)
    survival: list[float] = field(default_factory=list)
    accepted: list[bool] = field(default_factory=list)


class Recorder:
    """A drafter that passes everything on to another one, and notes what was verified.

    Nodes below the one that ended a request are left out: nothing was decided about them.
    """

    def __init__(self, inner: Drafter, *, trees: bool) -> None:
        self.name = inner.name
        self.nodes = VerifiedNodes()
        self._inner, self._trees = inner, trees
        self._tree = EMPTY_TREE

    def start(self, prompt: IntArray) -> None:
        """Pass on."""
        self._tree = EMPTY_TREE
        self._inner.start(prompt)

    def propose(self, limit: int, floor: float = 0.0) -> DraftTree:
        """Pass on, and remember the proposal as the loop will use it."""
        tree = self._inner.propose(limit, floor)
        self._tree = tree if self._trees or tree.is_chain else best_chain(tree)
        return self._tree

    def commit(self, tokens: IntArray, verified: int, path: Sequence[int]) -> None:
        """Note the fate of the first ``verified`` nodes of the last proposal, and pass on."""
        tree, taken = self._tree.first(verified), set(path)
        ended_at = path[-1] if path and len(path) == len(tokens) else None
        undecided = np.zeros(len(tree), bool)
        for i, (parent, depth) in enumerate(
            zip(tree.parents.tolist(), depths(tree.parents).tolist(), strict=True)
        ):
            undecided[i] = ended_at is not None and (
                parent == ended_at or (parent >= 0 and undecided[parent])
            )
            if not undecided[i]:
                self.nodes.depths.append(depth)
                self.nodes.survival.append(float(tree.survival[i]))
                self.nodes.accepted.append(i in taken)
        self._tree = EMPTY_TREE
        self._inner.commit(tokens, verified, path)

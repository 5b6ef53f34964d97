"""Ways of decoding, as the bench runs them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Protocol

import numpy as np

from tascade.core import EMPTY_TREE, Drafter, DraftTree, Generation, IntArray
from tascade.decode.loop import Decoder, best_chain
from tascade.decode.mask import depths
from tascade.decode.sampling import SamplingParams
from tascade.draft.ngram.mixer_calibration import Calibration
from tascade.enrich.tokens.merger import TokenMerger


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


@dataclass(frozen=True, slots=True)
class Request:
    """One row of the benchmark: prompt ids [T] and the text that was wanted."""

    prompt: Sequence[int] | IntArray
    reference: str
    id: str = ""


class Method(Protocol):
    """One way of decoding. The bench calls ``reset``, then ``run`` for each request in turn."""

    @property
    def name(self) -> str:
        """Key of the method in the result."""
        ...

    @property
    def guarantee(self) -> str:
        """``lossless``, ``approximate`` or ``retrained``."""
        ...

    @property
    def settings(self) -> dict[str, Any]:
        """The method's own settings, for the result."""
        ...

    def reset(self) -> None:
        """Forget every request so far; keep what was learned from the task data."""
        ...

    def run(self, request: Request) -> Generation:
        """Decode one request to its end."""
        ...

    def trace(self, requests: Sequence[Request]) -> VerifiedNodes | None:
        """The nodes verified while decoding ``requests``, untimed; None where none can be seen."""
        ...


@dataclass(frozen=True, slots=True)
class Skipped:
    """A method that could not run here, and why."""

    name: str
    reason: str
    settings: dict[str, Any] = field(default_factory=dict)


def nothing() -> None:
    """The reset of a method that keeps no state from request to request."""


@dataclass(slots=True)
class DecoderMethod:
    """A method that is our loop with some drafter and budget.

    ``reset_state`` puts back what decoding changes in them: see :func:`restorer`.
    """

    name: str
    decoder: Decoder
    params: SamplingParams
    guarantee: str = "lossless"
    settings: dict[str, Any] = field(default_factory=dict)
    reset_state: Callable[[], None] = nothing

    def reset(self) -> None:
        """Call ``reset_state``."""
        self.reset_state()

    def run(self, request: Request) -> Generation:
        """Decode with the loop."""
        return self.decoder.generate(request.prompt, self.params)

    def trace(self, requests: Sequence[Request]) -> VerifiedNodes:
        """Decode with a recorder between the loop and the drafter."""
        inner = self.decoder.drafter
        recorder = Recorder(inner, trees=self.decoder.target.supports_trees)
        self.decoder.drafter = recorder
        try:
            for request in requests:
                self.run(request)
        finally:
            self.decoder.drafter = inner
        return recorder.nodes


@dataclass(slots=True)
class InBaseTokens:
    """A method of a model with new tokens, whose answers are counted in the base model's.

    One step then says several tokens, as it does with drafts, and rows of both kinds compare.
    """

    inner: DecoderMethod
    merger: TokenMerger
    name: str
    guarantee: str = "retrained"

    @property
    def settings(self) -> dict[str, Any]:
        """Those of the method within, and how many tokens are new."""
        return {**self.inner.settings, "new_tokens": len(self.merger)}

    def reset(self) -> None:
        """Reset the method within."""
        self.inner.reset()

    def run(self, request: Request) -> Generation:
        """Decode, and write the answer in base tokens."""
        said = self.inner.run(request)
        outside = len(said.tokens) - said.stepped_tokens
        before = self.merger.unmerge(said.tokens[:outside]).tolist()
        after = self.merger.unmerge(said.tokens[outside:]).tolist()
        said.tokens, said.stepped_tokens = before + after, len(after)
        return said

    def trace(self, requests: Sequence[Request]) -> VerifiedNodes | None:
        """As the method within."""
        return self.inner.trace(requests)


def restorer(decoder: Decoder, calibration: Calibration | None = None) -> Callable[[], None]:
    """A function that puts the decoder's budget, and a calibration, back to what they are now.

    Every repeat then starts from the same state: what the pack holds, nothing from a test row.
    Within a repeat both adapt, as they do in use.
    """
    budget, start = decoder.budget, copy.deepcopy(decoder.budget)
    saved = None if calibration is None else calibration.copy()

    def restore() -> None:
        fresh: Any = copy.deepcopy(start)
        for part in fields(fresh):  # in place, since a drafter may know its budget
            setattr(budget, part.name, getattr(fresh, part.name))
        if calibration is not None and saved is not None:
            for live, old in zip(calibration.arrays(), saved.arrays(), strict=True):
                live[...] = old

    return restore

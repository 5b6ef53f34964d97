"""The nouns every layer shares. Standard library and numpy only.

Shape legend of every docstring: ``B`` batch, ``T`` tokens, ``N`` tree nodes, ``V`` vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from html import escape
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int32]
LongArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]

Row = tuple[IntArray | None, IntArray]
"""(prompt, answer) token ids of an example, [T] each; ``None``: only the answer is known."""

Progress = Callable[[str, int, int | None], None]
"""Called as ``progress(stage, done, total)`` while long work goes on."""

ROOT = -1
"""Parent of a node that follows the last committed token."""

SEPARATOR = -1
"""Stands between the documents of a corpus; never a token id."""


_SHOWN = 80
"""Letters of a text that are shown where it stands among other facts."""


def silent(stage: str, done: int, total: int | None) -> None:
    """No progress shown."""


class Source(IntEnum):
    """Who proposed a draft node (several sources may have agreed: the strongest is named)."""

    TARGET = 0
    CORPUS = 1
    CONTEXT = 2
    BOTH = 3
    OTHER = 4


@dataclass(frozen=True, slots=True)
class Example:
    """One row of task data.

    ``prompt`` is a string, or chat messages (``{"role", "content"}``, the last from the user),
    or ``None`` when only outputs are known. ``where`` names the row for error messages.
    """

    prompt: str | tuple[dict[str, str], ...] | None
    completion: str
    where: str = ""
    id: str = ""


@dataclass(frozen=True, slots=True)
class DraftTree:
    """Likely continuations of the committed tokens, as flat arrays.

    Nodes are ordered best first: ``survival`` never rises and a parent precedes its children,
    so the first ``n`` nodes are themselves a tree, for every ``n``.

    tokens:   [N] int32, token id of each node
    parents:  [N] int32, index of the parent node, ``ROOT`` (-1) below the last committed token
    survival: [N] float32, calibrated probability that the target's path passes through the node
    source:   [N] int8, a :class:`Source`
    places:   [N] where each node stood in the proposal; ``None`` where it stands there still
    """

    tokens: IntArray
    parents: IntArray
    survival: FloatArray
    source: npt.NDArray[np.int8]
    places: IntArray | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def rows(self) -> Iterator[tuple[int, int, float, int]]:
        """Token, parent, survival and source of each node."""
        columns = (self.tokens, self.parents, self.survival, self.source)
        return zip(*(column.tolist() for column in columns), strict=True)

    def first(self, n: int) -> DraftTree:
        """The tree of the ``n`` best nodes (all of them if there are fewer)."""
        if n >= len(self.tokens):
            return self
        places = None if self.places is None else self.places[:n]
        parts = self.tokens[:n], self.parents[:n], self.survival[:n], self.source[:n]
        return DraftTree(*parts, places)

    def depth_first(self) -> DraftTree:
        """The same tree with each node behind its parent's likelier children and all below them.

        The likeliest path then lies in one piece behind the committed tokens, as plain decoding
        lays it: nothing moves in the cache when it is accepted, and in half precision its rows come
        out bit for bit (see :mod:`tascade.decode.row_counts`). Other branches stand behind it.
        """
        if self.is_chain:
            return self
        children: dict[int, list[int]] = {}
        for node, parent in enumerate(self.parents.tolist()):
            children.setdefault(parent, []).append(node)
        order: list[int] = []
        waiting = children[ROOT][::-1]
        while waiting:
            node = waiting.pop()
            order.append(node)
            waiting += children.get(node, ())[::-1]
        place = np.empty(len(order) + 1, np.int32)
        place[order], place[ROOT] = np.arange(len(order), dtype=np.int32), ROOT
        at = np.asarray(order, np.int32)
        parents = place[self.parents[at]]
        return DraftTree(self.tokens[at], parents, self.survival[at], self.source[at], at)

    @property
    def is_chain(self) -> bool:
        """Whether no node has a sibling."""
        n = len(self.parents)
        return bool((self.parents == np.arange(-1, n - 1, dtype=np.int32)).all())

    @staticmethod
    def best_first(
        tokens: Sequence[int],
        parents: Sequence[int],
        survival: Sequence[float],
        source: Sequence[int],
        limit: int,
        floor: float = 0.0,
    ) -> DraftTree:
        """The tree of the likeliest of some nodes, ``limit`` at most, that may pay.

        A parent stands before its children and is as likely at least. ``floor``: see
        :meth:`Drafter.propose`.
        """
        ranked = sorted(range(len(tokens)), key=lambda at: (-survival[at], at))
        kept, promised = list[int](), 1.0
        for at in ranked[:limit]:
            if survival[at] < floor * promised:
                break
            kept.append(at)
            promised += survival[at]
        place = {at: i for i, at in enumerate(kept)} | {int(ROOT): int(ROOT)}
        return DraftTree(
            np.asarray([tokens[at] for at in kept], np.int32),
            np.asarray([place[parents[at]] for at in kept], np.int32),
            np.asarray([survival[at] for at in kept], np.float32),
            np.asarray([source[at] for at in kept], np.int8),
        )

    @staticmethod
    def chain(
        tokens: Sequence[int] | IntArray,
        survival: Sequence[float] | FloatArray | None = None,
        source: Source = Source.OTHER,
    ) -> DraftTree:
        """A tree without branches; ``survival`` defaults to 1 everywhere."""
        ids = np.asarray(tokens, dtype=np.int32)
        n = len(ids)
        s = np.ones(n, np.float32) if survival is None else np.asarray(survival, np.float32)
        return DraftTree(ids, np.arange(-1, n - 1, dtype=np.int32), s, np.full(n, source, np.int8))


EMPTY_TREE = DraftTree.chain([])


@runtime_checkable
class Drafter(Protocol):
    """Proposes draft trees for one request at a time.

    The order of calls is ``start (propose commit)*``; ``start`` forgets the request before.
    A proposal must be a function of the tokens seen so far, never of this step's target logits
    or random draws: that is what makes sampled verification exact.
    """

    @property
    def name(self) -> str:
        """Short name, as shown in benchmarks."""
        ...

    def start(self, prompt: IntArray) -> None:
        """Begin a request. ``prompt``: [T] int32. Replaces all per-request state."""
        ...

    def propose(self, limit: int, floor: float = 0.0) -> DraftTree:
        """At most ``limit`` nodes below the last committed token. Mutates no visible state.

        A node is worth proposing while its survival is at least ``floor`` times one plus the
        survival of all nodes before it; a drafter without an estimate may ignore that.
        """
        ...

    def commit(self, tokens: IntArray, verified: int, path: Sequence[int]) -> None:
        """Take the outcome of a step.

        ``tokens``: [T] the newly committed tokens; ``verified``: how many nodes of the last
        proposal the target checked (its first ``verified`` nodes); ``path``: indices of the
        nodes it accepted, root to leaf. Updates per-request context and calibration.
        """
        ...


@dataclass(slots=True)
class StepStats:
    """What one target forward did."""

    drafted: int
    accepted: int
    committed: int
    draft_seconds: float
    step_seconds: float


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token's natural log-probability, and the most likely (token, log-probability) beside it."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class Shown:
    """What reads well at a Python prompt, and as a table in a notebook."""

    __slots__ = ()

    def facts(self) -> dict[str, object]:
        """What there is to show, by name."""
        raise NotImplementedError

    def __repr__(self) -> str:
        said = ", ".join(f"{name}={value}" for name, value in self.facts().items())
        return f"{type(self).__name__}({said})"

    def _repr_html_(self) -> str:
        rows = (
            f"<tr><th>{escape(name)}</th><td>{escape(str(value))}</td></tr>"
            for name, value in self.facts().items()
        )
        return f"<table>{''.join(rows)}</table>"


@dataclass(slots=True, repr=False)
class Generation(Shown):
    """The result of one request.

    ``tokens``: generated ids, the end token included if one was produced. ``sources``: who drafted
    each (``Source.TARGET`` where the target itself emitted it). ``forwards``: target passes over
    drafts or single tokens; a prefill that carried no draft is left out, and so is its one token
    from ``stepped_tokens``, so ``tokens_per_step = stepped_tokens / forwards``. ``logprobs``:
    one for each token, where they were asked for.
    """

    tokens: list[int]
    text: str = ""
    finish_reason: str = "length"
    sources: list[int] = field(default_factory=list)
    steps: list[StepStats] = field(default_factory=list)
    forwards: int = 0
    stepped_tokens: int = 0
    prompt_tokens: int = 0
    prefill_seconds: float = 0.0
    seconds: float = 0.0
    logprobs: list[TokenLogprob] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def tokens_per_step(self) -> float:
        """Committed tokens per target forward."""
        return self.stepped_tokens / self.forwards if self.forwards else 0.0

    @property
    def drafted_by(self) -> dict[str, int]:
        """How many tokens each source drafted, by its name; ``target``: nobody, the model said it.

        The names are those of :class:`Source`, in its order; those without a token are left out.
        """
        counts = Counter(self.sources)
        return {source.name.lower(): counts[source] for source in Source if counts[source]}

    def facts(self) -> dict[str, object]:
        """The text, shortened, and how it came about."""
        text = self.text if len(self.text) <= _SHOWN else self.text[:_SHOWN] + "..."
        return {
            "text": repr(text),
            "tokens": len(self.tokens),
            "forwards": self.forwards,
            "tokens_per_step": f"{self.tokens_per_step:.2f}",
            "drafted_by": self.drafted_by,
            "finish_reason": repr(self.finish_reason),
        }

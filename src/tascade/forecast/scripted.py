"""A replay: the decoding loop over a target that says what is already known."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch

from tascade.core import DraftTree, FloatArray, Generation, IntArray
from tascade.decode.loop import Decoder, Request
from tascade.decode.sampling import SamplingParams
from tascade.decode.target import Hold
from tascade.draft.budget import Budget
from tascade.draft.ngram.drafter import NgramDrafter
from tascade.forecast.statistics import Pair


class _ScriptedTarget:
    """What the decoding loop needs of a :class:`Target`: it says ``output``, whatever it reads.

    A forward returns the target itself in place of logits [1 + N, V]: a walk asks it for a row's
    largest, and for nothing else.
    """

    supports_trees = True
    rows, positions, context, counts = 2**31 - 1, None, None, None
    device = torch.device("cpu")
    lock = nullcontext()
    step = nullcontext

    def __init__(self) -> None:
        self.output: IntArray = np.empty(0, np.int32)

    def begin(self, prompt: IntArray, hold: Hold) -> None:
        self.length, self._prompt, self.hold = 0, len(prompt), hold

    def end(self, hold: Hold) -> None:
        """Nothing to give back."""

    def room(self, base: int, unread: int) -> int | None:
        return None

    def recall(self, prompt: IntArray) -> int:
        return 0

    def unread(self, request: Request) -> list[int]:
        return request.result.tokens[-1:]

    def forward(self, tokens: Sequence[int], tree: DraftTree) -> _ScriptedTarget:
        self._said = self.length + len(tokens) - self._prompt
        self._parents = tree.parents.tolist()
        return self

    def argmax_rows(self, rows: slice) -> list[int]:
        node, at = rows.start - 1, self._said
        while node >= 0:
            node, at = self._parents[node], at + 1
        return [int(self.output[min(at, len(self.output) - 1)])]

    def keep(self, base: int, slots: Sequence[int]) -> None:
        self.length = base + len(slots)


class TableBudget(Budget):
    """A budget whose steps take what its table says, and each draft ``draft_cost`` seconds."""

    draft_cost, drafts, _drafted = 0.0, 0, False

    def plan(self) -> tuple[int, float]:
        """As the budget's; a draft may follow."""
        self._drafted = False
        return super().plan()

    def choose(self, survival: FloatArray) -> int:
        """As the budget's; this was a draft."""
        self._drafted, self.drafts = True, self.drafts + 1
        return super().choose(survival)

    def observe(self, nodes: int, seconds: float, draft_seconds: float) -> None:
        """Take what the table says, whatever it took."""
        seconds = float(self.cost.upto(nodes + 1)[-1])
        super().observe(nodes, seconds, self.draft_cost if self._drafted else 0.0)


def replay(
    drafter: NgramDrafter, budget: Budget, rows: Sequence[Pair], ends: Sequence[int]
) -> list[Generation]:
    """What the decoding loop makes of a target that says these outputs."""
    target: Any = _ScriptedTarget()
    decoder, said = Decoder(target, drafter, budget), []
    for prompt, output in rows:
        if not len(output):
            continue
        target.output = output
        # An output that ends by itself leaves room for drafts behind its end.
        room = len(output) + (int(output[-1]) in ends)
        params = SamplingParams(max_new_tokens=room, ignore_end=True)
        given = prompt if len(prompt) else output[:1]  # a model has to read something

        def over(tokens: Sequence[int], most: int = len(output)) -> bool:
            return len(tokens) >= most

        said.append(decoder.generate(given, params, extra_stop=over))
    return said

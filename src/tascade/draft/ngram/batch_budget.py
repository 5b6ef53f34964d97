"""How many drafted tokens a whole batch should verify, from the engine's own step times."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tascade.core import LongArray
from tascade.draft.costs import Backoff, CostTable, Trust
from tascade.draft.ngram.batch_kernels import best_rate

# Set with benchmarks/vllm_path.py; none was varied by itself.
_MARGIN = 1.05
_PATIENCE = 2
_TRY_EVERY = 16
_LONGEST_DRAFT = 0.01
_MANY = 16
_PLAIN_FIRST = 3
_PLAIN_AT, _PLAIN_EVERY = 48, 256


class BatchBudget:
    """Shares the drafted tokens worth verifying over a batch by expected gain, down to none.

    A step over ``B`` requests and ``n`` drafted tokens yields ``B + sum(survival)`` tokens in
    ``cost(B, n)`` seconds. The nodes of all requests compete: the surest are taken as long as the
    rate rises. While nothing pays, drafts are made ever more rarely, down to one step in
    ``max_pause``; they are learned from whether they are verified or not.

    Attributes:
        wants_plain: whether the step just planned is to show what one without drafts costs.
    """

    def __init__(self, most: int, max_pause: int = 32) -> None:
        self.most = most
        self.costs, self.trust = CostTable(), Trust()
        # An answer's end has no draft either: one step without says nothing.
        self._backoff = Backoff(max_pause, patience=_PATIENCE)
        self._draft_seconds = self._node_seconds = 0.0
        self._rates: dict[int, float] = {}
        self._visits: dict[int, int] = {}
        self.wants_plain = False
        self._compile()

    @staticmethod
    def _compile() -> None:
        counts, sums = np.zeros(1, np.int64), np.zeros(1)
        best_rate(1, counts, sums, 1.0, np.arange(2.0), np.ones(2), 0.0)

    def rests(self) -> bool:
        """Whether to leave this step alone, since drafts did not pay; called once a step."""
        return self._backoff.rests()

    def plan(self, rows: int) -> tuple[int, float]:
        """(most tokens to draft for a request, least survival worth drafting); (0, 1.0) to skip."""
        self.wants_plain = self._needs_plain(rows)
        curve = None if self.wants_plain else self.costs.curve(rows)
        if curve is None:
            return 0, 1.0
        sizes, seconds = curve
        reach = min(len(sizes) - 1, int(np.searchsorted(sizes, rows * self.most)))
        slope = max(0.0, (seconds[reach] - seconds[0]) / max(sizes[reach], 1.0))
        # A token is worth its slot while it adds to the rate, that of plain steps or of late; a bit
        # more than half of that leaves room for errors. Where requests are many, drafting it costs
        # as well.
        cost = slope + (self._node_seconds if rows > _MANY else 0.0)
        rate = max(rows / seconds[0], 0.9 * self._rates.get(rows.bit_length(), 0.0))
        return self.most, float(min(0.9, 0.6 * cost * rate))

    def _needs_plain(self, rows: int) -> bool:
        """Whether it is time to see again what a step without drafts costs at this batch size."""
        size = rows.bit_length()
        visit = self._visits[size] = self._visits.get(size, 0) + 1
        return self.costs.plain_seen < _PLAIN_FIRST or visit % _PLAIN_EVERY == _PLAIN_AT

    def choose(self, rows: int, counts: LongArray, sums: npt.NDArray[np.float64]) -> int:
        """How many of the survival bins to verify, for a batch of ``rows`` requests.

        ``counts``, ``sums``: [SURVIVAL_BINS] nodes and summed survival by bin, the surest first.
        """
        curve = self.costs.curve(rows)
        if curve is None or not counts.any():
            self._backoff.failed()
            return 0
        sizes, seconds = curve
        credit = self.trust.credit
        bins, rate = best_rate(rows, counts, sums, credit, sizes, seconds, self._draft_seconds)
        self._rates[rows.bit_length()] = rate
        if rate * seconds[0] < _MARGIN * rows:
            self._backoff.failed()
            # Costs may have fallen since: only a try tells.
            return bins if self._backoff.failures % _TRY_EVERY == 0 else 0
        self._backoff.paid()
        return bins

    def drafted_in(self, seconds: float, nodes: int) -> None:
        """Take what drafting ``nodes`` tokens for the batch took."""
        seconds = min(seconds, _LONGEST_DRAFT)  # the first one of a request looks around
        self._draft_seconds += 0.1 * (seconds - self._draft_seconds)
        if nodes:
            self._node_seconds += 0.1 * (seconds / nodes - self._node_seconds)

    def judge(self, promised: float, kept: int) -> None:
        """Compare the survival promised for verified drafts with how many were accepted."""
        if promised > 0:
            self.trust.record(promised, kept)

"""Which tokens a small head lacked of late, so that the next requests have them from the start."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

MOST = 256


class Lacking:
    """Tokens that answers had and a small head had not; those not seen for longest go first.

    Only for heads whose guesses are checked: what these have changes how soon an answer is there,
    and never the answer.

    Args:
        most: how many to remember.
    """

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._tokens: OrderedDict[int, None] = OrderedDict()

    @property
    def tokens(self) -> Sequence[int]:
        """All that are remembered."""
        return list(self._tokens)

    def add(self, tokens: Iterable[int]) -> None:
        """These were lacking."""
        for token in tokens:
            self._tokens[token] = None
            self._tokens.move_to_end(token)
        while len(self._tokens) > self._most:
            self._tokens.popitem(last=False)

    def saw(self, tokens: Iterable[int]) -> None:
        """An answer has these: those remembered among them are still of use."""
        for token in tokens:
            if token in self._tokens:
                self._tokens.move_to_end(token)

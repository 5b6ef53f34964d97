"""Noticing what others append to corpus indexes that are in use."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

from tascade.errors import PackError
from tascade.index.corpus import CorpusIndex

_log = logging.getLogger(__name__)


class AppendedWatch:
    """Looks into open indexes now and then, and takes up what their writers did.

    Args:
        indexes: open for reading.
        every: seconds between two looks.
    """

    def __init__(self, indexes: Sequence[CorpusIndex], every: float = 2.0) -> None:
        self._indexes, self._every = indexes, every
        self._next = time.monotonic() + every
        self._failed: set[int] = set()

    def refresh_due(self) -> bool:
        """Whether anything is new since the last look; the caller then refreshes its drafter.

        An index that cannot be read any more stays in use as it was; the log says so once.
        """
        if time.monotonic() < self._next:
            return False
        changed = False
        for i, index in enumerate(self._indexes):
            try:
                changed |= index.refresh()
                self._failed.discard(i)
            except PackError as error:
                if i not in self._failed:
                    _log.warning("what is appended to an index is not seen now: %s", error)
                self._failed.add(i)
        self._next = time.monotonic() + self._every
        return changed

"""What a drafter has learned about its own sources: saved in the pack, adapted while decoding."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from tascade.draft.ngram.candidates import SOURCES
from tascade.draft.ngram.mixer import (
    FINAL_BUCKETS,
    MATCH_BUCKETS,
    SHARE_BUCKETS,
    WEIGHT_SETS,
    fresh_state,
    log_odds,
)
from tascade.errors import PackError
from tascade.util.files import read_json, write_atomic

FORMAT = "tascade-calibration"
VERSION = 1
_MOST_BYTES = 1 << 20
_LIMIT = 1e6
"""No weight and no count ever comes near it; larger ones could overflow in the kernels, which then
look up a table at the place of what is not a number."""
_SHAPES = {
    "cells": (SOURCES, MATCH_BUCKETS, SHARE_BUCKETS, 2),
    "weights": (WEIGHT_SETS, SOURCES + 1),
    "final": (FINAL_BUCKETS, 2),
    "path": (FINAL_BUCKETS, 2),
}


class Calibration:
    """The mixer's four learned stages (see :mod:`tascade.draft.ngram.mixer`).

    cells:   [3, 16, 13, 2] hits and trials by source, match length and vote share
    weights: [8, 4] of the logistic mixer, one row for each combination of sources present
    final:   [25, 2] hits and trials by mixed log-odds
    path:    [25, 2] hits and trials by the log-odds of a whole path
    """

    def __init__(self) -> None:
        self.cells, self.weights, self.final, self.path = fresh_state()
        self._odds = log_odds(self.cells)

    def arrays(self) -> tuple[Any, ...]:
        """What the kernels read and update in place: all stages, then the log-odds of cells."""
        return (self.cells, self.weights, self.final, self.path, self._odds)

    def copy(self) -> Calibration:
        """An independent copy: a request may learn without changing the saved state."""
        other = Calibration()
        for name in _SHAPES:
            getattr(other, name)[...] = getattr(self, name)
        other._odds[...] = self._odds
        return other

    def save(self, path: Path) -> None:
        """Write as JSON, atomically."""
        state = {name: np.round(getattr(self, name), 6).tolist() for name in _SHAPES}
        text = json.dumps({"format": FORMAT, "version": VERSION, **state})
        write_atomic(path, text.encode())

    @classmethod
    def load(cls, path: Path) -> Calibration:
        """Read what :meth:`save` wrote.

        Raises:
            PackError: not such a file, another version, or values no calibration can hold.
        """
        try:
            state = read_json(path, _MOST_BYTES)
            wrong = state.get("format") != FORMAT or state.get("version") != VERSION
        except (OSError, ValueError, AttributeError) as error:
            raise PackError(
                "cannot read the calibration", got=error, where=str(path), fix="run adapt again"
            ) from error
        if wrong:
            raise PackError(
                "not a calibration this version reads",
                got=f"{state.get('format')} version {state.get('version')}",
                wanted=f"{FORMAT} version {VERSION}",
                where=str(path),
                fix="run adapt again",
            )
        out = cls()
        for name, shape in _SHAPES.items():
            getattr(out, name)[...] = _checked(state.get(name), name, shape, path)
        out._odds[...] = log_odds(out.cells)
        return out


def _checked(value: object, name: str, shape: tuple[int, ...], path: Path) -> Any:
    try:
        array = np.asarray(value, np.float64)
    except (ValueError, TypeError, OverflowError):
        array = np.empty(0)
    sound = array.shape == shape and bool((np.abs(array) <= _LIMIT).all())  # nor "not a number"
    if sound and name != "weights":
        hits, trials = array[..., 0], array[..., 1]
        sound = bool(((trials > 0) & (hits >= 0) & (hits <= trials)).all())
    if not sound:
        raise PackError(
            f"the calibration's {name} are damaged",
            got=f"{array.shape} numbers, {name} that no drafter learns",
            wanted=f"{shape} numbers" + ("" if name == "weights" else ", no more hits than trials"),
            where=str(path),
            fix="run adapt again",
        )
    return array

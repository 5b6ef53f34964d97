"""Few cases in which any two values of two parameters meet, for what a full product is too slow.

Nearly every mistake that depends on parameters depends on one or two of them. With
``TASCADE_TEST_FULL=1`` :func:`sampled` gives the full product all the same.
"""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Callable, Sequence
from typing import Any

Case = tuple[Any, ...]
_TRIES = 60


def _any(*case: Any) -> bool:
    return True


def all_pairs(*values: Sequence[Any], allowed: Callable[..., bool] = _any) -> list[Case]:
    """Cases, one value of each parameter, that hold each pair of values which any allowed one does.

    Greedy, and the same at every call: of random cases that hold the first pair not yet met, that
    with the most of those not yet met. ``values``: of each parameter; ``allowed`` takes a case.
    """
    rng, found = random.Random(4), []
    places = [[(i, v) for v in range(len(of))] for i, of in enumerate(values)]
    left = {pair for a, b in itertools.combinations(places, 2) for pair in itertools.product(a, b)}
    while left:
        first = min(left)
        best, chosen = {first}, None
        for _ in range(_TRIES):
            case = dict(rng.choice(place) for place in places) | dict(first)
            given = tuple(of[case[i]] for i, of in enumerate(values))
            new = left.intersection(itertools.combinations(sorted(case.items()), 2))
            if allowed(*given) and (chosen is None or len(new) > len(best)):
                best, chosen = new, given
        left -= best
        if chosen is not None:
            found.append(chosen)
    return found


def sampled(*values: Sequence[Any], allowed: Callable[..., bool] = _any) -> list[Case]:
    """What to parametrize a test with: :func:`all_pairs`, or every case where all are asked for."""
    if os.environ.get("TASCADE_TEST_FULL") == "1":
        return [case for case in itertools.product(*values) if allowed(*case)]
    return all_pairs(*values, allowed=allowed)

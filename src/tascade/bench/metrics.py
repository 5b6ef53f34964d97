"""What a benchmark measures: quality, speed-up with its spread, acceptance, calibration.

Pure functions of sequences of numbers or strings. Nothing to measure is refused rather than
given a made-up value: the mean of no rows is not a number.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from tascade.errors import TascadeError
from tascade.forecast.rescue import ratio_of_sums

OURS = ("tasc-spec", "tasc-ft", "tailored", "taps")
"""Methods whose name starts so are tascade's; the others, the paper's drafter too, are peers."""

QUARTILES_FROM = 8
"""From this many repeats on, a spread is the quartiles; below it, the extremes."""

MAX_JSON_DEPTH = 64
"""JSON nested deeper than this counts as unparsable."""

_Leaf = tuple[tuple[str, ...], str, object]
"""One scalar of a JSON document: its path, its type, its value."""


# --- quality ------------------------------------------------------------------------------------


def exact_match(texts: Sequence[str], references: Sequence[str]) -> float:
    """Share of texts equal to their reference once runs of whitespace are one space."""
    _check_pairs(texts, references, "exact_match")
    same = sum(t.split() == r.split() for t, r in zip(texts, references, strict=True))
    return same / len(texts)


def json_field_f1(texts: Sequence[str], references: Sequence[str]) -> float | None:
    """Micro F1 over the fields of JSON outputs; None where the task does not write JSON.

    A document is flattened to (path, value) pairs. List items share the path ``[]`` and form a
    multiset, so their order does not count; an empty object or list is a value itself. Strings
    compare exactly, ``1`` equals ``1.0``, ``true`` differs from ``1``.

    Args:
        texts: What the model wrote. Text that is no JSON object or array scores 0 for its row.
        references: What was wanted. Rows whose reference is no JSON object or array are left
            out; if these are more than half, the result is None.
    """
    _check_pairs(texts, references, "json_field_f1")
    wanted = [_parse_fields(reference) for reference in references]
    if 2 * sum(fields is not None for fields in wanted) < len(wanted):
        return None
    hits = total = 0
    for text, fields in zip(texts, wanted, strict=True):
        if fields is None:
            continue
        found = _parse_fields(text) or Counter()
        hits += (found & fields).total()
        total += found.total() + fields.total()
    return 2 * hits / total


def quality(texts: Sequence[str], refs: Sequence[str]) -> dict[str, float]:
    """The ``quality`` object of a bench result: every metric that applies to the task."""
    scores = {"exact_match": exact_match(texts, refs)}
    f1 = json_field_f1(texts, refs)
    if f1 is not None:
        scores["json_field_f1"] = f1
    return scores


def _parse_fields(text: str) -> Counter[_Leaf] | None:
    """The (path, type, value) leaves of a JSON object or array; None if it is neither."""
    try:
        document = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return None
    return _flatten(document) if isinstance(document, dict | list) else None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _flatten(document: Any) -> Counter[_Leaf] | None:
    """Leaves of a parsed document as a multiset; None if it is nested too deep."""
    leaves: Counter[_Leaf] = Counter()
    stack: list[tuple[tuple[str, ...], Any]] = [((), document)]
    while stack:
        path, node = stack.pop()
        if len(path) > MAX_JSON_DEPTH:
            return None
        if isinstance(node, dict) and node:
            # The dot keeps a key named "[]" apart from a list.
            stack.extend(((*path, f".{key}"), value) for key, value in node.items())
        elif isinstance(node, list) and node:
            stack.extend(((*path, "[]"), item) for item in node)
        else:
            leaves[_leaf(path, node)] += 1
    return leaves


def _leaf(path: tuple[str, ...], value: Any) -> _Leaf:
    if isinstance(value, dict | list):
        return path, type(value).__name__, None
    if isinstance(value, int | float) and not isinstance(value, bool):
        return path, "number", value
    return path, type(value).__name__, value


# --- speed --------------------------------------------------------------------------------------


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median of a measurement's repeats, with how far they lie apart.

    ``low`` and ``high`` are the extremes below ``QUARTILES_FROM`` (8) repeats, where quartiles
    would be guesses, and the quartiles from there on, where extremes would only grow.
    """
    array = _finite(values, "spread")
    ends = (25, 75) if len(array) >= QUARTILES_FROM else (0, 100)
    low, median, high = np.percentile(array, (ends[0], 50, ends[1]))
    return {"median": float(median), "low": float(low), "high": float(high)}


def with_spread(ratio: Mapping[str, float]) -> str:
    """A ratio of speeds with what it was between, or that there was but one round."""
    low, high = ratio["low"], ratio["high"]
    return f"{ratio['median']:.2f}x " + (
        "(one round)" if low == high else f"[{low:.2f}-{high:.2f}]"
    )


def speedup(seconds: Sequence[float], plain_seconds: Sequence[float]) -> dict[str, float]:
    """How many times as fast as plain decoding: the :func:`spread` of the per-repeat ratios.

    Repeat ``i`` of both methods must have run next to each other, so that a drifting machine
    hurts both alike. Where the two wrote different numbers of tokens, give seconds per token.
    """
    _check_pairs(seconds, plain_seconds, "speedup")
    ours, plain = _finite(seconds, "speedup"), _finite(plain_seconds, "speedup")
    if min(ours.min(), plain.min()) <= 0:
        raise TascadeError(
            "speedup of a run that took no time",
            got=f"{min(ours.min(), plain.min()):g} seconds",
            wanted="seconds above 0",
            fix="time more work per repeat, or use a finer clock",
        )
    return spread((plain / ours).tolist())


def by_rows(
    times: Sequence[Sequence[float]], plain_times: Sequence[Sequence[float]]
) -> dict[str, float] | None:
    """95 % of the speed-ups that other rows like these would give, by resampling the rows.

    ``times``: seconds by repeat and row, [R, N], of a method and of plain decoding. ``None`` for
    fewer than two rows.
    """
    ours, plain = (np.asarray(each, np.float64).mean(0) for each in (times, plain_times))
    if len(ours) < 2:
        return None
    _, low, high = ratio_of_sums(plain, ours)
    return {"low": low, "high": high}


def percentiles(values: Sequence[float], ranks: Sequence[float] = (50, 99)) -> dict[str, float]:
    """Percentiles by name: ``{"p50": ..., "p99": ...}``, interpolated linearly."""
    array = _finite(values, "percentiles")
    return {f"p{rank:g}": float(np.percentile(array, rank)) for rank in ranks}


# --- drafts -------------------------------------------------------------------------------------


def acceptance_by_position(depths: Sequence[int], accepted: Sequence[bool]) -> list[float]:
    """Share of verified draft nodes that were accepted, at depth 1, 2, ...

    Stops before the first depth at which no node was verified. In a branching tree siblings
    compete for one place, so the share is below that of a chain that drafts as well.

    Args:
        depths: Depth of each verified node, 1 for the children of the last committed token.
        accepted: Whether the target took that node.
    """
    _check_lengths(depths, accepted, "acceptance_by_position")
    if len(depths) == 0:
        return []
    depth = np.asarray(depths, np.int64)
    if depth.min() < 1:
        raise TascadeError(
            "depth of a draft node out of range", got=int(depth.min()), wanted="1 or more"
        )
    drafted = np.bincount(depth)[1:]
    taken = np.bincount(depth, weights=np.asarray(accepted, np.float64))[1:]
    gap = int(np.argmin(drafted > 0)) if (drafted == 0).any() else len(drafted)
    return [float(share) for share in taken[:gap] / drafted[:gap]]


def calibration(
    predicted: Sequence[float], realised: Sequence[bool] | Sequence[float], bins: int = 10
) -> dict[str, Any]:
    """The ``calibration`` object of a bench result: ``ece`` and the ``bins`` behind it.

    Args:
        predicted: Probability given to each event, such as the survival of a draft node.
        realised: Whether it happened (or how often, in 0..1).
        bins: Equal-width bins over 0..1; empty ones are left out of the result.
    """
    _check_pairs(predicted, realised, "calibration")
    p, r = _probabilities(predicted), _probabilities(realised)
    if bins < 1:
        raise TascadeError("no bins to calibrate in", got=bins, wanted="1 or more")
    index = np.minimum((p * bins).astype(np.int64), bins - 1)
    count = np.bincount(index, minlength=bins)
    filled = np.flatnonzero(count)
    mean_p = np.bincount(index, weights=p, minlength=bins)[filled] / count[filled]
    mean_r = np.bincount(index, weights=r, minlength=bins)[filled] / count[filled]
    ece = float(np.sum(count[filled] * np.abs(mean_p - mean_r)) / len(p))
    rows = zip(mean_p.tolist(), mean_r.tolist(), count[filled].tolist(), strict=True)
    return {
        "ece": min(ece, 1.0),
        "bins": [
            {"predicted": min(a, 1.0), "realised": min(b, 1.0), "count": n} for a, b, n in rows
        ],
    }


# --- checks -------------------------------------------------------------------------------------


def _check_lengths(left: Sequence[object], right: Sequence[object], name: str) -> None:
    if len(left) != len(right):
        raise TascadeError(
            f"{name} needs two sequences of one length",
            got=f"{len(left)} and {len(right)}",
            wanted="one entry on each side per row",
        )


def _check_pairs(left: Sequence[object], right: Sequence[object], name: str) -> None:
    _check_lengths(left, right, name)
    if len(left) == 0:
        raise TascadeError(f"{name} of nothing", got="no rows", wanted="1 row or more")


def _finite(values: Sequence[float], name: str) -> npt.NDArray[np.float64]:
    array = np.asarray(values, np.float64)
    if array.size == 0 or not np.isfinite(array).all():
        raise TascadeError(
            f"{name} needs finite numbers",
            got="no values" if array.size == 0 else array[~np.isfinite(array)][0],
            wanted="1 finite value or more",
        )
    return array


def _probabilities(values: Sequence[bool] | Sequence[float]) -> npt.NDArray[np.float64]:
    """Values as [N] float64 in 0..1; float32 rounding beyond the ends is clipped."""
    array = np.asarray(values, np.float64)
    wrong = ~((array >= -1e-6) & (array <= 1 + 1e-6))  # true for NaN as well
    if wrong.any():
        raise TascadeError("not a probability", got=array[wrong][0], wanted="a value in 0..1")
    return np.clip(array, 0.0, 1.0)


def titles(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """What each result is called: by its pack or its data, and by its place among several runs."""
    paths = [str(result["pack"] or result["data"]["path"]) for result in results]
    names = [_short_path(path) for path in paths]
    return [
        f"{name}, run {names[: i + 1].count(name)}" if names.count(name) > 1 else name
        for i, name in enumerate(names)
    ]


def _short_path(path: str) -> str:
    """The last two parts of a path or hub id, whichever system wrote it."""
    return "/".join(path.replace("\\", "/").rstrip("/").split("/")[-2:]) or path

"""The format of a bench result: ``schema.json`` beside this file, and a check against it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from datetime import datetime
from functools import cache
from importlib import resources
from typing import Any

import jsonschema

from tascade.errors import TascadeError

SCHEMA_VERSION = 1

_FIX = (
    "compare with tascade/bench/schema.json, or make the result again with `tascade bench --json`"
)


@cache
def load_schema() -> dict[str, Any]:
    """The JSON Schema (2020-12) of a bench result. Callers must not change it."""
    text = resources.files("tascade.bench").joinpath("schema.json").read_text("utf-8")
    schema: dict[str, Any] = json.loads(text)
    return schema


def promise(method: Mapping[str, Any], dtype: str) -> str:
    """What may be said of a method's outputs beside plain decoding's.

    A lossless method is so in float32. In half precision rounding may part two answers: what was
    counted is said then.

    Args:
        method: its entry in a result.
        dtype: of the result.
    """
    said = str(method.get("guarantee", ""))
    if said != "lossless" or dtype == "float32":
        return said
    if "identical" not in method:
        return "same up to rounding"
    same, rows = method["identical"], method["identical"] + method.get("differing", 0)
    return f"{'identical' if same == rows else 'same up to rounding'}, {same} of {rows}"


def validate(result: dict[str, Any]) -> None:
    """Check that ``result`` is a bench result of this version.

    What a schema cannot say (finite numbers, one time per repeat) is held as well.

    Raises:
        TascadeError: Names the first thing that is wrong, and where.
    """
    if not isinstance(result, dict):
        raise _wrong("not a bench result", type(result).__name__, "a JSON object", ())
    if result.get("schema") != SCHEMA_VERSION:
        raise TascadeError(
            "bench result of another format version",
            got=result.get("schema", "no key 'schema'"),
            wanted=f"schema {SCHEMA_VERSION}",
            fix="make the result again with this version of tascade",
        )
    validator = jsonschema.Draft202012Validator(load_schema())
    error = jsonschema.exceptions.best_match(validator.iter_errors(result))
    if error is not None:
        wanted = json.dumps(error.schema) if len(str(error.schema)) < 120 else ""
        raise _wrong(error.message[:300], None, wanted, tuple(error.absolute_path))
    _check_consistent(result)


def _wrong(message: str, got: object, wanted: str, path: tuple[str | int, ...]) -> TascadeError:
    where = ".".join(map(str, path)) or "bench result"
    return TascadeError(message, got=got, wanted=wanted, where=where, fix=_FIX)


def _check_consistent(result: Mapping[str, Any]) -> None:
    """What a JSON Schema cannot say."""
    for path, number in _numbers(result, ()):
        if not math.isfinite(number):
            raise _wrong("not a finite number", number, "a number JSON can hold", path)
    try:
        datetime.fromisoformat(result["created"])
    except (TypeError, ValueError):
        raise _wrong("not a time", result["created"], "ISO 8601", ("created",)) from None
    repeats = len(result["methods"]["plain"]["seconds"])
    for name, method in result["methods"].items():
        at = ("methods", name)
        for key in ("seconds", "prefill_seconds"):
            if key in method and len(method[key]) != repeats:
                raise _wrong(
                    "methods must have equally many repeats",
                    len(method[key]),
                    f"{repeats}, as plain has",
                    (*at, key),
                )
        if method.get("near_ties", 0) > method.get("differing", math.inf):
            raise _wrong(
                "more ties up to rounding than differing outputs",
                method["near_ties"],
                f"at most {method['differing']}: these ties are counted among the differing",
                (*at, "near_ties"),
            )
        ratios = {"speedup": method["speedup"]} if "speedup" in method else {}
        for key, ratio in {**ratios, **method.get("versus", {})}.items():
            if not ratio["low"] <= ratio["median"] <= ratio["high"]:
                raise _wrong("spread out of order", ratio, "low <= median <= high", (*at, key))


def _numbers(
    value: object, path: tuple[str | int, ...]
) -> Iterator[tuple[tuple[str | int, ...], float]]:
    """Every float below ``value``, with its path."""
    if isinstance(value, float):
        yield path, value
    elif isinstance(value, dict):
        for key, child in value.items():
            yield from _numbers(child, (*path, key))
    elif isinstance(value, list):
        for index, child in enumerate(value):
            yield from _numbers(child, (*path, index))

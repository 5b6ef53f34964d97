"""Named values that nobody vouches for: of the right type, finite, and named where they are not."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import reprlib
import typing
from typing import Any

from tascade.errors import ConfigError

_MOST = 2**53


def build(cls: Any, raw: object, section: str) -> Any:
    """A dataclass of such, from nested mappings that nobody vouches for.

    Args:
        cls: the dataclass, which checks its own values.
        raw: what a file says; fields that it does not name have their defaults.
        section: what stands before a field's name in an error, with its dot; empty at the top.

    Raises:
        ConfigError: an unknown key, or what the dataclass refuses.
    """
    place = section.removesuffix(".")
    if not isinstance(raw, dict):
        raise ConfigError(
            "a section is not a mapping", got=shown(raw), wanted="key: value", where=place
        )
    hints, values = _hints(cls), {}
    for key, value in raw.items():
        if key not in hints:
            name = key[:80] if isinstance(key, str) else ""
            near = difflib.get_close_matches(name, list(hints), 1)
            fix = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(hints)}"
            raise ConfigError("unknown key", got=shown(key), where=place, fix=fix)
        nested = dataclasses.is_dataclass(hints[key])
        values[key] = build(hints[key], value, f"{section}{key}.") if nested else value
    return cls(**values)


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def check_types(config: Any, section: str) -> None:
    """Refuse values of a wrong kind: in Python nobody looks at hints, and YAML and JSON have none.

    Numbers are finite and at most 2**53 in size. Whole numbers may stand for floats, and lists for
    tuples, since JSON has no others: what is kept is what the hint says.

    Raises:
        ConfigError: names the field, ``section`` before it.
    """
    kept: Any = type(config)
    for name, kind in _hints(kept).items():
        value = typed(kind, getattr(config, name), section + name)
        object.__setattr__(config, name, value)


def typed(kind: Any, value: Any, where: str) -> Any:
    """The value as its kind (a type, or a tuple of strings) has it.

    Raises:
        ConfigError: another type, or a number that is not finite or far too large.
    """
    if typing.get_origin(kind) is tuple:
        return _strings(value, where)
    # A truth value is a whole number to Python, and not meant so.
    sound = isinstance(value, int | float if kind is float else kind)
    if not sound or (isinstance(value, bool) and kind is not bool):
        raise ConfigError(
            "a value of the wrong type", got=shown(value), wanted=kind.__name__, where=where
        )
    # Nor is "not a number" within; a whole number too large for a float is never made one.
    if kind in (int, float) and not -_MOST <= value <= _MOST:
        raise ConfigError(
            "a number out of range",
            got=shown(value),
            wanted="a finite one, at most 2**53",
            where=where,
        )
    return float(value) if kind is float else value


def shown(value: object) -> str:
    """A value as an error shows it: short however large it is."""
    try:
        text = reprlib.repr(value)
    except ValueError:  # Python prints no whole numbers of thousands of digits
        text = "a huge number"
    return f"{text} ({type(value).__name__})"


def one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    """Refuse a value that is none of these.

    Raises:
        ConfigError: it is not.
    """
    if value not in known:
        fix = "".join(f"write {near}" for near in difflib.get_close_matches(value, known, 1, 0.5))
        wanted = " or ".join(known)
        raise ConfigError(f"unknown {name}", got=value, wanted=wanted, where=name, fix=fix)


def at_least(name: str, value: float, least: int) -> None:
    """Refuse a number below ``least``.

    Raises:
        ConfigError: it is.
    """
    if value < least:
        raise ConfigError(
            f"{name} is out of range", got=value, wanted=f"{least} or more", where=name
        )


def share(name: str, value: float) -> None:
    """Refuse a number that is no share.

    Raises:
        ConfigError: it is below 0 or above 1.
    """
    if not 0.0 <= value <= 1.0:
        raise ConfigError(f"{name} is out of range", got=value, wanted="0 to 1", where=name)


def _strings(value: object, where: str) -> tuple[str, ...]:
    # A string is a sequence of strings too, its letters, and is not meant so.
    if not isinstance(value, list | tuple) or not all(isinstance(part, str) for part in value):
        raise ConfigError(
            "a value of the wrong type",
            got=shown(value),
            wanted="a list of strings",
            where=where,
            fix="write each name as an entry of the list, as in [english, code]",
        )
    return tuple(value)

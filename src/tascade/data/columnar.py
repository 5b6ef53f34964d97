"""Parquet, Arrow and Hub datasets -> raw rows. pyarrow and datasets are imported on use.

Only the columns that hold examples are read, and their values stay plain: nothing is decoded, so
a column that names other files or addresses (images, audio) makes nothing be opened.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from tascade.data.fields import OUTPUT_FIELDS, USUAL, Fields
from tascade.data.formats import FIELDS, SHAPES
from tascade.data.rows import Row, display, unreadable
from tascade.errors import DataError

_BATCH_ROWS = 256
Seen = Callable[[Iterable[str]], None]
"""Told the names of all columns of a source, those that are not read among them."""


def _unseen(names: Iterable[str]) -> None:
    """Nobody asks which columns there are."""


def read_parquet(path: Path, fields: Fields = USUAL, seen: Seen = _unseen) -> Iterator[Row]:
    """The rows of a Parquet file, a batch at a time.

    Args:
        path: of the file.
        fields: which columns hold prompt and answer, where they have names of their own.
        seen: told which columns there are.

    Raises:
        DataError: pyarrow is missing, or the file is not whole Parquet with a column of outputs.
    """
    name = display(path)
    parquet = _needs("pyarrow.parquet", "parquet", name)
    errors = _errors()
    try:
        with parquet.ParquetFile(path) as file:
            there = file.schema_arrow.names
            seen(there)
            batches = file.iter_batches(_BATCH_ROWS, columns=_columns(there, name, fields))
            yield from _arrow_rows(batches, name, fields)
    except errors as error:
        raise unreadable(error, name) from error


def read_arrow(path: Path, fields: Fields = USUAL, seen: Seen = _unseen) -> Iterator[Row]:
    """The rows of one Arrow stream file, as ``datasets.save_to_disk`` writes them.

    Its arguments are those of :func:`read_parquet`.

    Raises:
        DataError: pyarrow is missing, or the file is not a whole Arrow stream.
    """
    name = display(path)
    arrow = _needs("pyarrow", "parquet", name)
    errors = _errors()
    try:
        with arrow.memory_map(os.fspath(path)) as file, arrow.ipc.open_stream(file) as stream:
            yield from _arrow_rows(_checked(stream), name, fields, seen)
    except errors as error:
        raise unreadable(error, name) from error


def read_hub(name: str, split: str, fields: Fields = USUAL, seen: Seen = _unseen) -> Iterator[Row]:
    """The rows of a Hugging Face dataset ``owner/name`` or ``owner/name:config``, streamed.

    For ``fields`` and ``seen`` see :func:`read_parquet`.

    Raises:
        DataError: ``datasets`` is missing, or the dataset cannot be opened or read on.
    """
    datasets = _needs("datasets", "datasets", name)
    path, _, config = name.partition(":")
    old = int(datasets.__version__.partition(".")[0]) < 4  # later versions run no remote code
    options = {"trust_remote_code": False} if old else {}
    try:
        stream = datasets.load_dataset(path, config or None, split=split, streaming=True, **options)
        batches = stream.with_format("arrow").iter(batch_size=_BATCH_ROWS)
        yield from _arrow_rows(batches, f"{name} ({split})", fields, seen)
    except DataError:
        raise
    except Exception as error:  # the hub client raises many kinds
        reason = str(error).encode("utf-8", "backslashreplace").decode()
        raise DataError(
            f"the Hugging Face dataset cannot be read (split {split!r})",
            got=f"{type(error).__name__}: {reason}",
            wanted="a path that exists, or a dataset of the Hub that can be reached",
            where=name,
            fix="check the name, the split and the network; or download it and name its folder",
        ) from error


def _arrow_rows(
    batches: Iterable[Any], name: str, fields: Fields, seen: Seen = _unseen
) -> Iterator[Row]:
    """The rows of Arrow record batches or tables, counted from 1."""
    number = 0
    for whole in batches:
        seen(whole.schema.names)
        batch = whole.select(_columns(whole.schema.names, name, fields))
        for start in range(0, batch.num_rows, _BATCH_ROWS):
            part = batch.slice(start, _BATCH_ROWS)
            for row in _plain(part):
                number += 1
                where = f"{name}:row {number}"
                yield unreadable(row, where) if isinstance(row, Exception) else (where, row)


def _plain(batch: Any) -> Iterator[object]:
    """The rows of a batch as dicts; an exception stands for a row that cannot be one."""
    try:
        yield from batch.to_pylist()
        return
    except (ValueError, OverflowError):  # bytes that are not UTF-8, dates out of range
        pass
    for n in range(batch.num_rows):
        try:
            yield batch.slice(n, 1).to_pylist()[0]
        except (ValueError, OverflowError) as error:
            yield error


def _checked(batches: Iterable[Any]) -> Iterator[Any]:
    """Arrow trusts the offsets in a stream; a file from elsewhere may lie about them."""
    for batch in batches:
        batch.validate(full=True)
        yield batch


def _columns(names: list[str], where: str, fields: Fields) -> list[str]:
    """Those of ``names`` that are read."""
    fields.check(names, where)
    columns = [name for name in names if name in FIELDS or name in fields.names]
    twice = len(set(columns)) != len(columns)
    held = {"messages", "conversations", *OUTPUT_FIELDS, fields.completion}
    if twice or not held.intersection(columns):
        raise DataError(
            "two columns have the same name" if twice else "no column holds outputs",
            got="columns " + ", ".join(repr(name[:40]) for name in names[:12]),
            wanted=SHAPES,
            where=where,
            fix="rename the columns, or name them (--prompt-field, --completion-field)",
        )
    return columns


def _errors() -> tuple[type[Exception], ...]:
    """What pyarrow raises on a file that is not what it should be."""
    arrow = importlib.import_module("pyarrow")
    return (arrow.ArrowException, OSError, ValueError, KeyError, IndexError, TypeError)


def _needs(module: str, extra: str, where: str) -> Any:
    """Import ``module``, or say which extra brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DataError(
            f"reading this needs {module.partition('.')[0]}, which is not installed",
            got=str(error),
            where=where,
            fix=f"pip install tascade[{extra}]",
        ) from error

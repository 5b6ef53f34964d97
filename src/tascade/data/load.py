"""Task data from wherever it lies -> examples, one at a time."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tascade.config import DataConfig
from tascade.core import Example
from tascade.data.columnar import Seen, read_arrow, read_hub, read_parquet
from tascade.data.fields import USUAL, Fields
from tascade.data.formats import describe, read_record
from tascade.data.report import LoadReport, refuse_none
from tascade.data.rows import Row, display, read_csv, read_jsonl, suffix_of, unreadable
from tascade.data.sources import Located, locate
from tascade.errors import ConfigError, DataError

_LONGEST_NAME = 4096
_FIRST_ROWS = 100

DataSource = str | os.PathLike[str] | Iterable[object]
"""A path, a Hub dataset's name, or rows: mappings, ``(prompt, completion)``, outputs, Examples."""


def load_examples(
    source: DataSource,
    *,
    on_error: str = "raise",
    split: str = "train",
    fields: Fields = USUAL,
    report: LoadReport | None = None,
) -> Iterator[Example]:
    """Read task data, one example at a time; no file is ever held whole.

    The source is found when this is called, and read as the examples are taken.

    Args:
        source: a ``.jsonl``, ``.ndjson``, ``.csv``, ``.tsv`` (each also ``.gz``) or ``.parquet``
            file; a folder of them or one of ``datasets.save_to_disk``; a Hub dataset
            ``owner/name`` or ``owner/name:config``; or an iterable of mappings,
            ``(prompt, completion)`` tuples, strings (outputs alone) or examples.
        on_error: ``"raise"`` stops at the first row that cannot be used; ``"skip"`` leaves it
            out and notes it in ``report``.
        split: which split of a folder or a Hub dataset; a file has none.
        fields: which fields hold prompt and answer, where they have names of their own.
        report: filled with what was read, kept and skipped.

    Raises:
        DataError: there is no such source; a row cannot be used and ``on_error`` is ``"raise"``;
            or the rest of a file cannot be read, whatever ``on_error`` says.
        ConfigError: ``on_error`` has another value.
    """
    if on_error not in ("raise", "skip"):
        raise ConfigError(
            "unknown way to treat bad rows",
            got=repr(on_error),
            wanted="'raise' or 'skip'",
            where="on_error",
            fix="pass on_error='raise' or on_error='skip'",
        )
    report = LoadReport() if report is None else report
    report.source, rows = _open(source, split, fields, report.see)
    return _examples(rows, on_error == "skip", fields, report)


def check_start(source: str, config: DataConfig, split: str = "train") -> None:
    """Read the first rows of a path, so that what is wrong with them is told before other work.

    A Hub dataset is left for later: it would have to be fetched.

    Args:
        source: a file, a folder or a Hub dataset.
        config: how its rows are read.
        split: as for :func:`load_examples`.

    Raises:
        DataError: see :func:`load_examples`; or the file has no row that can be used.
    """
    if not _is_local(source, split):
        return
    report, fields = LoadReport(), Fields.of(config)
    given: dict[str, Any] = {"on_error": config.on_error, "fields": fields, "report": report}
    rows = load_examples(source, split=split, **given)
    for _ in itertools.islice(rows, min(config.max_examples or _FIRST_ROWS, _FIRST_ROWS)):
        pass
    if report.whole:
        refuse_none(report)


def source_hash(
    source: DataSource,
    *,
    split: str = "train",
    on_error: str = "raise",
    fields: Fields = USUAL,
    report: LoadReport | None = None,
) -> dict[str, str | int]:
    """Which data this is, for provenance: ``{"path", "sha256", "bytes"}``.

    A file is hashed as it stands (``path`` is its base name). A folder: the SHA-256 of the
    ``sha256sum`` listing (hash, two spaces, name in the folder, line feed) of the split's files in
    reading order. Rows in memory and Hub datasets, and files that were not read to their end: of
    their examples as canonical JSON lines.

    Args:
        source: as for :func:`load_examples`; rows must be re-iterable (a list, not a generator).
        split: as for :func:`load_examples`.
        on_error: as for :func:`load_examples`; matters only where examples are hashed.
        fields: as ``on_error``.
        report: of a load of this source, whose examples are not read a second time.

    Raises:
        DataError: as for :func:`load_examples`.
        ConfigError: ``source`` is an iterator, which hashing would use up.
    """
    base = ""
    if isinstance(source, str | os.PathLike) and _is_local(source, split):
        base = display(Path(Path(source).absolute().name))
        if report is None or report.whole:
            return _hash_files(base, locate(source, split))
    if report is None:
        if isinstance(source, Iterator):
            raise ConfigError(
                "hashing would use up the iterator",
                got=type(source).__name__,
                wanted="rows that can be read twice",
                where="source",
                fix="make a list of it first",
            )
        report = LoadReport()
        read = load_examples(source, split=split, on_error=on_error, fields=fields, report=report)
        for _ in read:
            pass
    return {
        "path": base or report.source,
        "sha256": report.digest.hexdigest(),
        "bytes": report.bytes,
    }


def _is_local(source: str | os.PathLike[str], split: str) -> bool:
    """Whether a named source is files here; otherwise it is a dataset of the Hub."""
    located = locate(source, split)
    return located.root is not None or bool(located.files)


def _examples(
    rows: Iterator[Row], skip: bool, fields: Fields, report: LoadReport
) -> Iterator[Example]:
    for row in rows:
        report.rows_read += 1
        try:
            if isinstance(row, DataError):
                raise row
            example, used = read_record(row[1], row[0], fields)
            if isinstance(row[1], Mapping):
                report.see((name for name, value in row[1].items() if value is not None), used)
        except DataError as error:
            if not skip:
                raise
            report.skip(error)
            continue
        report.keep(example)
        yield example
    report.whole = True


def _open(source: DataSource, split: str, fields: Fields, seen: Seen) -> tuple[str, Iterator[Row]]:
    """The source's name and its raw rows; a source that is none is refused here."""
    if isinstance(source, str | os.PathLike):
        located = locate(source, split)
        if not located.files and located.root is None:
            return located.name, read_hub(located.name, split, fields, seen)
        rows = (_read_file(path, fields, seen) for path in located.files)
        return located.name, itertools.chain.from_iterable(rows)
    if isinstance(source, io.IOBase):
        raise DataError(
            "an open file is not a source of rows: its lines would be taken for outputs",
            got=type(source).__name__,
            wanted="the file's path",
            where="data",
            fix=f"pass {getattr(source, 'name', 'the path')!r}",
        )
    if hasattr(source, "itertuples") and hasattr(source, "columns"):
        return "memory", _memory_rows(_frame_rows(source))
    if hasattr(source, "to_batches") and hasattr(source, "column_names"):
        batches = (batch.to_pylist() for batch in source.to_batches())
        return "memory", _memory_rows(itertools.chain.from_iterable(batches))
    if isinstance(source, Mapping | bytes | bytearray | Example) or not isinstance(
        source, Iterable
    ):
        raise DataError(
            "this is not a source of rows",
            got=describe(source),
            wanted="a path, a Hub dataset 'owner/name', or an iterable of rows",
            where="data",
            fix="choose one split of a dataset dict (data['train']); put a single row in a list",
        )
    return "memory", _memory_rows(source)


def _frame_rows(frame: Any) -> Iterator[dict[str, Any]]:
    """The rows of a DataFrame; what is missing in it (NaN) is null."""
    names = [str(name) for name in frame.columns]
    for values in frame.itertuples(index=False, name=None):
        yield {n: None if v is None or v != v else v for n, v in zip(names, values, strict=True)}


def _check_text(text: str, where: str) -> None:
    """Refuse a string that is no output but a row written as JSON, or a file's name.

    Raises:
        DataError: with what to pass instead.
    """
    found = ""
    if text.lstrip().startswith("{"):
        with contextlib.suppress(ValueError, RecursionError):
            row = json.loads(text)
            if isinstance(row, dict) and {"prompt", "completion", "messages"} & {*row}:
                found = "a row written as JSON"
    elif len(text) < _LONGEST_NAME and suffix_of(Path(text)) and "\n" not in text:
        with contextlib.suppress(OSError, ValueError):
            found = "a file's name" * Path(text).is_file()
    if found:
        raise DataError(
            f"this string is {found}, and would be taken for an output",
            got=describe(text),
            wanted="outputs, mappings, or the path of one file or folder",
            where=where,
            fix="parse the rows (json.loads), or pass one path, or a folder of the files",
        )


def _memory_rows(source: Iterable[object]) -> Iterator[Row]:
    """Rows given as objects, in the terms of :func:`to_example`."""
    for number, row in enumerate(source):
        where = f"examples[{number}]"
        if isinstance(row, Example):
            record = {"prompt": row.prompt, "completion": row.completion}
            yield row.where or where, record | ({"id": row.id} if row.id else {})
        elif isinstance(row, str):
            try:
                _check_text(row, where)
            except DataError as error:
                yield error
                continue
            yield where, {"completion": row}
        elif isinstance(row, tuple) and hasattr(row, "_asdict"):  # by its names, not its order
            yield where, row._asdict()
        elif isinstance(row, tuple) and len(row) == 2:
            yield where, {"prompt": row[0], "completion": row[1]}
        elif isinstance(row, Mapping):
            yield where, row
        else:
            yield DataError(
                "this is not a row",
                got=describe(row),
                wanted="a mapping, a (prompt, completion) tuple, a string or an Example",
                where=where,
                fix="write it as {'prompt': ..., 'completion': ...}",
            )


def _read_file(path: Path, fields: Fields, seen: Seen) -> Iterator[Row]:
    """The rows of one data file, by its suffix."""
    suffix, name = suffix_of(path), display(path)
    if suffix == ".parquet":
        yield from read_parquet(path, fields, seen)
        return
    if not suffix:  # only datasets.save_to_disk has such files
        yield from read_arrow(path, fields, seen)
        return
    try:
        with gzip.open(path, "rb") if suffix.endswith(".gz") else path.open("rb") as stream:
            if suffix.startswith((".csv", ".tsv")):
                yield from read_csv(
                    stream, name, "\t" if suffix.startswith(".tsv") else ",", fields
                )
            else:
                yield from read_jsonl(stream, name)
    except OSError as error:
        raise unreadable(error, name) from error


def _hash_files(base: str, located: Located) -> dict[str, str | int]:
    """Of a file, or of all that a folder was found to hold."""
    if located.root is None:
        sha256, size = _hash_file(located.files[0])
        return {"path": base, "sha256": sha256, "bytes": size}
    digest, total = hashlib.sha256(), 0
    for path in located.files:
        sha256, size = _hash_file(path)
        digest.update(f"{sha256}  {display(path.relative_to(located.root))}\n".encode())
        total += size
    return {"path": base, "sha256": digest.hexdigest(), "bytes": total}


def _hash_file(path: Path) -> tuple[str, int]:
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256")
            return digest.hexdigest(), file.tell()
    except OSError as error:
        raise unreadable(error, display(path)) from error

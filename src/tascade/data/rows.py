"""JSONL and CSV -> raw rows, streaming: a file is never held whole, and a line has a bound.

Each reader yields ``(where, record)``, or a :class:`DataError` for one row that cannot be read when
the next row can: the caller decides to raise it or to skip it. What leaves no way to find the next
row (a damaged file, an unclosed quote) is raised.
"""

from __future__ import annotations

import codecs
import csv
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from tascade.data.fields import OUTPUT_FIELDS, USUAL, Fields
from tascade.data.formats import SHAPES, describe
from tascade.errors import DataError

MAX_LINE_BYTES = 64 * 2**20
"""Longest line of JSONL and longest record of CSV, in bytes after decompression."""

TEXT_SUFFIXES = (".jsonl", ".ndjson", ".csv", ".tsv")
SUFFIXES = (*TEXT_SUFFIXES, *(s + ".gz" for s in TEXT_SUFFIXES), ".parquet")
"""How the names of the data files that can be read end."""

Row = tuple[str, object] | DataError


class ByteLines(Protocol):
    """A binary stream that can be read by line: a file, a gzip file."""

    def readline(self, size: int, /) -> bytes:
        """At most ``size`` bytes, up to and with the next line feed."""
        ...


class Line(NamedTuple):
    """One line: its number from 1, the byte offset of its start, its bytes, line feed included.

    ``too_long``: it passed the bound, and ``data`` is only its beginning.
    """

    number: int
    offset: int
    data: bytes
    too_long: bool = False


def suffix_of(path: Path) -> str:
    """The suffix in :data:`SUFFIXES` that the file's name ends in, or ``""``."""
    name = path.name.lower()
    return next((s for s in SUFFIXES if name.endswith(s)), "")


def display(path: Path) -> str:
    """The path as text that can be printed, even where the file system's name is not UTF-8."""
    return os.fspath(path).encode("utf-8", "backslashreplace").decode()


def unreadable(error: Exception, where: str) -> DataError:
    """The refusal of a file that cannot be opened or read on."""
    reason = str(error).encode("utf-8", "backslashreplace").decode()
    return DataError(
        "the file cannot be read",
        got=f"{type(error).__name__}: {reason}",
        wanted="a whole, readable file",
        where=where,
        fix="check the file's permissions, and write or download it again if it is damaged",
    )


def lines(stream: ByteLines, name: str) -> Iterator[Line]:
    """Split at line feeds, keeping at most ``MAX_LINE_BYTES + 1`` bytes of a line in memory."""
    number = offset = 0
    while True:
        try:
            data = stream.readline(MAX_LINE_BYTES + 1)
            if not data:
                return
            number += 1
            too_long = len(data) > MAX_LINE_BYTES and not data.endswith(b"\n")
            if number == 1 and data.startswith(codecs.BOM_UTF8):
                data, offset = data[3:], 3
            yield Line(number, offset, data, too_long)
            offset += len(data)
            while too_long and data and not data.endswith(b"\n"):
                data = stream.readline(2**20)
                offset += len(data)
        except (OSError, EOFError, zlib.error) as error:
            raise unreadable(error, f"{name}: after line {number}") from error


def read_jsonl(stream: ByteLines, name: str) -> Iterator[Row]:
    """One JSON object a line. Blank lines are accepted at the end only."""
    blank = 0
    for line in lines(stream, name):
        if not line.too_long and not line.data.strip():
            blank += 1
            continue
        yield from _blank_lines(name, line.number - blank, blank)
        blank = 0
        yield _parse_json(line, f"{name}:{line.number}")


def _parse_json(line: Line, where: str) -> Row:
    if line.too_long:
        return _too_long(where, "line")
    cut = not line.data.endswith(b"\n")
    try:
        record = json.loads(line.data.decode(), object_pairs_hook=_unique)
    except UnicodeDecodeError as error:
        if cut and error.reason == "unexpected end of data":
            return _truncated(str(error), where)
        return _not_utf8(line.offset + error.start, line.data[error.start], where)
    except RecursionError:
        return DataError(
            "the JSON is nested too deeply",
            wanted="an object of a few levels",
            where=where,
            fix="flatten the row, or drop the field that nests",
        )
    except json.JSONDecodeError as error:
        return _truncated(str(error), where) if cut else _not_json(str(error), where)
    except ValueError as error:  # a repeated key, an endless number
        return _not_json(str(error), where)
    if not isinstance(record, dict):
        return DataError(
            "the line is JSON, but not an object",
            got=describe(record),
            wanted=f"an object with {SHAPES}",
            where=where,
            fix="write one {...} a line; a JSON array has to be split into lines",
        )
    return where, record


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """An object without repeated keys: which of the two values was meant cannot be known."""
    record = dict(pairs)
    if len(record) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {key[:40]!r} appears twice in one object")
            seen.add(key)
    return record


def _not_json(reason: str, where: str) -> DataError:
    return DataError(
        "not valid JSON",
        got=reason,
        wanted="one JSON object a line",
        where=where,
        fix="write each row with a JSON writer, on a line of its own; --on-error skip goes on "
        "without the bad ones",
    )


def _truncated(reason: str, where: str) -> DataError:
    return DataError(
        "the file looks truncated: its last line is cut off",
        got=reason,
        wanted="one JSON object a line, and a line feed at the end",
        where=where,
        fix="write or copy the file again, or delete its last line",
    )


def _blank_lines(name: str, first: int, count: int) -> Iterator[DataError]:
    for number in range(first, first + count):
        yield DataError(
            "a blank line stands between rows",
            wanted="a row (blank lines are accepted at the end of the file only)",
            where=f"{name}:{number}",
            fix="delete the line",
        )


def _too_long(where: str, unit: str) -> DataError:
    return DataError(
        f"the {unit} is too long",
        got=f"more than {MAX_LINE_BYTES} bytes",
        wanted=f"at most {MAX_LINE_BYTES} bytes",
        where=where,
        fix="check that rows end in line feeds and that every quote is closed",
    )


def _not_utf8(offset: int, byte: int, where: str) -> DataError:
    return DataError(
        f"not valid UTF-8 at byte {offset} of the file",
        got=f"byte 0x{byte:02x}",
        wanted="UTF-8 text",
        where=where,
        fix="save the file as UTF-8, for instance with `iconv -t UTF-8`",
    )


class _CsvLines:
    """Feeds ``csv.reader`` and remembers what was wrong with the bytes of the current record.

    Bad bytes are passed on as lone surrogates, so the record ends where it should, and the
    record is refused once it is complete.
    """

    def __init__(self, stream: ByteLines, name: str) -> None:
        self._lines = lines(stream, name)
        self._name = name
        self.last = 0
        self.ended = False
        self.begin()

    def begin(self) -> None:
        """Start a record: the next line is its first."""
        self.where, self._bytes = "", 0
        self.problem: DataError | None = None

    def __iter__(self) -> _CsvLines:
        return self

    def __next__(self) -> str:
        line = next(self._lines, None)
        if line is None:
            self.ended = True
            raise StopIteration
        self.last = line.number
        self.where = self.where or f"{self._name}:{line.number}"
        self._bytes += len(line.data)
        if line.too_long or self._bytes > MAX_LINE_BYTES + 1:
            raise _too_long(self.where, "record")
        here = f"{self._name}:{line.number}"
        text = line.data.decode(errors="surrogateescape")
        self.problem = self.problem or _bad_bytes(line, text, here)
        return text


def _bad_bytes(line: Line, text: str, where: str) -> DataError | None:
    if not text.isascii():
        try:
            line.data.decode()
        except UnicodeDecodeError as error:
            return _not_utf8(line.offset + error.start, line.data[error.start], where)
    if "\0" in text:
        return DataError(
            f"a NUL byte at byte {line.offset + line.data.index(0)} of the file",
            wanted="text",
            where=where,
            fix="save the file as UTF-8 (UTF-16 is full of NUL bytes), or remove the byte",
        )
    return None


def read_csv(stream: ByteLines, name: str, delimiter: str, names: Fields = USUAL) -> Iterator[Row]:
    """A header and one record a row, quoted as spreadsheets do (RFC 4180).

    Raises:
        DataError: no usable header, one without the columns of ``names``, an unclosed quote, or a
            record over the bound.
    """
    feed = _CsvLines(stream, name)
    reader = csv.reader(feed, delimiter=delimiter, strict=True)
    header: list[str] = []
    blank = 0
    while True:
        record = _csv_record(reader, feed)
        if record is None:
            break
        if record == []:
            blank += 1
            continue
        if not header:
            header = _csv_header(record, feed, blank, names)
            blank = 0
            continue
        first = int(feed.where.rpartition(":")[2])
        yield from _blank_lines(name, first - blank, blank)
        blank = 0
        if isinstance(record, DataError):
            yield record
        elif len(record) != len(header):
            yield DataError(
                "the row has another number of fields than the header",
                got=f"{len(record)} fields",
                wanted=f"{len(header)} fields: " + ", ".join(map(repr, header))[:200],
                where=feed.where,
                fix=f"put fields that hold {delimiter!r}, quotes or line feeds in double quotes",
            )
        else:
            yield feed.where, dict(zip(header, record, strict=True))
    if not header:
        raise _bad_header("the file is empty", "nothing", f"{name}:1")


def _csv_record(reader: Any, feed: _CsvLines) -> list[str] | DataError | None:
    """The next record; an error if it is broken; None at the end of the file."""
    feed.begin()
    previous = csv.field_size_limit(MAX_LINE_BYTES + 1)
    try:
        record: list[str] | None = next(reader, None)
    except csv.Error as error:
        if feed.ended:
            raise DataError(
                f"a quote opened here is not closed by the end of the file (line {feed.last})",
                wanted='a closing " before the end of the file',
                where=feed.where,
                fix="close the quote, or write the file again if it is truncated",
            ) from error
        return feed.problem or DataError(
            "not valid CSV",
            got=str(error),
            wanted='fields in double quotes, with quotes inside them doubled ("")',
            where=feed.where,
            fix="write the file with a CSV writer",
        )
    finally:
        csv.field_size_limit(previous)
    return feed.problem or record


def _csv_header(
    record: list[str] | DataError, feed: _CsvLines, blank: int, fields: Fields
) -> list[str]:
    if isinstance(record, DataError):
        raise record
    names = ", ".join(repr(cell[:40]) for cell in record[:12])
    if blank:
        raise _bad_header("a blank line comes before the header", "a blank line", feed.where)
    if len(record) == 1 and ";" in record[0]:
        raise _bad_header("the columns are separated by semicolons", names, feed.where)
    if len(set(record)) != len(record):
        raise _bad_header("two columns have the same name", names, feed.where)
    fields.check(record, feed.where)
    if not fields.completion and not set(record).intersection(OUTPUT_FIELDS):
        raise _bad_header("the header names no column that holds outputs", names, feed.where)
    return record


def _bad_header(message: str, got: str, where: str) -> DataError:
    return DataError(
        message,
        got=got,
        wanted="a first line that names the columns: 'prompt' and 'completion', or "
        "'completion', 'output' or 'text' alone",
        where=where,
        fix="add the header, rename its columns or name them (--prompt-field, --completion-field), "
        "or save the file with commas between them",
    )

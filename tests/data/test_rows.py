"""Data files through ``load_examples``: every format, every bound, every refusal with its place."""

from __future__ import annotations

import csv
import gzip
import json
import os
import sys
from pathlib import Path

import pytest
from data_rows import GOOD, ROWS, as_csv, jsonl, plain, refusal, write_parquet, written

from tascade.data import rows as rows_module
from tascade.data.load import LoadReport, load_examples


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.jsonl", jsonl(ROWS)),
        ("t.ndjson", jsonl(ROWS)),
        ("T.JSONL", jsonl(ROWS)),
        ("t.jsonl", b"\xef\xbb\xbf" + jsonl(ROWS)),
        ("t.jsonl", jsonl(ROWS).replace(b"}\n", b"}\r\n")),
        ("t.jsonl", jsonl(ROWS).rstrip(b"\n")),
        ("t.jsonl", jsonl(ROWS) + b"\n  \n\r\n"),
        ("t.jsonl.gz", gzip.compress(jsonl(ROWS))),
        ("t.csv", as_csv(ROWS)),
        ("t.csv", b"\xef\xbb\xbf" + as_csv(ROWS)),
        ("t.csv", as_csv(ROWS, quoting=csv.QUOTE_ALL, lineterminator="\n")),
        ("t.csv", as_csv(ROWS) + b"\r\n\n"),
        ("t.csv.gz", gzip.compress(as_csv(ROWS))),
        ("t.tsv", as_csv(ROWS, delimiter="\t")),
        ("t.tsv.gz", gzip.compress(as_csv(ROWS, delimiter="\t"))),
    ],
)
def test_each_text_format_gives_the_same_examples(
    tmp_path: Path, name: str, content: bytes
) -> None:
    path = written(tmp_path, name, content)
    assert plain(load_examples(path)) == ROWS
    assert plain(load_examples(str(path))) == ROWS


def test_parquet_gives_the_same_examples_and_reads_no_other_column(tmp_path: Path) -> None:
    write_parquet(tmp_path / "t.parquet", [{**row, "extra": [1, 2]} for row in ROWS] * 200)
    examples = list(load_examples(tmp_path / "t.parquet"))
    assert plain(iter(examples)) == ROWS * 200
    assert examples[599].where == f"{tmp_path / 't.parquet'}:row 600"


def test_parquet_messages_lose_the_nulls_arrow_adds(tmp_path: Path) -> None:
    asked, answered = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    named = {"role": "user", "name": "Bo", "content": "q"}
    records = [{"messages": [asked, answered]}, {"messages": [named, answered]}]
    write_parquet(tmp_path / "t.parquet", records)
    assert [e.prompt for e in load_examples(tmp_path / "t.parquet")] == [(asked,), (named,)]


def test_where_counts_the_lines_of_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, "t.jsonl", jsonl(ROWS))
    assert [e.where for e in load_examples(path)] == [f"{path}:{n}" for n in (1, 2, 3)]
    path = written(tmp_path, "t.csv", as_csv(ROWS))  # the second row stands on several lines
    assert [e.where for e in load_examples(path)] == [f"{path}:{n}" for n in (2, 3, 6)]


def test_an_empty_jsonl_file_holds_no_examples(tmp_path: Path) -> None:
    report = LoadReport()
    assert list(load_examples(written(tmp_path, "t.jsonl", b""), report=report)) == []
    assert report.rows_read == 0


BAD_JSONL = [
    # content, line, words of the message, what it got
    (GOOD + b'{"completion": "ab', 2, "truncated", "Unterminated"),
    (GOOD + '{"completion": "é'.encode()[:-1], 2, "truncated", "unexpected end"),
    (GOOD + b'{"completion": }\n', 2, "not valid JSON", "Expecting value"),
    (GOOD + b"\xff" + GOOD, 2, f"byte {len(GOOD)} of the file", "0xff"),
    (b"\xef\xbb\xbf" + GOOD + b'{"a\xc3"}\n', 2, f"byte {3 + len(GOOD) + 3} of", "0xc3"),
    (GOOD.decode().encode("utf-16"), 1, "byte 0 of the file", "0xff"),
    (b'["completion"]\n', 1, "not an object", "list of 1"),
    (b'"completion"', 1, "not an object", "str 'completion'"),
    (b"null\n", 1, "not an object", "null"),
    (GOOD + b"\n\n" + GOOD, 2, "blank line", ""),
    (b"\n" + GOOD, 1, "blank line", ""),
    (b"[" * 200_000 + b"\n", 1, "nested too deeply", ""),
    (b'{"a":' * 200_000, 1, "nested too deeply", ""),
    (b'{"a": ' + b"1" * 5000 + b"}", 1, "not valid JSON", "4300 digits"),
    (b'{"completion": "x", "completion": "y"}\n', 1, "not valid JSON", "'completion' appears"),
    (b'{"completion": "\\ud83d"}\n', 1, "surrogate", "U+D83D"),
    (GOOD + GOOD + b'{"completion": NaN}\n', 3, "must be text", "float"),
]


@pytest.mark.parametrize(("content", "line", "message", "got"), BAD_JSONL)
def test_a_bad_jsonl_line_is_refused_with_its_place(
    tmp_path: Path, content: bytes, line: int, message: str, got: str
) -> None:
    path = written(tmp_path, "t.jsonl", content)
    error = refusal(path)
    assert error.where.split(": ")[0] == f"{path}:{line}"
    assert message in error.message
    assert got in str(error.got)


def test_nan_in_a_field_that_is_not_read_is_let_be(tmp_path: Path) -> None:
    path = written(tmp_path, "t.jsonl", b'{"completion": "x", "score": NaN}\n')
    assert [e.completion for e in load_examples(path)] == ["x"]


BAD_CSV = [
    (b"", 1, "the file is empty", "nothing"),
    (b"\n\n", 1, "the file is empty", "nothing"),
    (b"question,answer\nx,y\n", 1, "names no column", "'question', 'answer'"),
    (b"prompt,prompt,completion\n", 1, "same name", "'prompt'"),
    (b"\ncompletion\nx\n", 2, "before the header", "blank"),
    (b"compl\xff\nx\n", 1, "byte 5 of the file", "0xff"),
    (b"prompt,completion\na,b\nc\n", 3, "another number of fields", "1 fields"),
    (b"prompt,completion\na,b,c\n", 2, "another number of fields", "3 fields"),
    (b"prompt,completion\na,b\n\n\nc,d\n", 3, "blank line", ""),
    (b"prompt,completion\na,\n", 2, "completion is empty", "''"),
    (b'prompt,completion\na,b\n"c,d\ne,f\n', 3, "not closed by the end", ""),
    (b'prompt,completion\n"a"b,c\n', 2, "not valid CSV", "expected"),
    (b"prompt,completion\ra,b\r", 1, "not valid CSV", "new-line"),
    (b"prompt,completion\na,\xe9t\xe9\n", 2, "byte 20 of the file", "0xe9"),
    (b"prompt,completion\na,b\x00\n", 2, "NUL byte at byte 21", ""),
    ("prompt,completion\na,b\n".encode("utf-16-le"), 1, "NUL byte at byte 1", ""),
]


@pytest.mark.parametrize(("content", "line", "message", "got"), BAD_CSV)
def test_a_bad_csv_row_is_refused_with_its_place(
    tmp_path: Path, content: bytes, line: int, message: str, got: str
) -> None:
    path = written(tmp_path, "t.csv", content)
    error = refusal(path)
    assert error.where.split(": ")[0] == f"{path}:{line}"
    assert message in error.message
    assert got in str(error.got)


def test_csv_fields_may_be_long_and_the_limit_of_the_process_is_left_alone(tmp_path: Path) -> None:
    limit = csv.field_size_limit()
    path = written(tmp_path, "t.csv", as_csv([{"completion": "x" * 1_000_000}] * 2))
    examples = load_examples(path)
    assert len(next(examples).completion) == 1_000_000
    assert csv.field_size_limit() == limit
    assert len(list(examples)) == 1


@pytest.mark.parametrize("name", ["t.jsonl", "t.csv", "t.jsonl.gz"])
def test_an_endless_line_is_refused_without_reading_it(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    head = b"completion\n" if name == "t.csv" else GOOD
    if name.endswith(".gz"):
        with gzip.open(path, "wb", compresslevel=1) as file:
            file.write(head)
            for _ in range(80):
                file.write(bytes(2**20))
    else:
        path.write_bytes(head)
        os.truncate(path, 2**36)  # 64 GiB of nothing: read whole, it would not fit
    error = refusal(path)
    assert error.where == f"{path}:2"
    assert "too long" in error.message


@pytest.fixture
def short_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_module, "MAX_LINE_BYTES", 40)


@pytest.mark.usefixtures("short_lines")
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_the_bound_of_a_line_is_exact_and_the_next_line_is_found(
    tmp_path: Path, bom: bytes
) -> None:
    at_bound = json.dumps({"completion": "x" * (40 - 18 - len(bom))}).encode()
    assert len(bom + at_bound) == 40
    over = json.dumps({"completion": "x" * 300}).encode()
    path = written(tmp_path, "t.jsonl", bom + at_bound + b"\n" + over + b"\n" + GOOD)
    report = LoadReport()
    kept = list(load_examples(path, on_error="skip", report=report))
    assert [e.where for e in kept] == [f"{path}:1", f"{path}:3"]
    assert [where for where, _ in report.skipped_rows] == [f"{path}:2"]
    longer_first = written(tmp_path, "u.jsonl", bom + b" " + at_bound + b"\n" + GOOD)
    assert refusal(longer_first).where == f"{longer_first}:1"


@pytest.mark.usefixtures("short_lines")
def test_a_long_line_is_not_taken_for_a_blank_one(tmp_path: Path) -> None:
    path = written(tmp_path, "t.jsonl", GOOD + b" " * 50 + GOOD)
    assert refusal(path).where == f"{path}:2"


@pytest.mark.usefixtures("short_lines")
def test_a_csv_record_over_many_lines_has_the_same_bound(tmp_path: Path) -> None:
    path = written(tmp_path, "t.csv", b"completion\nx\n" + b'"\n' + b'","\n' * 50)
    error = refusal(path, on_error="skip")
    assert error.where == f"{path}:3"
    assert "too long" in error.message


@pytest.mark.parametrize(
    "content",
    [
        gzip.compress(jsonl(ROWS) * 50, mtime=0)[:-20],
        gzip.compress(jsonl(ROWS), mtime=0)[:-8] + b"\0" * 8,
        b"no gzip",
        gzip.compress(jsonl(ROWS), mtime=0)[:12] + b"\xff" * 20,
    ],
)
@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_a_damaged_gzip_file_is_refused_even_when_rows_are_skipped(
    tmp_path: Path, content: bytes, on_error: str
) -> None:
    path = written(tmp_path, "t.jsonl.gz", content)
    error = refusal(path, on_error=on_error)
    assert error.where.startswith(str(path))
    assert "cannot be read" in error.message


def test_a_damaged_parquet_file_is_refused(tmp_path: Path) -> None:
    write_parquet(tmp_path / "good.parquet", ROWS)
    whole = (tmp_path / "good.parquet").read_bytes()
    for content in (b"", b"PAR1", whole[:-10], b"x" * 100, whole[:40] + b"\xff" * 60 + whole[100:]):
        path = written(tmp_path, "t.parquet", content)
        assert refusal(path).where.startswith(str(path))


def test_parquet_columns_and_values_are_checked(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "t.parquet"
    write_parquet(path, [{"question": "x"}])
    assert "'question'" in str(refusal(path).got)
    write_parquet(path, [{"completion": "x"}, {"completion": None}])
    assert refusal(path).where == f"{path}:row 2: completion"
    write_parquet(path, [{"prompt": 1, "completion": "x"}])
    assert refusal(path).where == f"{path}:row 1: prompt"
    two = pa.table([pa.array(["x"]), pa.array(["y"])], names=["completion", "completion"])
    parquet.write_table(two, path)
    assert "same name" in refusal(path).message
    buffers = [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0\3\0\0\0"), pa.py_buffer(b"a\xffb")]
    parquet.write_table(pa.table({"text": pa.Array.from_buffers(pa.string(), 3, buffers)}), path)
    assert refusal(path).where == f"{path}:row 2"
    report = LoadReport()
    kept = load_examples(path, on_error="skip", report=report)
    assert [e.completion for e in kept] == ["a", "b"]
    assert [where for where, _ in report.skipped_rows] == [f"{path}:row 2"]


@pytest.mark.parametrize("module", ["pyarrow", "datasets"])
def test_a_missing_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    for name in [m for m in sys.modules if m.partition(".")[0] == module] + [module]:
        monkeypatch.setitem(sys.modules, name, None)
    if module == "pyarrow":
        error = refusal(written(tmp_path, "t.parquet", b"PAR1"))
        assert error.fix == "pip install tascade[parquet]"
    else:
        error = refusal("nobody-here/no-such-data")
        assert error.fix == "pip install tascade[datasets]"

"""``load_examples`` and ``source_hash``: skipping, rows in memory, streaming, hashes."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from data_rows import GOOD, ROWS, jsonl, refusal, written

from tascade.core import Example
from tascade.data.load import LoadReport, load_examples, source_hash
from tascade.errors import ConfigError, DataError

# --- skipping ------------------------------------------------------------------------------------


def test_skipped_rows_are_counted_and_listed_with_place_and_reason(tmp_path: Path) -> None:
    content = GOOD + b"oops\n" + GOOD + b'{"completion": ""}\n\n\xff\n' + GOOD + b'{"comp'
    path = written(tmp_path, "t.jsonl", content)
    report = LoadReport()
    kept = list(load_examples(path, on_error="skip", report=report))
    assert [e.where for e in kept] == [f"{path}:{n}" for n in (1, 3, 7)]
    places = [f"{path}:2", f"{path}:4: completion", f"{path}:5", f"{path}:6", f"{path}:8"]
    assert [where for where, _ in report.skipped_rows] == places
    reasons = [reason for _, reason in report.skipped_rows]
    words = ["not valid JSON", "empty", "blank line", "UTF-8", "truncated"]
    assert all(word in reason for word, reason in zip(words, reasons, strict=True))
    assert (report.source, report.rows_read, report.rows_kept) == (str(path), 8, 3)
    assert report.skipped == 5


def test_csv_goes_on_after_a_bad_record_and_bad_bytes_do_not_shift_the_next(tmp_path: Path) -> None:
    content = b'prompt,completion\na,b\n"x"y,c\nd\ne,"f\xff\n1,2\n\x00"\ng,h\n'
    path = written(tmp_path, "t.csv", content)
    report = LoadReport()
    kept = list(load_examples(path, on_error="skip", report=report))
    assert [e.prompt for e in kept] == ["a", "g"]
    assert [where for where, _ in report.skipped_rows] == [f"{path}:{n}" for n in (3, 4, 5)]


def test_an_unclosed_quote_is_refused_even_when_rows_are_skipped(tmp_path: Path) -> None:
    path = written(tmp_path, "t.csv", b'completion\n"x\n' + b"y\n" * 100)
    error = refusal(path, on_error="skip")
    assert error.where == f"{path}:2"
    assert "line 102" in error.message


def test_the_list_of_skipped_rows_is_capped_and_the_count_is_exact() -> None:
    report = LoadReport()
    rows: list[object] = ["", "x"] * 1500
    assert len(list(load_examples(rows, on_error="skip", report=report))) == 1500
    assert (report.skipped, report.rows_read, len(report.skipped_rows)) == (1500, 3000, 1000)
    assert report.skipped_rows[-1][0] == "examples[1998]: completion"


@pytest.mark.parametrize("on_error", ["ignore", "", None, True])
def test_another_value_of_on_error_is_refused_at_once(on_error: Any) -> None:
    with pytest.raises(ConfigError, match="'raise' or 'skip'"):
        load_examples(["x"], on_error=on_error)


# --- rows in memory ------------------------------------------------------------------------------


def test_rows_in_memory_of_every_kind() -> None:
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    given_rows = [
        {"prompt": "p", "completion": "c"},
        ("p", "c"),
        (messages[:1], "c"),
        (None, "c"),
        "c",
        {"messages": messages},
        Example("p", "c", where="mine:7", id="i"),
        Example(None, "c"),
    ]
    examples = list(load_examples(given_rows))
    chat = (messages[0],)
    assert [e.prompt for e in examples] == ["p", "p", chat, None, None, chat, "p", None]
    assert examples[6] == given_rows[6]
    assert examples[7].where == "examples[7]"


@pytest.mark.parametrize("row", [3, None, b"x", ["p", "c"], ("p",), ("p", "c", "x")])
def test_a_row_in_memory_that_is_none_is_refused(row: object) -> None:
    error = refusal(["x", row])
    assert error.where == "examples[1]"
    assert error.got


@pytest.mark.parametrize("source", [3, None, b"t.jsonl", {"completion": "x"}, Example("p", "c")])
def test_a_source_that_is_none_is_refused_at_once(source: Any) -> None:
    with pytest.raises(DataError, match="not a source"):
        load_examples(source)


def test_an_example_in_memory_is_checked_too() -> None:
    assert refusal([Example("p", "", where="mine:7")]).where == "mine:7: completion"


def test_an_error_of_the_callers_own_generator_passes_through() -> None:
    def broken() -> Iterator[str]:
        yield "x"
        raise RuntimeError("theirs")

    with pytest.raises(RuntimeError, match="theirs"):
        list(load_examples(broken(), on_error="skip"))


# --- streaming -----------------------------------------------------------------------------------


def test_no_row_is_read_before_it_is_taken() -> None:
    taken = []

    def endless() -> Iterator[str]:
        for number in range(10**9):
            taken.append(number)
            yield f"row {number}"

    examples = load_examples(endless())
    assert taken == []
    assert [next(examples).completion for _ in range(3)] == ["row 0", "row 1", "row 2"]
    assert taken == [0, 1, 2]


@pytest.mark.parametrize("name", ["t.jsonl", "t.csv"])
def test_a_huge_file_is_not_read_past_what_was_taken(tmp_path: Path, name: str) -> None:
    path = written(tmp_path, name, b"completion\nx\n" if name == "t.csv" else GOOD)
    os.truncate(path, 2**36)
    assert next(load_examples(path)).completion == "x"


def test_the_report_counts_what_was_taken_so_far(tmp_path: Path) -> None:
    report = LoadReport()
    examples = load_examples(written(tmp_path, "t.jsonl", jsonl(ROWS)), report=report)
    next(examples)
    assert (report.rows_read, report.rows_kept) == (1, 1)


def test_importing_the_loader_is_light() -> None:
    code = (
        "import sys, tascade.data.load\n"
        "heavy = {'pyarrow', 'datasets', 'torch', 'transformers', 'pandas'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ})


# --- source_hash ---------------------------------------------------------------------------------


def test_a_file_is_hashed_as_it_stands(tmp_path: Path) -> None:
    content = jsonl(ROWS)
    path = written(tmp_path, "t.jsonl", content)
    sha256 = hashlib.sha256(content).hexdigest()
    assert source_hash(path) == {"path": "t.jsonl", "sha256": sha256, "bytes": len(content)}


def test_rows_in_memory_are_hashed_as_examples() -> None:
    one = source_hash([{"prompt": "p", "completion": "é", "extra": 1}])
    assert one == source_hash([("p", "é")]) == source_hash([Example("p", "é", where="x:1")])
    line = '{"completion":"é","id":"","prompt":"p"}\n'.encode()
    sha256 = hashlib.sha256(line).hexdigest()
    assert one == {"path": "memory", "sha256": sha256, "bytes": len(line)}
    assert one["sha256"] != source_hash([("p", "e")])["sha256"]
    assert source_hash(["é", ""], on_error="skip") == source_hash(["é"])
    with pytest.raises(DataError):
        source_hash(["é", ""])


def test_hashing_does_not_use_up_an_iterator() -> None:
    with pytest.raises(ConfigError, match="list"):
        source_hash(iter(["x"]))


def test_hashing_what_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        source_hash(tmp_path / "t.jsonl")

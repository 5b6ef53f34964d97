"""Objects that people pass as data: read as what they are, or refused by name."""

from __future__ import annotations

import collections
import json
from pathlib import Path
from typing import Any

import pytest

from tascade.data.load import load_examples
from tascade.errors import DataError

ROWS = [{"prompt": f"q{i}", "completion": f"answer {i}"} for i in range(3)]
WANTED = [(f"q{i}", f"answer {i}") for i in range(3)]


def read(data: Any) -> list[tuple[Any, str]]:
    return [(row.prompt, row.completion) for row in load_examples(data)]


def test_tables_are_read_by_their_columns() -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(ROWS)
    assert read(frame) == WANTED
    assert read(frame[["completion", "prompt"]]) == WANTED
    assert read(frame[["completion", "prompt"]].itertuples()) == WANTED
    holes = pandas.DataFrame([*ROWS, {"completion": "alone"}])
    assert read(holes) == [*WANTED, (None, "alone")]


def test_arrow_tables_are_read_by_their_columns() -> None:
    pa = pytest.importorskip("pyarrow")
    assert read(pa.Table.from_pylist(ROWS)) == WANTED


def test_named_tuples_go_by_their_names() -> None:
    kind = collections.namedtuple("kind", ["completion", "prompt"])
    assert read([kind(row["completion"], row["prompt"]) for row in ROWS]) == WANTED


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def test_an_open_file_is_refused_with_its_path(file: Path) -> None:
    for mode in ("r", "rb"):
        with file.open(mode) as opened, pytest.raises(DataError, match=r"rows\.jsonl"):
            read(opened)


def test_file_names_and_rows_written_as_json_are_no_outputs(file: Path) -> None:
    for data in ([str(file)], [json.dumps(row) for row in ROWS]):
        with pytest.raises(DataError, match="would be taken for an output"):
            read(data)
    outputs = ['{"name": "f", "arguments": {}}', "notes.txt", "SELECT 1;", "{", "x" * 9000]
    assert read(outputs) == [(None, text) for text in outputs]


def test_a_semicolon_csv_is_called_one(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("prompt;completion\nq;a\n")
    with pytest.raises(DataError, match="semicolon"):
        read(path)

"""What the tests of task data share: a few rows, and ways to write and read them."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tascade.core import Example
from tascade.data.load import load_examples
from tascade.errors import DataError

ROWS = [
    {"id": "a", "prompt": "Translate: dog", "completion": "perro"},
    {"id": "b", "prompt": 'He said "hi",\nthen left.', "completion": "se fue\r\n"},
    {"id": "c", "prompt": "", "completion": "日本語 \U0001f600"},
]
GOOD = b'{"completion": "x"}\n'


def jsonl(records: list[Any]) -> bytes:
    return "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records).encode()


def as_csv(records: list[dict[str, Any]], **options: Any) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(records[0]), **options)
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue().encode()


def write_parquet(path: Path, records: list[dict[str, Any]], **options: Any) -> None:
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pa.Table.from_pylist(records), path, **options)


def written(folder: Path, name: str, content: bytes) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def plain(examples: Iterator[Example]) -> list[dict[str, Any]]:
    return [{"id": e.id, "prompt": e.prompt, "completion": e.completion} for e in examples]


def refusal(source: Any, **options: Any) -> DataError:
    with pytest.raises(DataError) as caught:
        list(load_examples(source, **options))
    assert str(caught.value).encode()
    return caught.value

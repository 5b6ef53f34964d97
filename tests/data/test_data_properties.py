"""Task data under arbitrary bytes, and the round trip of arbitrary rows through every format."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from data_rows import as_csv, jsonl, plain, write_parquet, written
from hypothesis import given, settings
from hypothesis import strategies as st

from tascade.data.load import LoadReport, load_examples
from tascade.errors import DataError


@pytest.fixture(scope="module")
def scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


near_json = st.lists(
    st.sampled_from(
        [b'{"completion":', b'"x"', b"}", b"{", b"\n", b"\r", b",", b"[", b'"', b"\xef"]
    )
    | st.binary(max_size=4),
    max_size=30,
).map(b"".join)
near_csv = st.lists(
    st.sampled_from([b"completion,prompt\n", b'"', b",", b"\n", b"\r\n", b"\0", b"\xff", b"ab"])
    | st.binary(max_size=4),
    max_size=30,
).map(b"".join)


@settings(max_examples=150, deadline=None)
@given(
    content=st.binary(max_size=300) | near_json | near_csv | near_csv.map(b"completion\n".__add__),
    name=st.sampled_from(["t.jsonl", "t.csv", "t.tsv", "t.jsonl.gz", "t.parquet"]),
    on_error=st.sampled_from(["raise", "skip"]),
)
def test_any_bytes_give_sound_examples_or_a_data_error(
    scratch: Path, content: bytes, name: str, on_error: str
) -> None:
    path = written(scratch, name, content)
    report, refused = LoadReport(), None
    try:
        examples = list(load_examples(path, on_error=on_error, report=report))
    except DataError as error:
        refused = error
    if refused is not None:
        assert refused.where.startswith(str(path))
        assert str(refused).encode()
        return
    assert all(e.completion and e.completion.encode() for e in examples)
    assert report.rows_kept == len(examples) == report.rows_read - report.skipped
    assert report.skipped == len(report.skipped_rows)


text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
row_lists = st.lists(
    st.fixed_dictionaries(
        {"id": text, "prompt": text, "completion": text.filter(bool), "note": text}
    ),
    min_size=1,
    max_size=8,
)


@settings(max_examples=80, deadline=None)
@given(records=row_lists)
def test_rows_written_in_any_format_are_the_same_examples(
    scratch: Path, records: list[dict[str, str]]
) -> None:
    wanted = [{k: row[k] for k in ("id", "prompt", "completion")} for row in records]
    assert plain(load_examples(records)) == wanted
    path = written(scratch, "r.jsonl", jsonl(records))
    assert plain(load_examples(path)) == wanted
    path.write_bytes("\n".join(map(json.dumps, records)).encode())
    assert plain(load_examples(path)) == wanted
    write_parquet(scratch / "r.parquet", records)
    assert plain(load_examples(scratch / "r.parquet")) == wanted
    no_nul = [{k: v.replace("\0", "?") for k, v in row.items()} for row in records]
    kept = [{k: row[k] for k in ("id", "prompt", "completion")} for row in no_nul]
    for name, options in [("r.csv", {}), ("r.tsv", {"delimiter": "\t"})]:
        assert plain(load_examples(written(scratch, name, as_csv(no_nul, **options)))) == kept

"""Task data as token ids: read, encoded, a share of it held out, and some rows chosen of many."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, Protocol, TypeVar

from tascade.config import DataConfig, Recipe
from tascade.core import Example, IntArray, Progress, Row
from tascade.data.encode import RowRefusedError, encode_example
from tascade.data.fields import Fields
from tascade.data.load import load_examples, source_hash
from tascade.data.report import LoadReport, refuse_none, tell_not_used
from tascade.errors import DataError

MOST_HELD_OUT = 2000
"""Held-out rows kept, spread over the file; each use takes its own number of these."""
_LISTED_ROWS = 100
_HELD_OUT_SHARE, _HELD_OUT_MOST = 20, 200
_LEAST_STEP = 8
T = TypeVar("T")


class Merges(Protocol):
    """The new tokens of a tuned model (see :class:`tascade.enrich.tokens.merger.Merger`)."""

    def merge(self, ids: IntArray) -> IntArray:
        """Write base ids with the new tokens."""
        ...


@dataclass(slots=True)
class Prepared:
    """Examples as token ids: (prompt or ``None``, answer) pairs.

    ``held_out_of``: how many held-out rows there were, of which ``validation`` was chosen;
    ``own``: where in ``train`` the answers are the model's own.
    """

    train: list[Row] = field(default_factory=list)
    validation: list[Row] = field(default_factory=list)
    reports: list[LoadReport] = field(default_factory=list)
    held_out_of: int = 0
    own: list[int] = field(default_factory=list)

    @property
    def asked(self) -> list[Row]:
        """Rows with prompts to compare with plain decoding on: held-out ones where there are."""
        return [row for row in self.validation if row[0] is not None] or self.train

    def require_held_out(self, where: str) -> None:
        """Refuse to go on without held-out rows.

        Raises:
            DataError: fewer than two.
        """
        if len(self.validation) < 2:
            raise DataError(
                "too few examples to hold any out",
                got=f"{len(self.train)} examples",
                wanted="at least 40, or held-out examples of their own",
                where=where,
                fix="pass held-out examples with --held-out",
            )

    def merge_answers(self, merger: Merges) -> None:
        """Write all answers in the tokens of a tuned model, which says them so."""
        for rows in (self.train, self.validation):
            rows[:] = [(prompt, merger.merge(answer)) for prompt, answer in rows]


def prepare(
    tokenizer: Any,
    ends: Sequence[int],
    data: Any,
    validation: Any,
    recipe: Recipe,
    tell: Progress,
    merger: Merges | None = None,
    size: int | None = None,
    logs: Any = None,
    *,
    least_held_out: int = 0,
) -> Prepared:
    """Load and encode all examples; hold a share out for calibration if there is no other.

    ``merger``: the new tokens of a tuned model, which says its answers in them; ``size``: how many
    token ids the model has rows for; ``logs``: requests with answers that are the model's own,
    which are trained on too and never held out; ``least_held_out``: how many rows to hold out of
    few examples, an eighth of them at most.

    Raises:
        DataError: a row cannot be used, there are none, or none has a prompt to answer. A row that
            the chat template refuses, or that has a token the model has no row for, is skipped
            where bad rows are.
    """
    out = Prepared()

    def encoded(rows: Iterable[Example]) -> Iterator[Row]:
        report = out.reports[-1]
        for row in rows:
            try:
                found = encode_example(tokenizer, row, ends, recipe.chat)
                _check_size(found, size)
            except RowRefusedError as error:
                bad = DataError(
                    error.message,
                    got=error.got,
                    wanted=error.wanted,
                    where=row.where,
                    fix=error.fix,
                )
                if recipe.data.on_error != "skip":
                    raise bad from error
                report.rows_kept -= 1
                report.skip(bad)
                continue
            yield found

    out.train = list(encoded(_examples(data, recipe.data, "train", out.reports, tell)))
    refuse_none(out.reports[0])
    if validation is not None:
        rows = _examples(validation, recipe.data, "validation", out.reports, tell)
        kept, out.held_out_of = thin(rows, MOST_HELD_OUT)
        out.validation = list(encoded(kept))
    else:
        _hold_out(out, least_held_out)
    if logs is not None:
        usual = replace(recipe.data, prompt_field="", completion_field="", prompt_template="")
        rows = _examples(logs, usual, "logs", out.reports, tell)
        first, out.train = len(out.train), [*out.train, *encoded(rows)]
        out.own = list(range(first, len(out.train)))
        refuse_none(out.reports[-1])
    tell_not_used(out.reports)
    if merger is not None:
        out.merge_answers(merger)
    if recipe.spec.own_answers and all(prompt is None for prompt, _ in out.train):
        raise DataError(
            "no prompts to answer",
            got="outputs alone",
            wanted="rows with a prompt",
            where="spec.own_answers",
            fix="add prompts to the examples, or leave --self out",
        )
    return out


def _hold_out(out: Prepared, least: int) -> None:
    """Take a share of the training rows away, spread over all; ``least``: see :func:`prepare`."""
    if len(out.train) < 2 * _HELD_OUT_SHARE:
        return
    step = max(_HELD_OUT_SHARE, len(out.train) // _HELD_OUT_MOST)
    if least:
        step = min(step, max(_LEAST_STEP, len(out.train) // least))
    out.validation = out.train[::step]
    out.train = [row for i, row in enumerate(out.train) if i % step]
    out.held_out_of = len(out.validation)


def _check_size(row: Row, size: int | None) -> None:
    for ids in row:
        if size is not None and ids is not None and len(ids) and int(ids.max()) >= size:
            raise RowRefusedError(
                "the model has no row for a token of this example",
                got=f"token id {int(ids.max())}",
                wanted=f"0 to {size - 1}",
                fix="leave the token out, or model.resize_token_embeddings(len(tokenizer))",
            )


def _examples(
    data: Any, config: DataConfig, split: str, reports: list[LoadReport], tell: Progress
) -> Iterator[Example]:
    report = LoadReport()
    reports.append(report)
    given: dict[str, Any] = {"on_error": config.on_error, "fields": Fields.of(config)}
    rows = load_examples(data, split=split, report=report, **given)
    limit = config.max_examples or None

    def told() -> Iterator[Example]:
        for i, example in enumerate(islice(rows, limit)):
            if i % 256 == 0:
                tell(f"reading {split}", i, limit)
            yield example

    return told()


def describe_sources(
    data: Any, validation: Any, reports: Sequence[LoadReport], logs: Any = None
) -> list[dict[str, Any]]:
    """What each source was, and what was left out of it: for ``pack.json``."""
    out = []
    given = [("train", data), ("validation", validation), ("logs", logs)]
    given = [(role, source) for role, source in given if source is not None]
    for (role, source), report in zip(given, reports, strict=False):
        entry: dict[str, Any] = {"role": role, "rows": report.rows_kept, "skipped": report.skipped}
        entry |= source_hash(source, split=role, report=report)
        if report.skipped:
            entry["skipped_rows"] = [list(row) for row in report.skipped_rows[:_LISTED_ROWS]]
        if report.not_used:
            entry["not_used"] = list(report.not_used)
        out.append(entry)
    return out


def spread(rows: Sequence[T], count: int) -> list[T]:
    """At most ``count`` rows, evenly spaced over the whole sequence."""
    if len(rows) <= count:
        return list(rows)
    return [rows[i * len(rows) // count] for i in range(count)]


def thin(rows: Iterable[T], most: int) -> tuple[list[T], int]:
    """At most ``most`` rows of a stream, spread over the whole of it, and how many it had.

    No more than twice as many are held at any time, however long the stream is.
    """
    kept: list[T] = []
    step, count = 1, 0
    for row in rows:
        if count % step == 0:
            kept.append(row)
        if len(kept) == 2 * most:  # every other one of them, and of those to come
            kept, step = kept[::2], 2 * step
        count += 1
    return spread(kept, most), count

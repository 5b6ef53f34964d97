"""What came of reading task data: rows kept and skipped, and the fields that were not used."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from tascade.core import Example
from tascade.errors import DataError

MAX_SKIPPED_LISTED = 1000
"""How many skipped rows a report lists; the count goes on."""
_MOST_FIELDS = 200
_log = logging.getLogger("tascade.data")


@dataclass(slots=True)
class LoadReport:
    """What a load did; filled while the examples are consumed. Use a new one for each load.

    ``skipped`` counts every skipped row; ``skipped_rows`` lists ``(where, reason)`` of the first
    :data:`MAX_SKIPPED_LISTED`. ``whole``: the source was read to its end; ``digest`` and ``bytes``
    are those of the examples taken, as canonical JSON lines. ``fields``: the names of the fields
    that rows have, and whether prompt or answer of any row were made from it.
    """

    source: str = ""
    rows_read: int = 0
    rows_kept: int = 0
    skipped: int = 0
    skipped_rows: list[tuple[str, str]] = field(default_factory=list)
    whole: bool = False
    digest: Any = field(default_factory=hashlib.sha256, repr=False, compare=False)
    bytes: int = 0
    fields: dict[str, bool] = field(default_factory=dict)

    @property
    def not_used(self) -> tuple[str, ...]:
        """Fields that no prompt or answer was made from, in the order they were met."""
        return tuple(name for name, used in self.fields.items() if not used)

    def see(self, names: Iterable[object], used: Iterable[str] = ()) -> None:
        """Note which fields there are, as far as there is room, and which were used."""
        for name in map(_short, names):
            if len(self.fields) < _MOST_FIELDS:
                self.fields.setdefault(name, False)
        for name in map(_short, used):
            self.fields[name] = True

    def skip(self, error: DataError) -> None:
        """Count a skipped row, and list it while there is room."""
        self.skipped += 1
        if len(self.skipped_rows) < MAX_SKIPPED_LISTED:
            reason = error.message if error.got is None else f"{error.message} (got {error.got})"
            self.skipped_rows.append((error.where, reason))

    def keep(self, example: Example) -> None:
        """Count an example that is handed on."""
        self.rows_kept += 1
        row = {"id": example.id, "prompt": example.prompt, "completion": example.completion}
        text = json.dumps(row, ensure_ascii=False, sort_keys=True, separators=(",", ":")) + "\n"
        line = text.encode("utf-8", "surrogatepass")
        self.digest.update(line)
        self.bytes += len(line)


def _short(name: object) -> str:
    """A field's name as text that can be printed, and not too much of it."""
    return str(name)[:80].encode("utf-8", "backslashreplace").decode()


def refuse_none(report: LoadReport) -> None:
    """Refuse a source that was read and gave no example.

    Raises:
        DataError: with the first row that was skipped, and why.
    """
    if report.rows_kept:
        return
    skipped = [f"; {where}: {reason}" for where, reason in report.skipped_rows[:1]]
    raise DataError(
        "no examples",
        got=f"0 rows, {report.skipped} skipped" + "".join(skipped),
        wanted="at least one",
        where=report.source,
        fix="check the file",
    )


def tell_not_used(reports: Iterable[LoadReport]) -> None:
    """Log, in one line, which fields no source's prompts and answers were made from.

    At level INFO of ``tascade.data``: a command shows it, a program that asks for it sees it.
    """
    found = [name for report in reports for name in report.not_used]
    used = {name for report in reports for name, taken in report.fields.items() if taken}
    names = [name for name in dict.fromkeys(found) if name not in used]
    if names:
        more = f" and {len(names) - 12} more" if len(names) > 12 else ""
        _log.info("not used: %s%s", ", ".join(names[:12]), more)

"""The timed part of a benchmark: methods in turns, which requests, how often, and what it took."""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tascade.bench import unfinished
from tascade.bench.machine import machine_info
from tascade.bench.methods import Method, Request, Skipped, VerifiedNodes
from tascade.core import Generation, Progress
from tascade.data.prepare import spread
from tascade.decode.sampling import SamplingParams
from tascade.errors import ConfigError
from tascade.util.progress import duration, spelt

_log = logging.getLogger("tascade.data")
BASELINE = "plain"
_SLOW = 16
"""The time for this many rows, of all methods, is too little to wait for a whole chunk."""
_NEARLY = 0.95
"""A shortage of time below which nothing is left out."""


@dataclass(frozen=True, slots=True)
class BenchSettings:
    """What all methods share. ``chunk``: requests a method decodes before the next takes over;
    ``minutes``: how long the timed part may take, foretold from the first chunk; 0 for any time;
    ``optional``: methods that are left out where there is no time for a chunk of rows twice.
    """

    params: SamplingParams = field(default_factory=SamplingParams)
    repeats: int = 5
    chunk: int = 4
    minutes: float = 0.0
    optional: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("repeats", "chunk"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"{name} is out of range", got=getattr(self, name), wanted="1 or more"
                )

    def to_json(self) -> dict[str, Any]:
        """The ``settings`` object of the result."""
        p = self.params
        return {
            "max_new_tokens": p.max_new_tokens,
            "temperature": float(p.temperature),
            "top_k": p.top_k,
            "top_p": float(p.top_p),
            "min_p": float(p.min_p),
            "repetition_penalty": float(p.repetition_penalty),
            "seed": p.seed,
            "batch": 1,
            "repeats": self.repeats,
            "chunk": self.chunk,
        }


@dataclass(frozen=True, slots=True)
class About:
    """Where the model, the data and the numbers come from.

    ``stored``: the precision that the checkpoint is in; empty where it is not known.
    ``seen_as``: the role that these very rows had when the pack was made; empty if none.
    """

    model: str
    dtype: str
    data_path: str
    data_sha256: str
    pack: str | None = None
    command: str = ""
    seen_as: str = ""
    stored: str = ""


@dataclass(slots=True)
class Record:
    """What one method did: everything by repeat, and within it by request."""

    method: Method
    times: list[list[float]] = field(default_factory=list)
    runs: list[list[Generation]] = field(default_factory=list)
    nodes: VerifiedNodes | None = None

    @property
    def seconds(self) -> list[float]:
        """By repeat."""
        return [sum(times) for times in self.times]

    @property
    def first(self) -> list[Generation]:
        """The generations of the first repeat, in the order of the requests."""
        return self.runs[0]

    def tokens(self) -> list[int]:
        """Tokens by repeat."""
        return [sum(len(g.tokens) for g in run) for run in self.runs]

    def seconds_per_token(self) -> list[float]:
        """By repeat: fair where a near tie has made one output longer."""
        return [s / max(1, n) for s, n in zip(self.seconds, self.tokens(), strict=True)]


class Turns:
    """The timed part: which requests, how often, and what was measured.

    ``records``: of the methods that were not left out.
    """

    def __init__(
        self,
        records: Sequence[Record],
        requests: Sequence[Request],
        settings: BenchSettings,
        about: About,
        progress: Progress | None,
        kept: Path | None,
    ) -> None:
        self.records, self._all, self._settings = list(records), requests, settings
        self._progress, self._kept = progress, kept
        self._key = _key(records, requests, about, settings)
        self._rows, self._repeats, self._done = [*range(len(requests))], settings.repeats, 0
        self._fitted, self._stopped = settings.minutes == 0, False
        self._begin, self._before = time.perf_counter(), 0.0

    @property
    def requests(self) -> list[Request]:
        """Those that are measured."""
        return [self._all[row] for row in self._rows]

    def to_json(self) -> dict[str, Any]:
        """For the result's settings: what was measured where that is less than was asked for."""
        asked: dict[str, Any] = {"asked_rows": len(self._all)}
        asked |= {"asked_repeats": self._settings.repeats, "stopped": self._stopped}
        found: dict[str, Any] = {"repeats": self._done}
        whole = self._done == self._settings.repeats and len(self._rows) == len(self._all)
        return found if whole else found | asked

    def resume(self) -> None:
        """Take up the repeats that are kept."""
        assert self._kept is not None
        self._rows, done = unfinished.load(self._kept, self._key)
        self._drop(set(self._settings.optional) - set(done))
        for record in self.records:
            for times, run in done[record.method.name]:
                record.times.append(times)
                record.runs.append(run)
        self._done = len(self.records[0].runs)
        self._fitted = True

    def forget(self) -> None:
        """All is measured: what was kept is not needed any more."""
        if self._kept is not None:
            self._kept.unlink(missing_ok=True)

    def run(self, on_repeat: Callable[[], Any]) -> bool:
        """Measure; returns whether it was stopped early.

        Raises:
            KeyboardInterrupt: with nothing to show.
        """
        self._before = time.perf_counter() - self._begin
        try:
            while self._done < self._repeats:
                self._repeat()
                self._done += 1
                self._repeats += self._done == self._repeats and self._fits_another()
                if self._kept is not None:
                    done = {
                        r.method.name: [*zip(r.times, r.runs, strict=True)] for r in self.records
                    }
                    unfinished.save(self._kept, self._key, self._rows, done)
                if self._done < self._repeats:  # the last one is shown with the rest
                    on_repeat()
        except KeyboardInterrupt:
            self._cut()
            self._stopped = True
            return True
        return False

    def _repeat(self) -> None:
        for record in self.records:
            record.method.reset()
            record.times.append([])
            record.runs.append([])
        gc.collect()
        at, size = 0, self._settings.chunk
        first = self._settings.minutes and not self._done
        while at < len(self._rows):
            step = 1 if first and at < size else size
            turn = (at // size + self._done) % len(self.records)
            for record in (*self.records[turn:], *self.records[:turn]):
                for row in self._rows[at : at + step]:
                    start = time.perf_counter()
                    generation = record.method.run(self._all[row])
                    record.times[-1].append(time.perf_counter() - start)
                    record.runs[-1].append(generation)
                    self._tell()
            at = min(at + step, len(self._rows))
            if not self._done and self._settings.minutes:
                # One row tells too little of the others, but where it takes so long it has to do.
                if at >= size or at * self._costs()[0] > self._left / _SLOW:
                    self._fit(at)
                if at >= len(self._rows):
                    self._add_rows()

    def _fit(self, measured: int) -> None:
        """Leave out repeats, and then rows, for which there is no time.

        Looked at after each chunk of the first repeat: the first rows may be the short ones. The
        warm-up, and the untimed pass over all methods but the baseline at the end, are counted.

        ``measured``: how many rows all methods have done.
        """
        self._fitted = True
        each, untimed = self._costs()
        share = self._left / (each * len(self._rows))
        if share >= _NEARLY * (self._repeats + untimed):
            return
        self._repeats = min(self._repeats, max(2, int(share / _NEARLY - untimed)))
        fitting = int(len(self._rows) * share / (self._repeats + untimed))
        if fitting < self._settings.chunk and self._leave_out():
            self._fit(measured)
            return
        if fitting < self._settings.chunk:  # so few rows twice say less than more of them once
            fitting = int(len(self._rows) * share / (1 + untimed))
            if self._repeats > 1:
                whole = self._before + each * self._settings.chunk * (2 + untimed)
                _log.info(
                    "in %s there is time for %d of %d rows, once; %s would do for %d rows twice",
                    duration(60 * self._settings.minutes),
                    max(measured, fitting),
                    len(self._all),
                    spelt(whole),
                    self._settings.chunk,
                )
            self._repeats = 1
        count = min(len(self._rows), max(measured, fitting))
        self._rows[measured:] = spread(self._rows[measured:], count - measured)

    def _leave_out(self) -> bool:
        """Take out the optional methods; the time they took is spent. Whether there were any."""
        optional = self._settings.optional
        out = [record for record in self.records if record.method.name in optional]
        if not out:
            return False
        self._drop(optional)
        self._before += sum(map(sum, (record.seconds for record in out)))
        self._repeats = self._settings.repeats
        _log.info(
            "in %s there is no time for %s too: left out; --methods all measures them",
            duration(60 * self._settings.minutes),
            " and ".join(record.method.name for record in out),
        )
        return True

    def _drop(self, names: Collection[str]) -> None:
        self.records = [record for record in self.records if record.method.name not in names]

    def skipping(self, methods: Sequence[Method | Skipped]) -> list[Method | Skipped]:
        """The methods, those that were left out as skipped."""
        measured = {record.method.name for record in self.records}
        why = f"no time for it in {duration(60 * self._settings.minutes)}"
        return [
            m
            if isinstance(m, Skipped) or m.name in measured
            else Skipped(m.name, why, dict(m.settings))
            for m in methods
        ]

    def _add_rows(self) -> None:
        """Measure more rows in the first repeat where fewer were planned than there is time for.

        At first that is known of few rows, which may have been the long ones. From some rows on
        another repeat is worth more, where it fits.
        """
        taken = set(self._rows)
        others = [row for row in range(len(self._all)) if row not in taken]
        enough = len(self._rows) >= 2 * self._settings.chunk and self._fits_another()
        if self._repeats > 1 or not others or enough:
            return
        each, untimed = self._costs()
        spare = self._left_now - untimed * each * len(self._rows)
        more = min(self._settings.chunk, int(_NEARLY * spare / ((1 + untimed) * each)))
        self._rows += spread(others, max(0, more))

    def _fits_another(self) -> bool:
        """Whether there is time for one repeat more than was planned."""
        if not self._settings.minutes or self._settings.repeats in (1, self._done):
            return False
        each, untimed = self._costs()
        return (1 + untimed) * each * len(self._rows) < _NEARLY * self._left_now

    def _costs(self) -> tuple[float, float]:
        """Seconds a row took, all methods together; and the share of it that is done again."""
        took = sum(sum(sum(times) for times in record.times) for record in self.records)
        rows = max(1, sum(map(len, self.records[0].times)))
        plain = sum(sum(sum(t) for t in r.times) for r in self.records if r.method.name == BASELINE)
        return max(took / rows, 1e-9), 1 - plain / max(took, 1e-9)

    @property
    def _left_now(self) -> float:
        return 60 * self._settings.minutes - (time.perf_counter() - self._begin)

    @property
    def _left(self) -> float:
        """Seconds there are for the timed part and what comes behind it."""
        return 60 * self._settings.minutes - self._before

    def _cut(self) -> None:
        """Keep the whole repeats; where there is none, what all have done of the first."""
        if not self._done:
            rows = min(len(record.runs[0]) if record.runs else 0 for record in self.records)
            if rows == 0:
                raise KeyboardInterrupt
            self._rows, self._done = self._rows[:rows], 1
        for record in self.records:
            record.times = [times[: len(self._rows)] for times in record.times[: self._done]]
            record.runs = [run[: len(self._rows)] for run in record.runs[: self._done]]

    def _tell(self) -> None:
        if self._progress is None:
            return
        done = sum(len(run) for record in self.records for run in record.runs)
        if not self._fitted:
            first = len(self.records) * min(self._settings.chunk, len(self._rows))
            self._progress("the first rows, which tell how many there is time for", done, first)
            return
        total = self._repeats * len(self.records) * len(self._rows)
        less = f", {len(self._rows)} of {len(self._all)} rows" * (len(self._rows) < len(self._all))
        self._progress(f"repeat {self._done + 1} of {self._repeats}{less}", done, total)


def _key(
    records: Sequence[Record],
    requests: Sequence[Request],
    about: About,
    settings: BenchSettings,
) -> str:
    """Says what is measured: two benchmarks with one key can be put together."""
    machine = machine_info()
    told: list[Any] = [about.model, about.dtype, about.data_sha256, about.pack, settings.to_json()]
    told += [machine[name] for name in ("cpu", "threads", "torch", "transformers", "tascade")]
    told += [[r.method.name for r in records], [[*map(int, r.prompt)] for r in requests]]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()

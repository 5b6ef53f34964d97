"""Running methods against each other: in turns, timed per request, into one result."""

from __future__ import annotations

import gc
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from tascade.bench import metrics, unfinished
from tascade.bench.machine import machine_info
from tascade.bench.methods import Method, Request, Skipped, VerifiedNodes
from tascade.bench.schema import SCHEMA_VERSION, validate
from tascade.core import Generation, Source
from tascade.decode.equality import NearTies
from tascade.decode.sampling import SamplingParams
from tascade.errors import ConfigError

BASELINE = "plain"
OURS = "tasc-spec"
"""Methods whose name starts so are set against every other one."""

Progress = Callable[[str, int, int], None]
"""Told after each request: (phase, requests done in it, requests in all)."""


@dataclass(frozen=True, slots=True)
class BenchSettings:
    """What all methods share. ``chunk``: requests a method decodes before the next takes over;
    ``minutes``: how long the timed part may take, foretold from the first chunk; 0 for any time.
    """

    params: SamplingParams = field(default_factory=SamplingParams)
    repeats: int = 5
    chunk: int = 4
    minutes: float = 0.0

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
    """Where the model, the data and the numbers come from."""

    model: str
    dtype: str
    data_path: str
    data_sha256: str
    pack: str | None = None
    command: str = ""


@dataclass(slots=True)
class _Record:
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


def run_bench(
    methods: Sequence[Method | Skipped],
    requests: Sequence[Request],
    settings: BenchSettings,
    *,
    about: About,
    warmup: Sequence[Request] = (),
    near_ties: NearTies | None = None,
    memory: Mapping[str, dict[str, Any]] | None = None,
    progress: Progress | None = None,
    kept: Path | None = None,
    resume: bool = False,
    on_repeat: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Decode all requests with all methods, and put the numbers together.

    The methods take turns: within a repeat every chunk of requests goes through all of them, in an
    order that rotates from chunk to chunk, so that a drifting machine hurts all alike. At the start
    of each repeat every method is reset, so that no repeat profits from the one before; within a
    repeat a method may learn from the requests it has seen, as it would in use. What became of each
    drafted node is observed in a last pass that is not timed.

    An interrupt (``KeyboardInterrupt``) ends it early, with what there is: the whole repeats, or of
    the first one the requests that every method has answered.

    Args:
        methods: ready to run, ``plain`` among them.
        requests: the test rows.
        settings: shared by all methods, and already in theirs: the bench passes nothing on.
        about: for the result.
        warmup: rows that are not test rows; decoded once by every method before the clock starts.
        near_ties: judges the outputs that differ; without it none counts as a near tie.
        memory: by method, where it was measured (see :mod:`tascade.bench.memory`).
        progress: told after each request.
        kept: a file for what was measured, repeat by repeat; it is removed at the end.
        resume: go on with what ``kept`` holds.
        on_repeat: given the methods' entries so far after each repeat.

    Returns:
        The result, checked against the schema.

    Raises:
        ConfigError: no requests, no ``plain``, two methods of one name, or nothing to resume.
        KeyboardInterrupt: before any request was answered by all methods.
    """
    created = datetime.now(UTC).isoformat(timespec="seconds")
    _check(methods, requests)
    machine = machine_info()
    records = [_Record(m) for m in methods if not isinstance(m, Skipped)]
    turns = _Turns(
        records, requests, settings, progress, kept, _key(records, requests, about, settings)
    )
    if resume:
        turns.resume()
    _warm_up(records, warmup)
    stopped = turns.run(lambda: on_repeat and on_repeat(_entries(methods, records, turns.requests)))
    requests = turns.requests
    if not stopped:
        _trace(records, requests, progress)
        if kept is not None:
            kept.unlink(missing_ok=True)
    result = {
        "schema": SCHEMA_VERSION,
        "created": created,
        "command": about.command,
        "machine": machine,
        "model": about.model,
        "dtype": about.dtype,
        "pack": about.pack,
        "data": {
            "path": about.data_path,
            "sha256": about.data_sha256,
            "examples": len(requests),
        },
        "settings": settings.to_json() | turns.to_json(),
        "methods": _entries(methods, records, requests, near_ties, memory),
    }
    validate(result)
    return result


def _check(methods: Sequence[Method | Skipped], requests: Sequence[Request]) -> None:
    names = [m.name for m in methods]
    if not requests:
        raise ConfigError("nothing to measure", got="0 requests", wanted="1 or more")
    if len(set(names)) < len(names):
        raise ConfigError("two methods of one name", got=names, wanted="a name for each")
    if not any(m.name == BASELINE for m in methods if not isinstance(m, Skipped)):
        raise ConfigError(
            "the baseline is missing", got=names, wanted=f"a method named {BASELINE!r}"
        )


# --- the passes ---------------------------------------------------------------------------------


def _warm_up(records: Sequence[_Record], warmup: Sequence[Request]) -> None:
    for record in records:
        for request in warmup:
            record.method.run(request)


class _Turns:
    """The timed part: which requests, how often, and what was measured."""

    def __init__(
        self,
        records: Sequence[_Record],
        requests: Sequence[Request],
        settings: BenchSettings,
        progress: Progress | None,
        kept: Path | None,
        key: str,
    ) -> None:
        self._records, self._all, self._settings = records, requests, settings
        self._progress, self._kept, self._key = progress, kept, key
        self._rows, self._repeats, self._done = [*range(len(requests))], settings.repeats, 0
        self._fitted = settings.minutes == 0

    @property
    def requests(self) -> list[Request]:
        """Those that are measured."""
        return [self._all[row] for row in self._rows]

    def to_json(self) -> dict[str, Any]:
        """For the result's settings: what was measured where that is less than was asked for."""
        asked = {"asked_rows": len(self._all), "asked_repeats": self._settings.repeats}
        found = {"repeats": self._done}
        whole = self._done == self._settings.repeats and len(self._rows) == len(self._all)
        return found if whole else found | asked

    def resume(self) -> None:
        """Take up the repeats that are kept."""
        assert self._kept is not None
        self._rows, done = unfinished.load(self._kept, self._key)
        for record in self._records:
            for times, run in done[record.method.name]:
                record.times.append(times)
                record.runs.append(run)
        self._done = len(self._records[0].runs)
        self._fitted = True

    def run(self, on_repeat: Callable[[], Any]) -> bool:
        """Measure; returns whether it was stopped early.

        Raises:
            KeyboardInterrupt: with nothing to show.
        """
        try:
            while self._done < self._repeats:
                self._repeat()
                self._done += 1
                if self._kept is not None:
                    done = {
                        r.method.name: [*zip(r.times, r.runs, strict=True)] for r in self._records
                    }
                    unfinished.save(self._kept, self._key, self._rows, done)
                on_repeat()
        except KeyboardInterrupt:
            self._cut()
            return True
        return False

    def _repeat(self) -> None:
        for record in self._records:
            record.method.reset()
            record.times.append([])
            record.runs.append([])
        gc.collect()
        at, size = 0, self._settings.chunk
        while at < len(self._rows):
            turn = (at // size + self._done) % len(self._records)
            for record in (*self._records[turn:], *self._records[:turn]):
                for row in self._rows[at : at + size]:
                    start = time.perf_counter()
                    generation = record.method.run(self._all[row])
                    record.times[-1].append(time.perf_counter() - start)
                    record.runs[-1].append(generation)
                    self._tell()
            at += size
            if not self._fitted:
                self._fit(sum(sum(record.times[0]) for record in self._records), at)

    def _fit(self, seconds: float, measured: int) -> None:
        """Leave out repeats, and then rows, for which there is no time.

        ``seconds``: what the first ``measured`` rows took, of all methods.
        """
        self._fitted = True
        share = 60 * self._settings.minutes / max(seconds * len(self._rows) / measured, 1e-9)
        self._repeats = min(self._repeats, max(2, int(share)))
        count = min(len(self._rows), max(measured, int(len(self._rows) * share / self._repeats)))
        others = [*range(measured, len(self._rows))]
        step = len(others) / max(1, count - measured)
        chosen = [others[int(i * step)] for i in range(count - measured)]
        self._rows = [*self._rows[:measured], *(self._rows[i] for i in chosen)]

    def _cut(self) -> None:
        """Keep the whole repeats; where there is none, what all have done of the first."""
        if not self._done:
            rows = min(len(record.runs[0]) if record.runs else 0 for record in self._records)
            if rows == 0:
                raise KeyboardInterrupt
            self._rows, self._done = self._rows[:rows], 1
        for record in self._records:
            record.times = [times[: len(self._rows)] for times in record.times[: self._done]]
            record.runs = [run[: len(self._rows)] for run in record.runs[: self._done]]

    def _tell(self) -> None:
        if self._progress is None:
            return
        done = sum(len(run) for record in self._records for run in record.runs)
        total = self._repeats * len(self._records) * len(self._rows)
        less = f", {len(self._rows)} of {len(self._all)} rows" * (len(self._rows) < len(self._all))
        self._progress(f"repeat {self._done + 1} of {self._repeats}{less}", done, total)


def _key(
    records: Sequence[_Record],
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


def _trace(
    records: Sequence[_Record], requests: Sequence[Request], progress: Progress | None
) -> None:
    for done, record in enumerate(records, 1):
        record.method.reset()
        record.nodes = record.method.trace(requests)
        record.method.reset()
        if progress is not None:
            progress("acceptance, not timed", done, len(records))


# --- the numbers --------------------------------------------------------------------------------


def _entries(
    methods: Sequence[Method | Skipped],
    records: Sequence[_Record],
    requests: Sequence[Request],
    near_ties: NearTies | None = None,
    memory: Mapping[str, dict[str, Any]] | None = None,
) -> dict[str, Any]:
    by_name = {record.method.name: record for record in records}
    plain = by_name[BASELINE]
    entries: dict[str, Any] = {}
    for method in methods:
        if isinstance(method, Skipped):
            entries[method.name] = {"skipped": method.reason, "settings": method.settings}
            continue
        record = by_name[method.name]
        entry = _measured(record, requests)
        if record is not plain:
            entry |= _equality(record, plain, requests, near_ties)
            entry["speedup"] = metrics.speedup(
                record.seconds_per_token(), plain.seconds_per_token()
            )
        if method.name.startswith(OURS):
            entry["versus"] = _versus(record, records)
        if memory and method.name in memory:
            entry["memory"] = memory[method.name]
        entries[method.name] = entry
    return entries


def _measured(record: _Record, requests: Sequence[Request]) -> dict[str, Any]:
    first, tokens = record.first, record.tokens()
    forwards = sum(g.forwards for g in first)
    prefill = [sum(g.prefill_seconds for g in run) for run in record.runs]
    decoding = [
        (n - _prefilled(run)) / max(s - p, 1e-9)
        for n, run, s, p in zip(tokens, record.runs, record.seconds, prefill, strict=True)
    ]
    entry: dict[str, Any] = {
        "tokens": tokens[0],
        "steps": forwards,
        "seconds": record.seconds,
        "prefill_seconds": prefill,
        "tokens_per_second": median(n / s for n, s in zip(tokens, record.seconds, strict=True)),
        "decode_tokens_per_second": median(decoding),
        "characters_per_second": median(
            sum(len(g.text) for g in run) / s
            for run, s in zip(record.runs, record.seconds, strict=True)
        ),
        "tokens_per_step": sum(g.stepped_tokens for g in first) / max(1, forwards),
        "guarantee": record.method.guarantee,
        "quality": metrics.quality([g.text for g in first], [r.reference for r in requests]),
        "settings": dict(record.method.settings),
    }
    steps = [step for g in first for step in g.steps]
    drafted = sum(step.drafted for step in steps)
    if drafted:
        entry["drafted_per_step"] = drafted / max(1, forwards)
        entry["draft_us"] = metrics.percentiles([1e6 * step.draft_seconds for step in steps])
        entry["by_source"] = _by_source(first)
    nodes = record.nodes
    if nodes is not None and nodes.depths:
        entry["acceptance_by_depth"] = metrics.acceptance_by_position(nodes.depths, nodes.accepted)
        entry["calibration"] = metrics.calibration(nodes.survival, nodes.accepted)
    return entry


def _prefilled(run: Sequence[Generation]) -> int:
    """Tokens that came out of the prefill forwards, whose time is not decoding time."""
    total = 0
    for g in run:
        outside = len(g.tokens) - g.stepped_tokens  # of a prefill that carried no draft
        total += outside or (g.steps[0].committed if g.steps else 1)
    return total


def _by_source(run: Sequence[Generation]) -> dict[str, int]:
    counts = {source.name.lower(): 0 for source in Source}
    for g in run:
        for source in g.sources:
            counts[Source(source).name.lower()] += 1
    return counts


def _equality(
    record: _Record, plain: _Record, requests: Sequence[Request], near_ties: NearTies | None
) -> dict[str, int]:
    """Rows whose output equals plain's first one in every repeat; rows that do not; near ties.

    A row is a near tie only if each of its differing outputs is one.
    """
    differing = ties = 0
    for i, request in enumerate(requests):
        wanted = plain.first[i].tokens
        others = {tuple(run[i].tokens) for run in record.runs} - {tuple(wanted)}
        if not others:
            continue
        differing += 1
        if near_ties is not None:
            ties += all(near_ties.is_near_tie(request.prompt, wanted, o) for o in others)
    return {"identical": len(requests) - differing, "differing": differing, "near_ties": ties}


def _versus(record: _Record, records: Sequence[_Record]) -> dict[str, dict[str, float]]:
    """Tokens per second against each other method but the baseline, which ``speedup`` is about."""
    return {
        other.method.name: metrics.speedup(record.seconds_per_token(), other.seconds_per_token())
        for other in records
        if other is not record and other.method.name != BASELINE
    }

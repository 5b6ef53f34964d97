"""Running methods against each other: in turns, timed per request, into one result."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from tascade.bench import metrics
from tascade.bench.machine import machine_info
from tascade.bench.methods import Method, Request, Skipped
from tascade.bench.schema import SCHEMA_VERSION, validate
from tascade.bench.timing import BASELINE, About, BenchSettings, Record, Turns
from tascade.core import Generation, Progress, Source
from tascade.decode.equality import NearTies
from tascade.errors import ConfigError

_WARM_UP = 0.15
"""The part of a benchmark's time that its warm-up may take, a row for each method apart."""
_SPEC = "tasc-spec"
"""Methods whose name starts so are set against every other one."""


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
        on_repeat: given dtype and methods of the result so far after each repeat.

    Returns:
        The result, checked against the schema.

    Raises:
        ConfigError: no requests, no ``plain``, two methods of one name, or nothing to resume.
        KeyboardInterrupt: before any request was answered by all methods.
    """
    _check(methods, requests)
    created, machine = datetime.now(UTC).isoformat(timespec="seconds"), machine_info()
    records = [Record(m) for m in methods if not isinstance(m, Skipped)]
    turns = Turns(records, requests, settings, about, progress, kept)
    if resume:
        turns.resume()
    _warm_up(records, warmup, progress, 60 * settings.minutes or math.inf)
    stopped = turns.run(lambda: on_repeat and on_repeat(_so_far(about, methods, turns)))
    requests, methods = turns.requests, turns.skipping(methods)
    traced = False
    if not stopped:  # a stopped trace: what was timed is written, with fewer plots
        with suppress(KeyboardInterrupt):
            _trace(turns.records, requests, progress)
            traced = True
        turns.forget()
    result = {
        "schema": SCHEMA_VERSION,
        "created": created,
        "command": about.command,
        "machine": machine,
        "model": about.model,
        **_precision(about),
        "pack": about.pack,
        "data": _data(about, len(requests)),
        "settings": settings.to_json() | turns.to_json() | ({} if traced else {"traced": False}),
        "methods": _entries(methods, turns.records, requests, near_ties, memory),
    }
    validate(result)
    return result


def _precision(about: About) -> dict[str, str]:
    other = about.stored not in ("", about.dtype)
    return {"dtype": about.dtype} | ({"stored_dtype": about.stored} if other else {})


def _data(about: About, examples: int) -> dict[str, Any]:
    said = {"path": about.data_path, "sha256": about.data_sha256, "examples": examples}
    return said | ({"seen_as": about.seen_as} if about.seen_as else {})


def _so_far(about: About, methods: Sequence[Method | Skipped], turns: Turns) -> dict[str, Any]:
    entries = _entries(turns.skipping(methods), turns.records, turns.requests)
    return {"dtype": about.dtype, "methods": entries}


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


def _warm_up(
    records: Sequence[Record], warmup: Sequence[Request], progress: Progress | None, seconds: float
) -> None:
    """A row for each method, and more of them within a part of the ``seconds`` there are."""
    latest = time.monotonic() + _WARM_UP * seconds
    for at, request in enumerate(warmup):
        for done, record in enumerate(records):
            if at and time.monotonic() > latest:
                return
            if progress is not None:
                progress("warming up", at * len(records) + done, len(records) * len(warmup))
            record.method.run(request)


def _trace(
    records: Sequence[Record], requests: Sequence[Request], progress: Progress | None
) -> None:
    for done, record in enumerate(records, 1):
        if record.method.name == BASELINE:
            continue  # the slowest, and it has no drafts to record
        record.method.reset()
        record.nodes = record.method.trace(requests)
        record.method.reset()
        if progress is not None:
            progress("acceptance, not timed", done, len(records))


# --- the numbers --------------------------------------------------------------------------------


def _entries(
    methods: Sequence[Method | Skipped],
    records: Sequence[Record],
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
            if ends := metrics.by_rows(record.times, plain.times):
                entry["by_rows"] = ends
        if method.name.startswith(_SPEC):
            entry["versus"] = _versus(record, records)
        if memory and method.name in memory:
            entry["memory"] = memory[method.name]
        entries[method.name] = entry
    return entries


def _measured(record: Record, requests: Sequence[Request]) -> dict[str, Any]:
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
        "cut": sum(g.finish_reason == "length" for g in first),
        "quality": metrics.quality([g.text for g in first], [r.reference for r in requests]),
        "settings": dict(record.method.settings),
    }
    steps = [step for g in first for step in g.steps]
    drafted = sum(step.drafted for step in steps)
    if drafted:
        entry["accepted_in_steps"] = np.bincount([step.accepted for step in steps]).tolist()
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
    record: Record, plain: Record, requests: Sequence[Request], near_ties: NearTies | None
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


def _versus(record: Record, records: Sequence[Record]) -> dict[str, dict[str, float]]:
    """Tokens per second against each other method but the baseline, which ``speedup`` is about."""
    return {
        other.method.name: metrics.speedup(record.seconds_per_token(), other.seconds_per_token())
        for other in records
        if other is not record and other.method.name != BASELINE
    }

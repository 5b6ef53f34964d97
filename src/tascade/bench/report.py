"""One self-contained HTML page over bench results: charts, tables, and how each number came about.

The page loads nothing: style sheet and drawings are inline, there are no scripts. Every speed
stands beside its spread and its guarantee.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from statistics import median
from typing import Any

import jinja2
from markupsafe import Markup

from tascade.bench.charts import (
    Bar,
    Curve,
    Stack,
    accepted_chart,
    bar_chart,
    depth_chart,
    reliability_chart,
    stacked_chart,
)
from tascade.bench.metrics import OURS, QUARTILES_FROM, spread, titles
from tascade.bench.remarks import remarks
from tascade.bench.schema import promise, validate
from tascade.bench.tuned import TunedView
from tascade.util.files import write_atomic

Json = Mapping[str, Any]

SOURCES = ("target", "corpus", "context", "both", "other")

_GUARANTEES = {
    "lossless": "the model checks every token: plain decoding's output, identical in float32 and, "
    "where rounding is the same, in half precision; what differs is counted",
    "approximate": "may differ from plain decoding; what differs is counted",
    "retrained": "another model; its quality is measured instead",
}

_QUALITY_NAMES = {"exact_match": "exact match", "json_field_f1": "JSON field F1"}

_LABELS = {"cpu": "CPU", "memory_gb": "memory, GB", "os": "system", "sha256": "SHA-256"}

_DASH = "–"


@dataclass(frozen=True, slots=True)
class Lead:
    """The method that a section's headline is about, and what can be claimed for it."""

    name: str
    method: Json
    claim: str
    verdict: str
    peer: str
    outputs: str


@dataclass(frozen=True, slots=True)
class Section:
    """One bench result as the template shows it."""

    anchor: str
    title: str
    result: Json
    measured: Mapping[str, Json]
    skipped: Mapping[str, str]
    lead: Lead | None
    spread_name: str
    has_memory: bool
    notes: Sequence[str]
    charts: Mapping[str, Markup]
    legends: Mapping[str, Sequence[tuple[str, str]]]
    quality_names: Mapping[str, str]


def render(
    results: Sequence[dict[str, Any]],
    *,
    title: str,
    pack: Json | None = None,
    tuned: TunedView | None = None,
) -> str:
    """The page as a string.

    Args:
        results: Bench results (see ``schema.json``), one section each, in this order.
        title: Heading of the page.
        pack: What to say about the pack, as names and values; left out if None.
        tuned: What to say of the pack's tuned model; left out if None.

    Raises:
        TascadeError: A result does not follow the schema.
    """
    for result in results:
        validate(result)
    names = titles(results)
    page = _template().render(
        title=title,
        pack=pack or {},
        tuned=tuned,
        sections=[_section(r, f"run-{i}", names[i - 1]) for i, r in enumerate(results, 1)],
        sources=SOURCES,
        guarantees=_GUARANTEES,
    )
    return page.lstrip()


def write_report(
    path: str | Path,
    results: Sequence[dict[str, Any]],
    *,
    title: str,
    pack: Json | None = None,
    tuned: TunedView | None = None,
) -> None:
    """Write :func:`render`'s page to ``path``: whole, or not at all."""
    page = render(results, title=title, pack=pack, tuned=tuned).encode("utf-8", "replace")
    write_atomic(Path(path), page)


# --- one section --------------------------------------------------------------------------------


def _section(result: Json, anchor: str, title: str) -> Section:
    methods: Mapping[str, Json] = result["methods"]
    others = {name: m for name, m in methods.items() if "skipped" not in m}
    measured = {"plain": methods["plain"], **others}
    dtype = result["dtype"]
    lead = _lead(measured, result["data"]["examples"], dtype)
    repeats = len(methods["plain"]["seconds"])
    kind = "the quartiles" if repeats >= QUARTILES_FROM else "the minimum and maximum"
    styles = _styles(measured, lead)
    charts, legends = _charts(measured, styles, dtype)
    names = {key: None for m in measured.values() for key in m.get("quality", {})}
    return Section(
        anchor=anchor,
        title=title,
        result=result,
        measured=measured,
        skipped={name: m["skipped"] for name, m in methods.items() if "skipped" in m},
        lead=lead,
        spread_name=f"{kind} of {repeats} repeats" if repeats > 1 else "unknown, of one round",
        has_memory=any("memory" in m or "head" in m.get("settings", {}) for m in measured.values()),
        notes=[*remarks(result), *_notes(measured)],
        charts=charts,
        legends=legends,
        quality_names={key: _QUALITY_NAMES.get(key, key.replace("_", " ")) for key in names},
    )


def _lead(measured: Mapping[str, Json], examples: int, dtype: str) -> Lead | None:
    """Tascade's fastest lossless method; without one its fastest, without that the fastest."""
    others = {name: m for name, m in measured.items() if name != "plain"}
    if not others:
        return None

    def rank(name: str) -> tuple[bool, bool, float]:
        method = others[name]
        return (
            name.startswith(OURS),
            method["guarantee"] == "lossless",
            method["speedup"]["median"],
        )

    name = max(others, key=rank)
    method = others[name]
    claim, verdict = _claim(method["speedup"])
    return Lead(
        name=name,
        method=method,
        claim=claim,
        verdict=verdict,
        peer=_peer_claim(method, others, dtype),
        outputs=_outputs_claim(method, examples),
    )


def _claim(ratio: Json) -> tuple[str, str]:
    """What the spread of a speed-up allows to be said, and a warning where that is no gain."""
    if ratio["low"] > 1:
        return "as fast as plain decoding", ""
    return "the speed of plain decoding", "slower" if ratio["high"] < 1 else "no clear difference"


def _peer_claim(method: Json, others: Mapping[str, Json], dtype: str) -> str:
    """How the method compares with the fastest peer it was timed against."""
    versus = method.get("versus", {})
    peers = [name for name in versus if name in others and not name.startswith(OURS)]
    if not peers:
        return ""
    best = max(peers, key=lambda name: float(others[name]["tokens_per_second"]))
    ratio, guarantee = versus[best], promise(others[best], dtype)
    return f"{_times(ratio)} ({_range(ratio)}) the speed of {best}, the fastest peer ({guarantee})"


def _outputs_claim(method: Json, examples: int) -> str:
    if "identical" not in method:
        return ""
    same, differing = method["identical"], method.get("differing", 0)
    text = f"{same:,} of {max(examples, same + differing):,} outputs identical to plain decoding"
    if differing:
        ties = method.get("near_ties", 0)
        text += f"; {differing:,} differ, {ties:,} of them at a tie up to rounding"
    return text


def _notes(measured: Mapping[str, Json]) -> list[str]:
    """What a reader of the methods table must be told."""
    notes = []
    faults = [
        name
        for name, m in measured.items()
        if m.get("guarantee") == "lossless" and m.get("differing", 0) > m.get("near_ties", 0)
    ]
    if faults:
        notes.append(
            f"Outputs of {', '.join(faults)} differ from plain decoding by more than a tie up to "
            "rounding. A lossless method must not do that."
        )
    plain = measured["plain"]["tokens"]
    others = [
        f"{name} wrote {m['tokens']:,}"
        for name, m in measured.items()
        if abs(m["tokens"] - plain) > 0.01 * plain
    ]
    if others:
        notes.append(
            f"Plain wrote {plain:,} tokens, {', '.join(others)}: "
            "there tokens/s and the speed-up for the same requests say different things."
        )
    return notes


# --- charts -------------------------------------------------------------------------------------


def _styles(measured: Mapping[str, Json], lead: Lead | None) -> dict[str, str]:
    """A colour class per method; the lead's is always the first."""
    first = [lead.name] if lead else []
    order = [*first, *(n for n in measured if n != "plain" and n not in first)]
    styles = {name: f"m{1 + i % 6}" for i, name in enumerate(order)}
    return {**styles, "plain": "plain"}


def _charts(
    measured: Mapping[str, Json], styles: Mapping[str, str], dtype: str
) -> tuple[dict[str, Markup], dict[str, list[tuple[str, str]]]]:
    """The drawings that the result has data for, and the legend of each that needs one."""
    drawn = {"speed": bar_chart(_bars(measured, dtype), "Speed of each method", "tokens/s")}
    legends: dict[str, list[tuple[str, str]]] = {}
    stacks = _stacks(measured)
    if stacks:
        drawn["sources"] = stacked_chart(stacks, "Committed tokens by who drafted them")
    depths = [
        Curve(name, styles[name], tuple((float(d), s, 1.0) for d, s in enumerate(shares, 1)))
        for name, m in measured.items()
        if (shares := m.get("acceptance_by_depth"))
    ]
    if depths:
        drawn["depth"] = depth_chart(depths, "Acceptance of drafted nodes by depth")
        legends["depth"] = [(c.style, c.label) for c in depths]
    reached = [
        Curve(name, styles[name], _reached(counts))
        for name, m in measured.items()
        if len(counts := m.get("accepted_in_steps", [])) > 1
    ]
    if reached:
        drawn["accepted"] = accepted_chart(reached, "Steps by their accepted tokens")
        legends["accepted"] = [(c.style, c.label) for c in reached]
    reliability = [
        Curve(name, styles[name], tuple((b["predicted"], b["realised"], b["count"]) for b in bins))
        for name, m in measured.items()
        if (bins := m.get("calibration", {}).get("bins"))
    ]
    if reliability:
        drawn["calibration"] = reliability_chart(reliability, "Predicted and realised acceptance")
        legends["calibration"] = [
            (c.style, f"{c.label}, ECE {measured[c.label]['calibration']['ece']:.3f}")
            for c in reliability
        ]
    return {name: Markup(svg) for name, svg in drawn.items()}, legends


def _bars(measured: Mapping[str, Json], dtype: str) -> list[Bar]:
    bars = []
    for name, method in measured.items():
        speed = float(method["tokens_per_second"])
        middle = median(method["seconds"])
        ends = spread([speed * middle / seconds for seconds in method["seconds"]])
        kind = "plain" if name == "plain" else "ours" if name.startswith(OURS) else "peer"
        note = _speed(speed)
        if "speedup" in method:
            note += f" · {_times(method['speedup'])}"
        guarantee = promise(method, dtype) if name != "plain" else "baseline"
        bars.append(Bar(name, speed, ends["low"], ends["high"], note, guarantee, kind))
    return bars


def _reached(counts: Sequence[int]) -> tuple[tuple[float, float, float], ...]:
    """Share of the steps that accepted 1, 2, ... tokens or more."""
    total, left, points = sum(counts), sum(counts), []
    for tokens, count in enumerate(counts):
        if tokens:
            points.append((float(tokens), left / total, 1.0))
        left -= count
    return tuple(points)


def _stacks(measured: Mapping[str, Json]) -> list[Stack]:
    return [
        Stack(name, tuple((f"src-{key}", key, float(sources[key])) for key in SOURCES))
        for name, method in measured.items()
        if (sources := method.get("by_source"))
    ]


# --- numbers and words --------------------------------------------------------------------------


def _number(value: float | None, digits: int = 0) -> str:
    return _DASH if value is None else f"{value:,.{digits}f}"


def _speed(value: float | None) -> str:
    """Three or four digits: more than that no timing is worth."""
    if value is None:
        return _DASH
    return _number(value, 0 if value >= 1000 else 1 if value >= 10 else 2)


def _megabytes(count: float | None) -> str:
    """Bytes as MB, to three digits or so."""
    return _speed(None if count is None else count / 1e6)


def _times(ratio: Json | None) -> str:
    return f"{_speed(ratio['median'])}×" if ratio else _DASH


def _range(ratio: Json | None) -> str:
    """``low–high×``, to no more digits than the median is shown with."""
    if ratio and ratio["low"] == ratio["high"]:
        return "one round"
    return f"{_speed(ratio['low'])}{_DASH}{_speed(ratio['high'])}×" if ratio else _DASH


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.1%}" if whole else _DASH


def _label(key: str) -> str:
    """A key as a person would write it."""
    return _LABELS.get(key, key.replace("_", " "))


def _plain_text(value: object) -> str:
    """A setting as text: names with their values, lists with commas, the rest as JSON."""
    if value is None:
        return _DASH
    if isinstance(value, dict) and value:
        return "; ".join(f"{_label(str(name))}: {_plain_text(of)}" for name, of in value.items())
    if isinstance(value, list | tuple) and all(isinstance(v, int | float | str) for v in value):
        return ", ".join(_plain_text(part) for part in value)
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        return str(round(value, 6) if isinstance(value, float) else value)
    return json.dumps(value, ensure_ascii=False, default=str)


def _template() -> jinja2.Template:
    source = resources.files("tascade.bench").joinpath("report.html.j2").read_text("utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(
        number=_number,
        speed=_speed,
        megabytes=_megabytes,
        times=_times,
        range=_range,
        text=_plain_text,
        promise=promise,
        label=_label,
        median=median,
    )
    environment.globals["share"] = _share
    return environment.from_string(source)

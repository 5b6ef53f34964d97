"""Small inline SVG charts for the report: bars with whiskers, stacked bars, curves.

Built as element trees, so text is always escaped and tags always balance. Colours are classes
that the page's style sheet resolves, which is what makes one drawing serve light, dark and print.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor, log10, sqrt
from xml.etree import ElementTree as ET

_WIDTH = 720.0
_LABEL = 150.0
_ROW = 34.0
_MAX_LABEL = 21

_SIDE = 440.0
"""Width of the small square-ish charts."""


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar: its value, the spread of its repeats, and the two texts at its end."""

    label: str
    value: float
    low: float
    high: float
    note: str
    remark: str
    style: str


@dataclass(frozen=True, slots=True)
class Stack:
    """One bar that is split into parts: (style, name, amount)."""

    label: str
    parts: tuple[tuple[str, str, float], ...]


@dataclass(frozen=True, slots=True)
class Curve:
    """One curve of (x, y, weight) points; the weight is shown as the size of the dot."""

    label: str
    style: str
    points: tuple[tuple[float, float, float], ...]


def bar_chart(bars: Sequence[Bar], title: str, unit: str) -> str:
    """Horizontal bars from zero, with whiskers from low to high."""
    height = _ROW * len(bars) + 34
    svg = _svg(_WIDTH, height, title, "; ".join(map(_describe_bar, bars)))
    right = _WIDTH - 300  # for "1,124 · 9.07×  same up to rounding, 58 of 64"
    top = max((b.high for b in bars), default=1.0) or 1.0
    ticks = _ticks(top)
    scale = (right - _LABEL) / max(top, ticks[-1])
    floor_y = _ROW * len(bars) + 6
    for tick in ticks:
        x = _LABEL + tick * scale
        _line(svg, x, 2, x, floor_y, "axis" if tick == 0 else "grid")
        _text(svg, x, floor_y + 15, f"{tick:,g}", "tick", anchor="middle")
    _text(svg, right + 14, floor_y + 15, unit, "tick")
    for row, bar in enumerate(bars):
        middle = _ROW * row + _ROW / 2 + 2
        _label(svg, bar.label, middle)
        _rect(svg, _LABEL, middle - 9, bar.value * scale, 18, f"fill-{bar.style}", bar.label)
        low, high = _LABEL + bar.low * scale, _LABEL + bar.high * scale
        _line(svg, low, middle, high, middle, "whisker")
        for x in (low, high):
            _line(svg, x, middle - 4, x, middle + 4, "whisker")
        end = max(high, _LABEL + bar.value * scale)
        text = _text(svg, end + 8, middle + 4.5, bar.note, "value")
        ET.SubElement(text, "tspan", {"dx": "7", "class": "remark"}).text = bar.remark
    return _markup(svg)


def stacked_chart(stacks: Sequence[Stack], title: str) -> str:
    """One bar per stack, each as long as the others and split by share."""
    height = _ROW * len(stacks) + 30
    svg = _svg(_WIDTH, height, title, "; ".join(map(_describe_stack, stacks)))
    full = _WIDTH - _LABEL - 20
    floor_y = _ROW * len(stacks) + 4
    for tick in range(0, 101, 25):
        x = _LABEL + full * tick / 100
        _line(svg, x, 2, x, floor_y, "axis" if tick == 0 else "grid")
        _text(svg, x, floor_y + 15, f"{tick}%", "tick", anchor="middle")
    for row, stack in enumerate(stacks):
        y = _ROW * row + 7
        _label(svg, stack.label, y + 11)
        total = sum(amount for _, _, amount in stack.parts)
        x = _LABEL
        for style, name, amount in stack.parts:
            width = full * amount / total if total else 0.0
            if width:
                text = f"{name}: {amount:,.0f} tokens ({amount / total:.0%})"
                _rect(svg, x, y, max(width - 1, 0.5), 20, f"fill-{style}", text)
            if width > 42:
                percent = f"{amount / total:.0%}"
                _text(svg, x + width / 2, y + 14.5, percent, f"on-{style}", anchor="middle")
            x += width
    return _markup(svg)


def depth_chart(curves: Sequence[Curve], title: str) -> str:
    """Shares (0..1) over whole-numbered depths 1, 2, ..."""
    return _whole_chart(curves, title, ("draft depth", "accepted"))


def accepted_chart(curves: Sequence[Curve], title: str) -> str:
    """Shares (0..1) of the steps that accepted 1, 2, ... tokens or more."""
    return _whole_chart(curves, title, ("accepted tokens", "of the steps"))


def _whole_chart(curves: Sequence[Curve], title: str, names: tuple[str, str]) -> str:
    deepest = max((int(p[0]) for c in curves for p in c.points), default=1)
    step = max(1, ceil(deepest / 12))
    ticks = [(float(d), str(d)) for d in range(1, deepest + 1, step)]
    span = (1.0, float(max(deepest, 2)))
    return _curve_chart(curves, title, ticks, span, names)


def steps_chart(curves: Sequence[Curve], title: str) -> str:
    """Shares (0..1) of the base model's steps over the number of new tokens."""
    most = max((p[0] for c in curves for p in c.points), default=1.0) or 1.0
    ticks = [(tick, f"{tick:g}") for tick in _ticks(most)]
    return _curve_chart(curves, title, ticks, (0.0, most), ("new tokens", "steps left"))


def reliability_chart(curves: Sequence[Curve], title: str) -> str:
    """Realised over predicted shares, with the diagonal of perfect calibration."""
    ticks = [(t / 4, f"{t * 25}%") for t in range(5)]
    return _curve_chart(curves, title, ticks, (0.0, 1.0), ("predicted", "realised"), diagonal=True)


def _curve_chart(
    curves: Sequence[Curve],
    title: str,
    ticks: Sequence[tuple[float, str]],
    span: tuple[float, float],
    names: tuple[str, str],
    diagonal: bool = False,
) -> str:
    """Curves in a frame; y always runs from 0 to 100%, so pages can be compared by eye."""
    height, left, top = 300.0, 42.0, 26.0
    width, depth = _SIDE - left - 16, height - top - 40
    svg = _svg(_SIDE, height, title, "; ".join(_describe_curve(c, names) for c in curves))

    def at(x: float, y: float) -> tuple[float, float]:
        return left + width * (x - span[0]) / (span[1] - span[0]), top + depth * (1 - y)

    for quarter in range(5):
        x, y = at(span[0], quarter / 4)
        _line(svg, x, y, x + width, y, "grid" if quarter else "axis")
        _text(svg, x - 7, y + 4, f"{quarter * 25}%", "tick", anchor="end")
    for tick, text in ticks:
        _text(svg, at(tick, 0)[0], top + depth + 16, text, "tick", anchor="middle")
    _text(svg, left + width / 2, height - 6, names[0], "axis-name", anchor="middle")
    _text(svg, 0, 11, names[1], "axis-name")
    if diagonal:
        _line(svg, *at(0, 0), *at(1, 1), "ideal")
    heaviest = max((p[2] for c in curves for p in c.points), default=1.0) or 1.0
    for curve in curves:
        dots = [(*at(x, y), weight) for x, y, weight in curve.points]
        path = " ".join(f"{_n(x)},{_n(y)}" for x, y, _ in dots)
        ET.SubElement(svg, "polyline", {"points": path, "class": f"curve line-{curve.style}"})
        for (x, y, weight), point in zip(dots, curve.points, strict=True):
            radius = 2.2 + 3.2 * sqrt(weight / heaviest) if diagonal else 2.8
            dot = {"cx": _n(x), "cy": _n(y), "r": _n(radius), "class": f"dot fill-{curve.style}"}
            note = f"{curve.label}: {names[0]} {point[0]:.3g}, {names[1]} {point[1]:.1%}"
            ET.SubElement(ET.SubElement(svg, "circle", dot), "title").text = note
    return _markup(svg)


# --- words for those who do not see the drawing --------------------------------------------------


def _describe_bar(bar: Bar) -> str:
    return f"{bar.label}: {bar.note}, {bar.remark}, from {bar.low:.3g} to {bar.high:.3g}"


def _describe_stack(stack: Stack) -> str:
    total = sum(amount for _, _, amount in stack.parts) or 1.0
    shares = ", ".join(f"{name} {amount / total:.0%}" for _, name, amount in stack.parts)
    return f"{stack.label}: {shares}"


def _describe_curve(curve: Curve, names: tuple[str, str]) -> str:
    points = ", ".join(f"{x:.2g}: {y:.0%}" for x, y, _ in curve.points)
    return f"{curve.label}, {names[1]} by {names[0]}: {points}"


# --- elements -----------------------------------------------------------------------------------


def _svg(width: float, height: float, title: str, description: str) -> ET.Element:
    box = {"viewBox": f"0 0 {_n(width)} {_n(height)}", "role": "img", "class": "chart"}
    svg = ET.Element("svg", {**box, "aria-label": title})
    ET.SubElement(svg, "title").text = title
    ET.SubElement(svg, "desc").text = description
    return svg


def _markup(svg: ET.Element) -> str:
    return ET.tostring(svg, encoding="unicode", short_empty_elements=False)


def _n(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")


def _rect(
    svg: ET.Element, x: float, y: float, width: float, height: float, style: str, note: str
) -> None:
    box = {"x": _n(x), "y": _n(y), "width": _n(width), "height": _n(height), "class": style}
    ET.SubElement(ET.SubElement(svg, "rect", box), "title").text = note


def _line(svg: ET.Element, x1: float, y1: float, x2: float, y2: float, style: str) -> None:
    ends = {"x1": _n(x1), "y1": _n(y1), "x2": _n(x2), "y2": _n(y2)}
    ET.SubElement(svg, "line", {**ends, "class": style})


def _text(
    svg: ET.Element, x: float, y: float, text: str, style: str, anchor: str = "start"
) -> ET.Element:
    place = {"x": _n(x), "y": _n(y), "text-anchor": anchor, "class": style}
    element = ET.SubElement(svg, "text", place)
    element.text = text
    return element


def _label(svg: ET.Element, name: str, middle: float) -> None:
    """The name of a row, cut to fit; the full name is its tooltip."""
    short = name if len(name) <= _MAX_LABEL else name[: _MAX_LABEL - 1] + "…"
    element = _text(svg, _LABEL - 10, middle + 4.5, short, "name", anchor="end")
    if short != name:
        ET.SubElement(element, "title").text = name


def _ticks(top: float) -> list[float]:
    """Round values from 0 up to or just below ``top``: four to eight of them."""
    if top <= 0:
        return [0.0, 1.0]
    rough = top / 5
    power = 10.0 ** floor(log10(rough))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= rough * 0.999)
    return [step * i for i in range(floor(top / step + 1e-9) + 1)]

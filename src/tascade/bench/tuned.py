"""What a report says of a tuned model: its new tokens, the steps they save, and the gate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from tascade.bench.charts import Curve, steps_chart
from tascade.config import current_keys

Json = Mapping[str, Any]
_DASH = "–"


@dataclass(frozen=True, slots=True)
class GateRow:
    """One thing the gate looks at, as text; ``passed`` is ``None`` where nothing is bounded."""

    name: str
    tuned: str
    base: str
    control: str
    bound: str
    passed: bool | None


@dataclass(frozen=True, slots=True)
class TunedView:
    """A tuned model as the template shows it."""

    claim: str
    note: str
    passed: bool
    failures: Sequence[str]
    rows: Sequence[GateRow]
    chart: Markup


def tuned_view(tuning: Json, tokens: Json) -> TunedView:
    """From ``tuning.json`` and ``tokens.json``, which lie beside an exported model.

    Raises:
        KeyError: something is missing from them.
    """
    gate = tuning["gate"]
    bounds = current_keys(tuning["recipe"]["gate"], "tune.gate.", stored=True)
    return TunedView(
        claim=f"{gate['fewer_steps']:.2f}×",
        note=f"{tuning['tokens']} new tokens; {tuning['predicted_fewer_steps']:.2f}× was predicted "
        f"before anything was trained. Measured on {gate['rows']:,} held-out prompts that nothing "
        "was learned from.",
        passed=gate["passed"],
        failures=gate["failures"],
        rows=_rows(gate, bounds),
        chart=Markup(_chart(tokens["curve"], tuning["tokens"])),
    )


def _rows(gate: Json, bounds: Json) -> list[GateRow]:
    drop, longer = bounds["max_score_drop"], bounds["max_length_ratio"]
    rows = [
        GateRow(
            "task score",
            _percent(gate["score"]),
            _percent(gate["base_score"]),
            _percent(gate["control_score"]),
            f"at most {100 * drop:g} points lower",
            _lost(gate["against_base"]) <= drop and _lost(gate["against_control"]) <= drop,
        ),
        GateRow("… less the base model's", _points(gate["against_base"]), "", "", "", None),
    ]
    if gate["against_control"]:
        rows.append(
            GateRow("… less LoRA's alone", _points(gate["against_control"]), "", "", "", None)
        )
    rows += [
        _least("same answer as the base model", gate, "agreement", bounds["min_agreement"]),
        _least("steps saved, of those possible", gate, "adoption", bounds["min_adoption"]),
        GateRow(
            "length in bytes, of the base model's",
            f"{gate['bytes_ratio']:.3f}",
            "1",
            _DASH,
            f"{1 / longer:.2f} to {longer:.2f}",
            1 / longer <= gate["bytes_ratio"] <= longer,
        ),
    ]
    if gate["valid"] is not None:
        rows.append(
            GateRow(
                "valid JSON",
                _percent(gate["valid"]),
                _percent(gate["base_valid"]),
                _DASH,
                f"at most {100 * drop:g} points lower",
                gate["valid"] - gate["base_valid"] >= -drop,
            )
        )
    rows.append(
        GateRow(
            "KL divergence on other text, nats a token",
            f"{gate['drift']:.3f}",
            "0",
            _DASH,
            f"at most {bounds['max_kl']:g}",
            gate["drift"] <= bounds["max_kl"],
        )
    )
    return rows


def _least(name: str, gate: Json, key: str, bound: float) -> GateRow:
    beside = _percent(gate.get(f"control_{key}"))
    return GateRow(
        name, _percent(gate[key]), _DASH, beside, f"at least {bound:.0%}", gate[key] >= bound
    )


def _lost(interval: Json | None) -> float:
    return -float(interval["value"]) if interval else 0.0


def _percent(share: float | None) -> str:
    return _DASH if share is None else f"{share:.1%}"


def _points(interval: Json) -> str:
    value, low, high = (100 * interval[key] for key in ("value", "low", "high"))
    return f"{value:+.1f} points (95%: {low:+.1f} to {high:+.1f})"


def _chart(curve: Json, chosen: int) -> str:
    """Predicted steps by the number of tokens, as a share of the base model's."""
    points = [
        (float(size), steps / curve["steps"][0], 3.0 if size == chosen else 1.0)
        for size, steps in zip(curve["sizes"], curve["steps"], strict=True)
    ]
    return steps_chart([Curve("predicted", "m1", tuple(points))], "Steps an answer takes")

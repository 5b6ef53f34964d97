"""Writes the table of TASC-ft between its markers in docs/results.md, from tune_pilot's JSON.

python benchmarks/tune_table.py benchmarks/tune_pilot.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from pilot_table import put_into

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent / "docs" / "results.md"
BEGIN, END = "<!-- tune -->", "<!-- /tune -->"
HEAD = (
    "task",
    "new tokens",
    "fewer steps",
    "adoption",
    "exact match: base, LoRA alone, **tuned**",
    "tuned less LoRA alone, points [95%]",
    "same answer as base: LoRA alone, tuned",
    "tasc-ft against plain",
    "a speed-up for each step saved",
    "8 together",
    "tasc-spec",
    "tasc-ft+spec",
)


def times(ratio: dict[str, float]) -> str:
    return f"{ratio['median']:.2f}x [{ratio['low']:.2f}-{ratio['high']:.2f}]"


def row(result: dict[str, Any]) -> list[str]:
    test, speed = result["test"], result["speed"]
    one, eight = speed["batch_1"], speed["batch_8"]
    gap = test["against_control"]
    steps = one["base"]["forwards"] / one["tuned"]["forwards"]
    return [
        result["task"],
        str(result["tuning"]["tokens"]),
        f"**{test['fewer_steps']:.2f}x**",
        f"{test['adoption']:.1%}",
        f"{test['base_score']:.1%}, {test['control_score']:.1%}, **{test['score']:.1%}**",
        f"{100 * gap['value']:+.1f} [{100 * gap['low']:+.1f} to {100 * gap['high']:+.1f}]",
        f"{test['control_agreement']:.0%}, {test['agreement']:.0%}",
        f"**{times(one['tuned']['speedup'])}**",
        f"{one['tuned']['speedup']['median'] / steps:.2f}",
        times(eight["tuned"]["speedup"]),
        times(one["base+spec"]["speedup"]),
        f"**{times(one['tuned+spec']['speedup'])}**",
    ]


def table(report: dict[str, Any]) -> str:
    lines = [f"| {' | '.join(HEAD)} |", "|---" + "|---:" * (len(HEAD) - 1) + "|"]
    lines += [f"| {' | '.join(row(result))} |" for result in report["results"]]
    spent = ", ".join(
        f"{r['task']} {r['spent']['seconds'] / 60:.0f} min"
        + (" (the last part, after lessons and control)" if r["spent"].get("resumed") else "")
        for r in report["results"]
    )
    rows = ", ".join(f"{r['test']['rows']} of {r['task']}" for r in report["results"])
    lines += [
        "",
        f"Test rows that nothing was learned or chosen from ({rows}); speeds on 48 of them, "
        f"medians of five rounds in turns [extremes]. Tuning with its control took {spent} on "
        f"{report['machine']['threads']} threads of {report['machine']['cpu']}. "
        f"`{report['command']}`, `benchmarks/tune_pilot.json`.",
    ]
    return "\n".join(lines)


def render(path: Path = HERE / "tune_pilot.json") -> str:
    return table(json.loads(path.read_bytes()))


def main() -> None:
    made = render(Path(sys.argv[1]))
    PAGE.write_text(put_into(PAGE.read_text(), made, BEGIN, END))


if __name__ == "__main__":
    main()

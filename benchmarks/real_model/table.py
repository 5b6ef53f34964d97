"""The README's first table, from the JSON that ``benchmarks/real_model/run.py`` wrote.

python benchmarks/real_model/table.py            # prints the table
python benchmarks/real_model/table.py --write    # puts it into README.md and docs/index.md
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from pilot_table import machine_line, put_into, ratio  # noqa: E402

RESULTS, ROOT = HERE / "results", HERE.parents[1]
PAGES = ("README.md", "docs/index.md")
BEGIN, END = "<!-- real -->", "<!-- /real -->"
COLUMNS = (
    "task",
    "plain, tokens/s",
    "tasc-spec against plain",
    "tokens per step",
    "against tasc-paper",
    "against prompt lookup",
    "own answers in the index",
    "answers equal to plain's: timed, all as chains, all as trees",
)


def results() -> dict[str, dict[str, Any]]:
    """By task: the bench's JSON, and those of training and rounding beside it."""
    found = {}
    for path in sorted(RESULTS.glob("*-rounding.json")):
        task = path.stem.removesuffix("-rounding")
        found[task] = {
            "bench": json.loads((RESULTS / f"{task}.json").read_bytes()),
            "rounding": json.loads(path.read_bytes()),
        }
    return found


def row(task: str, made: dict[str, Any]) -> list[str]:
    bench, counted = made["bench"], made["rounding"]["agreeing"]
    methods = bench["methods"]
    ours = methods["tasc-spec"]
    versus, own = ours["versus"], made["rounding"]["own_answers"]
    equal = f"{ours['identical']} of {ours['identical'] + ours['differing']}"
    for way in ("chains", "trees"):
        equal += f", {counted[way]} of {counted['rows']}"
    return [
        task,
        f"{methods['plain']['tokens_per_second']:.0f}",
        f"**{ratio(ours['speedup'])}**",
        f"{ours['tokens_per_step']:.2f}",
        ratio(versus.get("tasc-paper")),
        ratio(versus.get("hf-prompt-lookup")),
        f"{own['answered']} of {own['prompts']}",
        equal,
    ]


def render() -> str:
    """The table and what it was measured on, as Markdown."""
    found = results()
    rows = [row(task, made) for task, made in found.items()]
    lines = [
        "| " + " | ".join(COLUMNS) + " |",
        "|---|" + "---:|" * 6 + "---|",
        *("| " + " | ".join(cells) + " |" for cells in rows),
    ]
    first = next(iter(found.values()))["bench"]
    about = (
        "Medians over the repeats of one run in which the methods take turns [extremes]; test rows "
        f"that nothing was learned from, bfloat16, batch 1, greedy, {machine_line(first)}. Every "
        "method that learns from outputs had the same answers. "
        "`python benchmarks/real_model/run.py`; JSON in `benchmarks/real_model/results/`."
    )
    return "\n".join([*lines, "", about])


def main() -> None:
    table = render()
    print(table)
    if "--write" in sys.argv[1:]:
        for page in PAGES:
            path = ROOT / page
            path.write_text(put_into(path.read_text(), table, BEGIN, END))


if __name__ == "__main__":
    main()

"""The pilot's table in docs/results.md, from the JSON that ``benchmarks/main_path.py`` wrote.

    python benchmarks/pilot_table.py            # prints the table
    python benchmarks/pilot_table.py --write    # puts it into docs/results.md

Every figure is read from ``benchmarks/results/<task>-<dtype>.json``; none is typed by hand. Speed
is shown for the dtype in which the speed-up is the larger; equality for both.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
PAGE = HERE.parent / "docs" / "results.md"
BEGIN, END = "<!-- results -->", "<!-- /results -->"
DTYPES = ("float32", "bfloat16")
TASKS = ("text_to_sql_advising", "multilabel_nlupp", "dst_sgd", "data_to_text_rnnlg")
"""As ``main_path.py`` has them; other tasks follow in alphabetical order."""

OURS, PAPER, GENERATE, ARCTIC = "tasc-spec", "tasc-paper", "hf-generate", "arctic-suffix"
COLUMNS = (
    "task",
    "dtype",
    "plain, tokens/s",
    "tasc-spec against plain",
    "tokens per step",
    "against hf-generate",
    "against arctic-suffix, its best setting",
    "against tasc-paper",
    "equal outputs, float32",
    "equal outputs, bfloat16",
)
NONE = "Not measured yet: `python benchmarks/main_path.py` writes the figures."

Result = Mapping[str, Any]


def load(folder: Path) -> dict[str, dict[str, Result]]:
    """Results by task, then dtype."""
    found: dict[str, dict[str, Result]] = {}
    for path in sorted(folder.glob("*.json")):
        task, _, dtype = path.stem.rpartition("-")
        if not task or dtype not in DTYPES:
            raise SystemExit(f"{path}: the name is not <task>-<{'|'.join(DTYPES)}>.json")
        result = json.loads(path.read_bytes())
        if result["dtype"] != dtype:
            raise SystemExit(f"{path}: holds a run in {result['dtype']}")
        found.setdefault(task, {})[dtype] = result
    known = [task for task in TASKS if task in found]
    return {task: found[task] for task in [*known, *sorted(set(found) - set(known))]}


def render(folder: Path = RESULTS) -> str:
    """The table and what it was measured on, as Markdown."""
    tasks = load(folder)
    if not tasks:
        return NONE
    rows = [row(task, by_dtype) for task, by_dtype in tasks.items()]
    numbers = (False, False, *[True] * 6, False, False)
    lines = [
        "| " + " | ".join(COLUMNS) + " |",
        "|" + "|".join("---:" if number else "---" for number in numbers) + "|",
        *("| " + " | ".join(cells) + " |" for cells in rows),
    ]
    results = [result for by_dtype in tasks.values() for result in by_dtype.values()]
    return "\n".join([*lines, "", *about(results)])


def row(task: str, by_dtype: Mapping[str, Result]) -> list[str]:
    dtype = max(by_dtype, key=lambda name: by_dtype[name]["methods"][OURS]["speedup"]["median"])
    methods = by_dtype[dtype]["methods"]
    ours = methods[OURS]
    versus = ours["versus"]
    return [
        f"`{task}`",
        dtype,
        f"{methods['plain']['tokens_per_second']:.0f}",
        f"**{ratio(ours['speedup'])}**",
        f"{ours['tokens_per_step']:.2f}",
        ratio(versus.get(GENERATE)),
        best_arctic(methods, versus),
        ratio(versus.get(PAPER)),
        *(equality(by_dtype.get(name)) for name in DTYPES),
    ]


def ratio(value: Mapping[str, float] | None) -> str:
    if value is None:
        return "not run"
    return f"{value['median']:.2f}x [{value['low']:.2f}-{value['high']:.2f}]"


def best_arctic(methods: Mapping[str, Any], versus: Mapping[str, Any]) -> str:
    """Against the fastest of Arctic's settings that ran."""
    ran = [name for name in versus if name.startswith(ARCTIC)]
    if not ran:
        return "not run"
    best = max(ran, key=lambda name: methods[name]["tokens_per_second"])
    settings = methods[best]["settings"]
    keys = ("max_tree_depth", "max_spec_factor", "max_spec_tokens")
    return f"{ratio(versus[best])} ({', '.join(f'{settings[key]:g}' for key in keys)})"


def equality(result: Result | None) -> str:
    if result is None:
        return "not run"
    ours = result["methods"][OURS]
    rows = ours["identical"] + ours["differing"]
    text = f"{ours['identical']} of {rows}"
    if not ours["differing"]:
        return text
    return f"{text}; {ours['differing']} differ, {ours['near_ties']} of them near ties"


def about(results: Sequence[Result]) -> list[str]:
    """What the figures are, what they were measured on, and the command."""
    shown = "[low-high]: the extremes of the repeats, or their quartiles from 8 repeats on"
    return [
        "Ratios are of tokens per second, medians over the repeats of one run in which the methods "
        f"take turns ({shown}). Equal outputs: test rows whose output is plain decoding's, token "
        "for token, in every repeat.",
        "",
        *(f"- Machine: {machine}" for machine in distinct(results, machine_line)),
        *(f"- Settings: {settings}" for settings in settings_lines(results)),
        "- Command: `python benchmarks/main_path.py`; each JSON holds that of its own run.",
    ]


def distinct(results: Sequence[Result], line: Any) -> list[str]:
    return list(dict.fromkeys(line(result) for result in results))


def machine_line(result: Result) -> str:
    m = result["machine"]
    return (
        f"{m['cpu']}, {m['threads']} threads of {m['cores']} cores, {m['memory_gb']:g} GB, "
        + (f"{m['accelerator']}, " if "accelerator" in m else "")
        + f"Python {m['python']}, torch {m['torch']}, transformers {m['transformers']}, "
        f"tascade {m['tascade']}"
    )


def settings_lines(results: Sequence[Result]) -> list[str]:
    """A line for all with like settings, which may differ in their number of repeats."""
    repeats: dict[str, set[int]] = {}
    for result in results:
        s = result["settings"]
        how = "greedy" if s["temperature"] == 0 else f"temperature {s['temperature']:g}"
        line = (
            f"model {result['model']}, {result['data']['examples']} test rows, batch {s['batch']}, "
            f"{how}, at most {s['max_new_tokens']} new tokens"
        )
        repeats.setdefault(line, set()).add(s["repeats"])
    return [
        f"{line}, {' or '.join(map(str, sorted(counts)))} repeat{'s' * (max(counts) > 1)}"
        for line, counts in repeats.items()
    ]


def put_into(text: str, table: str, opening: str = BEGIN, closing: str = END) -> str:
    """The text with everything between the markers replaced.

    Raises:
        SystemExit: the markers are not there once each, in order.
    """
    before, begin, rest = text.partition(opening)
    _, end, after = rest.partition(closing)
    if not begin or not end or opening in rest or closing in after:
        raise SystemExit(f"the page must hold {opening} and, after it, {closing}, once each")
    return f"{before}{opening}\n{table}\n{closing}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--write", action="store_true", help="replace the table in the page")
    options = parser.parse_args()
    table = render(options.results)
    if options.write:
        text = put_into(options.page.read_text(encoding="utf-8"), table)
        options.page.write_text(text, encoding="utf-8")
    else:
        print(table)


if __name__ == "__main__":
    main()

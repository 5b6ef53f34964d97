"""The tables of docs/which.md and README.md: tascade beside what its users would run instead.

    python benchmarks/peers_table.py            # prints them
    python benchmarks/peers_table.py --write    # puts them between their markers

Every figure is read from ``benchmarks/peers/<task>.json``, which ``vllm_path.py`` wrote.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from pilot_table import put_into, ratio

HERE = Path(__file__).resolve().parent
PAGES = (HERE.parent / "README.md", HERE.parent / "docs" / "which.md")
BEGIN, END = "<!-- peers -->", "<!-- /peers -->"
NAMES = {
    "plain": "vLLM",
    "ngram": "vLLM, its n-gram drafter",
    "suffix": "vLLM, its suffix decoding, warm with the same answers",
    "tascade": "**vLLM with tascade**",
    "loop": "**tascade alone** (one at a time)",
    "llama": "llama.cpp, bfloat16",
    "llama-lookup": "llama.cpp, bfloat16, n-gram drafts",
    "llama-q8": "llama.cpp, 8 bits",
    "llama-q4": "llama.cpp, 4 bits",
}
OURS = ("tascade", "loop")


def cell(result: dict[str, Any], method: str) -> str:
    """Tokens a second, and how much faster the faster of ours was in the same repeats."""
    rows = result["methods"]
    if method not in rows:
        return ""
    text = f"{rows[method]['tokens_per_second']:.0f}"
    ours = [name for name in OURS if name in rows]
    best = max(ours, key=lambda name: rows[name]["tokens_per_second"])
    if method in OURS:
        return f"**{text}**" if method == best else text
    return f"{text} ({ratio(result[f'{best}_against'][method])})"


def told(results: list[dict[str, Any]], method: str, count: str) -> str:
    rows = [result["methods"][method] for result in results if method in result["methods"]]
    asked = sum(row["identical"] + row["differing"] for row in rows)
    return f"{sum(row[count] for row in rows)} of {asked}"


def table(report: dict[str, Any]) -> list[str]:
    results = report["results"]
    at = [f"{result['concurrency']} at a time" for result in results]
    columns = [report["settings"]["task"], *at, "same words as vLLM", "the reference"]
    lines = ["| " + " | ".join(columns) + " |", "|---|" + "---:|" * (len(columns) - 1)]
    for method, name in NAMES.items():
        if method in results[0]["methods"]:
            cells = [name, *(cell(result, method) for result in results)]
            cells += [told(results, method, "identical"), told(results, method, "references")]
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def render(folder: Path = HERE / "peers") -> str:
    """The tables and what they were measured on, as Markdown."""
    reports = [json.loads(path.read_bytes()) for path in sorted(folder.glob("*.json"))]
    lines: list[str] = []
    for report in reports:
        lines += [*table(report), ""]
    machine, settings = reports[0]["machine"], reports[0]["settings"]
    lines.append(
        "Tokens a second, median of the repeats; in brackets how much faster the faster of "
        "tascade's two was [extremes]. SmolLM2-135M fine-tuned on the task, vLLM "
        f"{machine['vllm']} and tascade in {settings['dtype']}, {machine['threads']} threads of "
        f"{machine['cpu']}, greedy, at most {settings['max_tokens']} tokens, test rows that "
        "nothing was learned from, in turns; prefixes kept by all. tascade's index held "
        f"{settings['suffix_warmed_with']}. `python benchmarks/vllm_path.py`, JSON in "
        "`benchmarks/peers/`."
    )
    return "\n".join(lines)


def main() -> None:
    made = render()
    print(made)
    if "--write" in sys.argv[1:]:
        for page in PAGES:
            page.write_text(put_into(page.read_text(encoding="utf-8"), made, BEGIN, END))


if __name__ == "__main__":
    main()

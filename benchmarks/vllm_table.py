"""The vLLM table of docs/results.md, from the JSON that ``benchmarks/vllm_path.py`` wrote.

python benchmarks/vllm_table.py --write
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from pilot_table import put_into

HERE = Path(__file__).parent
BEGIN, END = "<!-- vllm -->", "<!-- /vllm -->"


def ratio(found: dict[str, float] | None) -> str:
    if found is None:
        return ""
    return f"{found['median']:.2f}x [{found['low']:.2f}-{found['high']:.2f}]"


def row(name: str, result: dict[str, Any]) -> str:
    against, methods = result["tascade_against"], result["methods"]
    ours = methods["tascade"]
    same = f"{ours['identical']} of {ours['identical'] + ours['differing']}"
    cells = [
        name,
        str(result["concurrency"]),
        str(result["requests"]),
        f"{methods['plain']['tokens_per_second']:.0f}",
        f"**{ratio(against['plain'])}**",
        ratio(against.get("ngram")),
        ratio(against.get("suffix")),
        ratio(against.get("idle")),
        same,
    ]
    return "| " + " | ".join(cells) + " |"


def render(folder: Path = HERE / "vllm") -> str:
    lines = [
        "| workload | concurrency | requests | plain vLLM, tokens/s "
        "| tascade against plain | against ngram | against suffix, warm "
        "| against a drafter that never drafts | equal outputs |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    machine: dict[str, Any] = {}
    for path in sorted(folder.glob("*.json")):
        report = json.loads(path.read_text())
        if "results" not in report:  # device_draft.py's, which are no runs of vLLM
            continue
        machine = report["machine"]
        name = f"`{path.stem}`"
        lines += [row(name, result) for result in report["results"]]
    lines += [
        "",
        f"vLLM {machine['vllm']} on {machine['threads']} threads of {machine['cpu']}, float32, "
        "greedy, medians of the repeats in turns [low-high]; `python benchmarks/vllm_path.py`. "
        "Every repeat has test rows of its own, which no method has met before; the suffix drafter "
        "had answered the training prompts. `incompressible`: random prompts to the model with a "
        "shuffled head.",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=HERE / "vllm")
    parser.add_argument("--page", type=Path, default=HERE.parent / "docs" / "results.md")
    parser.add_argument("--write", action="store_true", help="replace the table in the page")
    options = parser.parse_args()
    found = render(options.results)
    print(found)
    if options.write:
        text = put_into(options.page.read_text(), found, BEGIN, END)
        options.page.write_text(text)


if __name__ == "__main__":
    main()

"""Write the table of lines per room into docs/design.md: ``python docs/generate_house.py``."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).with_name("design.md")
SRC = Path(__file__).resolve().parents[1] / "src" / "tascade"
SYSTEMS = {
    "TASC-spec": ("draft/ngram",),
    "TASC-ft": ("enrich",),
    "VocabTailor": ("tailor",),
    "drafters that are networks": ("draft/neural",),
    "shared: what outputs contain": ("index",),
    "shared: how much to draft": ("draft",),
    "shared: decode and verify": ("decode",),
    "data": ("data",),
    "command line, servers, benchmarks, forecast": (
        "cli",
        "serve",
        "integrations",
        "bench",
        "forecast",
    ),
}


def lines(paths: list[Path]) -> int:
    """How many lines the files have together."""
    return sum(path.read_text().count("\n") for path in paths)


def table() -> str:
    """Lines and files of each system, the more special folder first; the rest is the last row."""
    left = set(SRC.rglob("*.py"))
    whole = len(left), lines(list(left))
    rows = ["| system | in | files | lines |", "|---|---|---:|---:|"]
    for name, folders in SYSTEMS.items():
        here = [path for path in left for folder in folders if (SRC / folder) in path.parents]
        left -= set(here)
        places = " ".join(f"`{folder}/`" for folder in folders)
        rows.append(f"| {name} | {places} | {len(here)} | {lines(here):,} |")
    rows.append(
        f"| the rest | loose modules, `util/`, `bundled/` | {len(left)} | {lines(list(left)):,} |"
    )
    rows.append(f"| all | | {whole[0]} | {whole[1]:,} |")
    return "\n".join(rows)


def main() -> None:
    """Put the table between its marks."""
    text = PAGE.read_text()
    made = re.sub(
        r"(<!-- lines: [^>]*-->\n).*?(\n<!-- end of lines -->)",
        lambda found: f"{found[1]}{table()}{found[2]}",
        text,
        flags=re.DOTALL,
    )
    PAGE.write_text(made)


if __name__ == "__main__":
    main()

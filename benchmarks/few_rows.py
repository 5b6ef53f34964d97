"""A pass of few tokens in float32 on a CPU: linear layers the usual way, and as ``W x^T``.

    python benchmarks/few_rows.py MODEL --json benchmarks/few_rows.json

Passes of tascade's own loop over a chain of so many tokens behind 96 others, the two ways taking
turns, whatever ``tascade.decode.products`` would choose here, which is told beside.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from tascade.bench.machine import machine_info
from tascade.core import DraftTree
from tascade.decode import products
from tascade.decode.target import Target

SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
PAST, TURNS = 96, 30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    target, choose = Target(model), products.sooner
    ways = {"usual": frozenset(), "transposed": frozenset(products.COUNTS)}
    rows = []
    with torch.inference_mode():
        target.begin()
        target.forward([1] * PAST)
        chosen = sorted(choose([m for m in model.modules() if products._plain(m)]))
        for n in SIZES:
            tree = DraftTree.chain([1] * (n - 1)) if n > 1 else None
            times: dict[str, list[float]] = {way: [] for way in ways}
            for turn in range(TURNS + 2):
                for way, counts in ways.items():
                    products.sooner = lambda layers, counts=counts: counts
                    products._chosen.clear()
                    target.keep(PAST, ())
                    start = time.perf_counter()
                    target.forward([1], tree)
                    if turn > 1:
                        times[way].append(time.perf_counter() - start)
            ratio = np.divide(times["usual"], times["transposed"])
            row = {way: float(np.median(each)) for way, each in times.items()}
            low, middle, high = np.percentile(ratio, (25, 50, 75)).tolist()
            rows.append({"tokens": n, **row, "gain": {"median": middle, "low": low, "high": high}})
            print(rows[-1], flush=True)
    report = {
        "command": "python benchmarks/few_rows.py MODEL",
        "model": Path(options.model).name,
        "machine": machine_info(),
        "chosen_here": chosen,
        "passes": rows,
    }
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()

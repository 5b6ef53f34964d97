"""A pass of few tokens in float32 on a CPU: the model's own products, and tascade's.

    python benchmarks/few_rows.py MODEL --json benchmarks/few_rows.json

Passes of tascade's own loop over a chain of so many tokens behind 96 others, in turns: the linear
layers' own products; tascade's, which read the weights as they are; and those that read a copy in
half the bytes, for a checkpoint in bfloat16. What ``tascade.decode.products`` would choose here is
told beside.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from tascade.bench.machine import machine_info
from tascade.core import DraftTree
from tascade.decode import products
from tascade.decode.target import Target

SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
PAST, TURNS = 96, 30
Made = products._Products


def made(model: Any, counts: frozenset[int] | None = None, *, copy: bool = True) -> Made:
    """A model's products, used at these counts; by default where they are sooner."""
    choose, most = products.sooner, products._MOST_COPIED
    try:
        if counts is not None:
            products.sooner = lambda layers: counts
        products._MOST_COPIED = most if copy else 0
        return Made(model)
    finally:
        products.sooner, products._MOST_COPIED = choose, most


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    target, everywhere = Target(model), frozenset(products.COUNTS)
    began = time.perf_counter()
    chosen = sorted(made(model).counts)
    seconds = time.perf_counter() - began
    ways = {
        "usual": made(model, frozenset()),
        "floats": made(model, everywhere, copy=False),
        "halves": made(model, everywhere),
    }
    exact = sum(product.halves is not None for product in ways["halves"].products)
    rows = []
    with torch.inference_mode():
        target.begin()
        target.forward([1] * PAST)
        for n in SIZES:
            tree = DraftTree.chain([1] * (n - 1)) if n > 1 else None
            times: dict[str, list[float]] = {way: [] for way in ways}
            for turn in range(TURNS + 2):
                for way, ours in ways.items():
                    products._made[model] = ours
                    target.keep(PAST, ())
                    start = time.perf_counter()
                    target.forward([1], tree)
                    if turn > 1:
                        times[way].append(time.perf_counter() - start)
            row: dict[str, Any] = {w: float(np.median(each)) for w, each in times.items()}
            for way in ("floats", "halves"):
                ratio = np.divide(times["usual"], times[way])
                low, middle, high = np.percentile(ratio, (25, 50, 75)).tolist()
                row[f"gain_{way}"] = {"median": middle, "low": low, "high": high}
            rows.append({"tokens": n, **row})
            print(rows[-1], flush=True)
    report = {
        "command": "python benchmarks/few_rows.py MODEL",
        "model": Path(options.model).name,
        "machine": machine_info(),
        "chosen_here": chosen,
        "seconds_to_choose": seconds,
        "layers": len(ways["halves"].products),
        "layers_copied": exact,
        "passes": rows,
    }
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""What the LM head costs at the size of real models: full, tailored, and with deferred checks.

    python benchmarks/tailored_head.py --json benchmarks/tailored_head.json

Random rows in bfloat16, mapped from a safetensors file as a checkpoint's are. ``masked`` is a
token's product with the small head, spread over token ids. ``exact`` is the same for K guesses
and a check of K states by the full head, at the best K for a coverage of 99 %, over the tokens
that come out: a miss throws the guesses behind it away. Extending is by 400 rows, none of which
is there yet. Medians over rounds in which all take turns.

On a GPU (``--device cuda``) the full head's table is there as well; ``exact`` checks with it, and
``streamed`` with a table that stays on the host. ``graph``: the same products and choices as
replays of CUDA graphs, which leaves out what Python and kernel launches take.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from tascade.bench.machine import machine_info
from tascade.decode.sampling import argmax_rows
from tascade.tailor.head import RequestHead
from tascade.tailor.offload.full_head import FullHead
from tascade.tailor.offload.table import RowTable

SHAPES = {"qwen3-1.7b": (151_936, 2048), "llama-3.2-1b": (128_256, 2048)}
STATIC = (1_500, 19_000)
GUESSES = (4, 8, 16, 32, 64)
COVERAGE = 0.99
ROUNDS = 15


def seconds(way: Callable[[], object]) -> float:
    start = time.perf_counter()
    way()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def replayed(way: Callable[[], object], replays: int = 50) -> float:
    """Seconds of a CUDA graph of ``way``, which must not ask the device for a value."""
    for _ in range(3):
        way()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        way()
    graph.replay()
    return seconds(lambda: [graph.replay() for _ in range(replays)]) / replays


def median(values: list[float]) -> float:
    return float(np.median(values))


@torch.inference_mode()
def measure(table: RowTable, static: int, device: str) -> dict[str, Any]:
    rng = np.random.default_rng(1)
    ids = rng.permutation(table.shape[0]).astype(np.int32)
    head = RequestHead(table, ids[:static], device=device)
    streamed, on_host = FullHead(table), device == "cpu"
    there = None if on_host else table.rows.to(device)

    def whole(states: torch.Tensor) -> torch.Tensor:
        return streamed.check(states) if there is None else states @ there.T

    more = ids[static : static + 400]
    states = torch.randn(max(GUESSES), table.shape[1], dtype=table.dtype, device=device)
    nothing = np.empty(0, np.int32)
    times: dict[str, list[float]] = {}

    def note(name: str, way: Callable[[], object]) -> None:
        times.setdefault(name, []).append(seconds(way))

    def come_and_go() -> None:
        head.extend(more)
        head.begin(nothing)

    def check(k: int) -> Callable[[], object]:
        return lambda: argmax_rows(whole(states[:k]))

    for turn in range(ROUNDS + 3):
        note("extend and reset", come_and_go)
        head.extend(more)
        note("small", lambda: head.argmax(head(states[:1])))
        head.begin(nothing)
        note("full", check(1))
        for k in GUESSES:
            note(f"check {k}", check(k))
        if not on_host:
            note("streamed", lambda: argmax_rows(streamed(states)))
        if turn == 2:
            times.clear()  # the first rounds warm up
    found = {name: median(values) for name, values in times.items()}
    exact = {}
    for k in GUESSES:
        out = (1 - COVERAGE**k) / (1 - COVERAGE)
        exact[k] = (k * found["small"] + found[f"check {k}"]) / out
    best = min(exact, key=lambda k: exact[k])
    graphs = {}
    if not on_host:
        graphs["full"] = replayed(lambda: whole(states[:1]).argmax(-1))
        graphs["small"] = replayed(lambda: head.spread(head(states[:1])).argmax(-1))
        graphs["times_less"] = graphs["full"] / graphs["small"]
    return {
        "static_rows": static,
        "seconds": found,
        "extend_reset_ms": 1e3 * found["extend and reset"],
        "masked_times_less": found["full"] / found["small"],
        "exact_times_less": found["full"] / exact[best],
        "exact_guesses": best,
        **({"graph": graphs} if graphs else {}),
        "vocabulary_bytes": {"full": table.nbytes, "tailored": head.nbytes},
        "saved": 1 - head.nbytes / table.nbytes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    options = parser.parse_args()
    results = []
    for shape, (rows, width) in SHAPES.items():
        with tempfile.TemporaryDirectory() as folder:
            weight = torch.randn(rows, width, dtype=torch.bfloat16) / 45
            save_file({"lm_head.weight": weight}, Path(folder) / "model.safetensors")
            del weight
            table = RowTable.from_checkpoint(folder, "lm_head.weight")
            results += [
                {"shape": shape, **measure(table, static, options.device)} for static in STATIC
            ]
    report = {
        "command": " ".join(["python", *sys.argv]),
        "machine": machine_info(),
        "settings": {
            "coverage": COVERAGE,
            "rounds": ROUNDS,
            "dtype": "bfloat16",
            "device": options.device,
        },
        "results": results,
    }
    text = json.dumps(report, indent=1) + "\n"
    print(text)
    if options.json:
        options.json.write_text(text)


if __name__ == "__main__":
    main()

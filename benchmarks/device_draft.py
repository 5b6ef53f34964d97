"""The device's drafts: equal to the numba kernels', what they hold and what they read.

    python benchmarks/device_draft.py equal --json benchmarks/vllm/device_equal.json
    python benchmarks/device_draft.py traffic --json benchmarks/vllm/device_traffic.json

Run it with the Python of an environment that holds Triton and tascade (`.venv-vllm`). It needs no
GPU: Triton's interpreter runs the kernel, about a second a context. ``equal`` compares drafts and
odds for random contexts on three indexes. ``traffic`` counts, for indexes of several sizes, the
bytes held on the device and those that a program loads for a request, by kind of its number."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "vllm"))

import device_rows
import numpy as np

KINDS = {"one shard": (1, 20_000), "five shards": (5, 50_000), "a million tokens": (1, 1_000_000)}


def equal(options: argparse.Namespace) -> dict[str, Any]:
    """Drafts and odds for random contexts, on each kind of index."""
    found = {}
    for seed, (name, (shards, tokens)) in enumerate(KINDS.items(), options.seed):
        count = -(-options.contexts // len(KINDS))
        result = device_rows.compare(shards, tokens, count, options.drafted, seed)
        found[name] = {**result, "differ": len(result["differ"])}
        print(name, found[name], flush=True)
    return found


class Loads:
    """Counts what the interpreter loads while it is open."""

    def __init__(self) -> None:
        from triton.runtime.interpreter import InterpreterBuilder

        self._builder, self._theirs = InterpreterBuilder, InterpreterBuilder.create_masked_load
        self.bytes = self.calls = self.lines = 0

    def __enter__(self) -> Loads:
        def counted(builder: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
            loaded = self._theirs(builder, pointers, mask, *rest)
            asked = np.broadcast_to(mask.data.astype(bool), pointers.data.shape)
            places = pointers.data[asked]
            self.bytes += places.size * loaded.data.dtype.itemsize
            self.lines += len(np.unique(places // 32))
            self.calls += 1
            return loaded

        self._builder.create_masked_load = counted
        return self

    def __exit__(self, *_: object) -> None:
        self._builder.create_masked_load = self._theirs


def traffic(options: argparse.Namespace) -> dict[str, Any]:
    """Bytes held, and loaded for a request, by the index's size in tokens."""
    found = {}
    for tokens in options.sizes:
        with Loads() as loads:
            result = device_rows.compare(1, tokens, options.rows, options.drafted, options.seed)
        rows, drafted = result["rows"], result["drafted"]
        found[str(tokens)] = {
            "index_bytes": result["index_bytes"],
            "bytes_a_token": result["index_bytes"] / tokens,
            "drafted_a_row": drafted / rows,
            "loaded_bytes_a_row": loads.bytes / rows,
            "sectors_of_32_bytes_a_row": loads.lines / rows,
            "loads_a_row": loads.calls / rows,
        }
        print(tokens, found[str(tokens)], flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("equal", "traffic"))
    parser.add_argument("--contexts", type=int, default=20_000)
    parser.add_argument("--rows", type=int, default=24)
    parser.add_argument("--drafted", type=int, default=8)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10**5, 10**6, 10**7, 10**8])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    given = {"equal": ("contexts",), "traffic": ("rows", "sizes")}[options.what]
    settings = {name: getattr(options, name) for name in (*given, "drafted", "seed")}
    found = (equal if options.what == "equal" else traffic)(options)
    command = f"python benchmarks/device_draft.py {options.what}"
    text = json.dumps({"command": command, "settings": settings, "found": found}, indent=1)
    if options.json:
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()

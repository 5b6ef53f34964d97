"""What reading the prompt takes of an answer, with kept prefixes and without.

    python benchmarks/real_model/prefill.py PACK ROWS.jsonl --json prefill.json

Each row is answered with the pack's drafts, in turns by a loop that keeps what prompts begin with,
by one that reads them whole, and by the first one when nothing is kept yet (``cold``).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from common import opened, spread_of, write

from tascade.decode.loop import Decoder
from tascade.decode.prefixes import Prefixes
from tascade.decode.target import Target

ROUNDS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pack")
    parser.add_argument("rows")
    parser.add_argument("--count", type=int, default=16)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    task, prompts = opened(options.pack, options.rows, options.count)
    known = task.pack.info.prefixes
    params = task.params(temperature=0)
    targets = {"kept": task.target, "whole": Target(task.model), "cold": Target(task.model)}
    seconds: dict[str, list[float]] = {name: [] for name in targets}
    prefill: dict[str, list[float]] = {name: [] for name in targets}
    for turn in range(ROUNDS + 1):
        whole: dict[str, Any] = {name: 0.0 for name in targets}
        read: dict[str, Any] = {name: 0.0 for name in targets}
        for prompt in prompts:
            for name, target in targets.items():
                if name == "cold":
                    target.prefixes = Prefixes(known)
                decoder = Decoder(target, task.new_drafter(), task.new_budget(), task.tokenizer)
                said = decoder.generate(prompt, params)
                whole[name] += said.seconds
                read[name] += said.prefill_seconds
        for name in targets:
            if turn:  # the first one warms up
                seconds[name].append(whole[name] / len(prompts))
                prefill[name].append(read[name] / len(prompts))
    report = {
        "rows": len(prompts),
        "prompt_tokens": round(float(np.mean([len(p) for p in prompts])), 1),
        "known_prefixes": [len(ids) for ids in known],
        "bytes_held": task.target.prefixes.bytes,
        "seconds_an_answer": {name: spread_of(each, 4) for name, each in seconds.items()},
        "seconds_of_prefill": {name: spread_of(each, 4) for name, each in prefill.items()},
        "prefill_share": {
            name: spread_of([a / b for a, b in zip(prefill[name], seconds[name], strict=True)], 4)
            for name in targets
        },
    }
    write(report, options.json)


if __name__ == "__main__":
    main()

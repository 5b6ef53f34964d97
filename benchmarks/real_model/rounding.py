"""How many drafted answers are plain decoding's, and what equal rounding costs a step.

    python benchmarks/real_model/rounding.py PACK ROWS.jsonl --json rounding.json

Each row is answered by plain decoding, with the pack's drafts as chains, as trees, and in batches
of eight without drafts. Then the same once more with passes of any count of rows and keys, as they
were before (``free``), where ``--free`` rows are asked. Times of a step are in turns.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from common import opened, spread_of, write

from tascade.core import DraftTree
from tascade.data.prepare import spread
from tascade.decode.batch import BatchDecoder
from tascade.decode.batch_target import BatchTarget
from tascade.decode.loop import AllNodes, Decoder, Request
from tascade.decode.sampling import argmax_of
from tascade.decode.target import Target
from tascade.draft.budget import NoDrafter
from tascade.model import TaskModel

SIZES, ROUNDS, PAST, NODES = (1, 8, 16, 24, 32), 15, 200, 24


class ChainDecoder(Decoder):
    """Verifies the likeliest path of each tree alone."""

    def propose(self, request: Request, unread: int) -> tuple[DraftTree, float]:
        tree, seconds = super().propose(request, unread)
        nodes = range(len(tree))
        return tree.first(next((i for i in nodes if tree.parents[i] != i - 1), len(tree))), seconds


def answers(task: TaskModel, target: Target, prompts: list[Any], trees: bool | None) -> list[Any]:
    """Answers by plain decoding (``None``), with trees, or with chains."""
    params, found = task.params(temperature=0), []
    kind = ChainDecoder if trees is False else Decoder
    for prompt in prompts:
        drafter = NoDrafter() if trees is None else task.new_drafter()
        decoder = kind(target, drafter, AllNodes(NODES), task.tokenizer)
        found.append(decoder.generate(prompt, params).tokens)
    return found


def equal(a: list[Any], b: list[Any]) -> int:
    return sum(x == y for x, y in zip(a, b, strict=True))


def counted(task: TaskModel, target: Target, prompts: list[Any]) -> dict[str, int]:
    plain = answers(task, target, prompts, None)
    found = {"rows": len(prompts), "tokens": sum(map(len, plain))}
    for name, trees in (("chains", False), ("trees", True)):
        found[name] = equal(answers(task, target, prompts, trees), plain)
    batches = BatchDecoder(BatchTarget(*target.parts), tokenizer=task.tokenizer, size=8)
    made = batches.generate(prompts, task.params(temperature=0)) if target.key_block > 1 else []
    return found | ({"batches_of_8": equal([a.tokens for a in made], plain)} if made else {})


@torch.inference_mode()
def step_times(targets: dict[str, Target]) -> dict[str, dict[str, list[float]]]:
    """Milliseconds of steps over so many tokens, in turns: median, least and most."""
    found: dict[str, dict[int, list[float]]] = {name: {n: [] for n in SIZES} for name in targets}
    for target in targets.values():
        target.begin()
        target.forward([1] * PAST)
    for turn in range(ROUNDS + 1):
        for n in SIZES:
            for name, target in targets.items():
                target.keep(PAST, ())
                start = time.perf_counter()
                argmax_of(target.forward([1], DraftTree.chain([1] * (n - 1)) if n > 1 else None))(0)
                if turn:
                    found[name][n].append(1e3 * (time.perf_counter() - start))
    return {
        name: {str(n): spread_of(t, 2) for n, t in sizes.items()} for name, sizes in found.items()
    }


def free(model: Any) -> Target:
    """Passes of any count of rows and keys."""
    target = Target(model)
    target._rounds = False
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pack")
    parser.add_argument("rows")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--free", type=int, default=16)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    task, prompts = opened(options.pack, options.rows, options.count)
    began = time.perf_counter()
    task.target.begin()
    looked = time.perf_counter() - began
    counts = task.target.counts
    report = {
        "dtype": str(task.model.dtype),
        "counts": None if counts is None else counts.counts,
        "seconds_to_find_them": round(looked, 2),
        "prefixes": [len(ids) for ids in task.pack.info.prefixes],
        "own_answers": {
            "answered": task.pack.info.own_answers,
            "prompts": sum(s["rows"] for s in task.pack.info.data if s["role"] == "train"),
        },
        "agreeing": counted(task, task.target, prompts),
        "free": counted(task, free(task.model), spread(prompts, options.free)),
        "ms_a_step": step_times({"agreeing": task.target, "free": free(task.model)}),
    }
    write(report, options.json)


if __name__ == "__main__":
    main()

"""What drafting for a whole batch costs: 256 requests over an index of 10M tokens, one call a step.

    python benchmarks/batch_draft.py --json benchmarks/batch_draft.json

Held-out documents of the made-up task of ``index_bench.py`` are replayed as the target's greedy
outputs, behind prompts of random tokens. Every step moves all requests on by what was accepted and
asks for the next drafts; a finished request makes place for a new one. Three budgets: none (every
draft as long as it may be), an engine whose tokens are nearly free, and one where a batch of this
size is busy already (each token more costs half of what a request costs).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from index_bench import END, VOCAB, corpus, quantiles
from tascade.bench.machine import machine_info
from tascade.draft.ngram.batch import BatchDrafter
from tascade.draft.ngram.batch_budget import BatchBudget
from tascade.draft.ngram.mixer_calibration import Calibration
from tascade.draft.ngram.sources import Task
from tascade.index.corpus import CorpusIndex

MOST = 16
PROMPT = 64
LENGTH = 1024
WARM_STEPS = 150
STEPS = 300


class Engine:
    """Plays the target: knows each row's answer and accepts a draft as far as it agrees."""

    def __init__(self, documents: list[list[int]], requests: int) -> None:
        self.documents, self.next = documents, 0
        self.rng = np.random.default_rng(3)
        self.ids = np.zeros((requests, LENGTH), np.int32)
        self.lengths = np.zeros(requests, np.int32)
        self.left: list[list[int]] = [[] for _ in range(requests)]

    def step(self, drafts: list[list[int]]) -> tuple[list[list[int]], int]:
        """Every row's new tokens, and how many tokens requests under way were given."""
        sampled, given = [], 0
        for row, draft in enumerate(drafts):
            if not self.left[row]:
                self.admit(row)
                new = self.left[row][:1]
            else:
                left, n = self.left[row], 0
                while n < len(draft) and n < len(left) - 1 and draft[n] == left[n]:
                    n += 1
                new = left[: n + 1]
                given += len(new)
            self.left[row] = self.left[row][len(new) :]
            at = self.lengths[row]
            self.ids[row, at : at + len(new)] = new
            self.lengths[row] += len(new)
            sampled.append(new)
        return sampled, given

    def admit(self, row: int) -> None:
        self.left[row] = self.documents[self.next % len(self.documents)]
        self.next += 1
        self.ids[row, :PROMPT] = self.rng.integers(3, VOCAB, PROMPT)
        self.lengths[row] = PROMPT


def flat_costs(budget: BatchBudget, requests: int, per_token: float) -> None:
    """Teach a budget an engine's step times: 10 ms, and a share of a request's for each token."""
    for extra in (0, requests, 4 * requests, MOST * requests):
        seconds = 0.010 * (1 + per_token * extra / requests)
        for _ in range(9):
            budget.costs.observe(requests, extra, seconds)


def measure(index: CorpusIndex, held_out: list[list[int]], requests: int, kind: str) -> Any:
    budget = None
    if kind != "none":
        budget = BatchBudget(MOST)
        flat_costs(budget, requests, {"cheap tokens": 0.02, "busy": 0.5}[kind])
    drafter = BatchDrafter(
        [Task(index, calibration=Calibration())],
        end_tokens=(END,),
        requests=requests,
        length=LENGTH,
        most=MOST,
        budget=budget,
    )
    engine = Engine(held_out, requests)
    drafts: list[list[int]] = [[] for _ in range(requests)]
    seconds, tokens, rows, before = [], 0, 0, (0, 0)
    for step in range(WARM_STEPS + STEPS):
        sampled, given = engine.step(drafts)
        begin = time.perf_counter()
        drafts = drafter.propose(sampled, engine.lengths, engine.ids)
        if budget is not None:
            drafter._ended = 0.0  # the made-up step times are not to be unlearned
        if step == WARM_STEPS - 1:
            before = (drafter.stats.drafted, drafter.stats.accepted)
        if step >= WARM_STEPS:
            seconds.append(time.perf_counter() - begin)
            tokens, rows = tokens + given, rows + requests
    drafted, accepted = drafter.stats.drafted - before[0], drafter.stats.accepted - before[1]
    return {
        "budget": kind,
        "step_us": quantiles([s * 1e6 for s in seconds]) | {"mean": float(np.mean(seconds)) * 1e6},
        "tokens_per_row_and_step": tokens / rows,
        "drafted_per_row_and_step": drafted / rows,
        "accepted_of_drafted": accepted / max(drafted, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=10_000_000)
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--index", type=Path, help="keep the index here, or use the one there")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    documents = corpus(options.tokens + 50_000)
    held_out = documents[-500:]
    del documents[-500:]
    with tempfile.TemporaryDirectory() as folder:
        path = options.index or Path(folder) / "index"
        if not path.exists():
            CorpusIndex.build(path, documents, vocab_size=VOCAB, fingerprint="bench")
        index = CorpusIndex.open(path)
        kinds = ("none", "cheap tokens", "busy")
        results = [measure(index, held_out, options.requests, kind) for kind in kinds]
    report = {
        "command": " ".join(["python", *sys.argv]),
        "machine": machine_info(),
        "settings": {"tokens": options.tokens, "requests": options.requests, "most": MOST},
        "results": results,
    }
    print(json.dumps(report, indent=1))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()

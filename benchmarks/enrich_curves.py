"""How many steps new tokens save on held-out outputs, by how they were chosen.

    python benchmarks/enrich_curves.py --shared FOLDER --json benchmarks/enrich_curves.json

Tokens are chosen on the train split's outputs alone; steps are counted on the test split's, which
no choice has seen: the fewest ids that write the output, and the end token. ``paper`` is the loop
of TASC-ft without pruning, ``flat`` the most frequent n-grams without recounting. The last part
times the choice of 500 tokens on a million ids of output.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from pathlib import Path
from typing import Any

from pilot_table import put_into
from tascade.bench.machine import machine_info
from tascade.data.load import load_examples
from tascade.enrich.tokens.curve import best_at, choose_among
from tascade.enrich.tokens.family import TokenizerFamily
from tascade.enrich.tokens.merger import TokenMerger
from tascade.enrich.tokens.mine import Method, MiningRules, OutputCounts, choose

BEGIN, END = "<!-- enrich -->", "<!-- /enrich -->"
TASKS = ("multilabel_nlupp", "text_to_sql_advising", "dst_sgd", "medical_qa_medquad")
SIZES = (50, 150, 300, 500)
METHODS: tuple[Method, ...] = ("best", "pruned", "paper", "flat")


def outputs(options: argparse.Namespace, task: str, split: str, tokenizer: Any) -> list[list[int]]:
    """Ids of a split's outputs, as an answer goes on from its prompt."""
    rows = load_examples(options.shared / "data" / task / f"{split}.jsonl")
    return [tokenizer(row.completion, add_special_tokens=False).input_ids for row in rows]


def curve(options: argparse.Namespace, task: str, tokenizer: Any) -> dict[str, Any]:
    family = TokenizerFamily(tokenizer)
    train = OutputCounts(outputs(options, task, "train", tokenizer))
    validation = OutputCounts(outputs(options, task, "validation", tokenizer))
    test = OutputCounts(outputs(options, task, "test", tokenizer))
    base = test.n_ids + test.n_outputs
    found: dict[str, Any] = {
        "train_ids": train.n_ids,
        "test_outputs": test.n_outputs,
        "test_ids_per_output": test.n_ids / test.n_outputs,
        "fewer_steps": {},
    }
    for method in METHODS:
        fewer = {}
        for size in SIZES:
            rules = MiningRules(tokens=size, method=method)
            begin = time.perf_counter()
            choices = choose_among(train, validation, family.size, rules, family.spell)
            choice = best_at(choices, size)
            tokens = choice.tokens
            seconds = time.perf_counter() - begin
            merger = TokenMerger(tokens, family.size)
            fewer[size] = {
                "fewer": base / test.steps(merger),
                "tokens": len(tokens),
                "rules": f"{choice.rules.method}, {choice.rules.least} times or more",
                "seconds": round(seconds, 2),
            }
        found["fewer_steps"][method] = fewer
        print(task, method, {k: round(v["fewer"], 3) for k, v in fewer.items()}, flush=True)
    return found


def table(tasks: dict[str, Any]) -> str:
    lines = [
        "| task | method | " + " | ".join(map(str, SIZES)) + " |",
        "|---|---|" + "---:|" * len(SIZES),
    ]
    for task, found in tasks.items():
        for method in METHODS:
            cells = [f"{point['fewer']:.2f}x" for point in found["fewer_steps"][method].values()]
            lines.append(f"| {task} | {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def timed(options: argparse.Namespace, tokenizer: Any) -> dict[str, Any]:
    """500 tokens from a million ids of real outputs: the tasks' own, over and over if need be."""
    pool: list[list[int]] = []
    ids = copies = 0
    while ids < 1_000_000:
        for task in TASKS:
            for row in outputs(options, task, "train", tokenizer):
                # Copies are told apart, or they would be counted as one kind.
                pool.append([*row, *([copies] if copies else [])])
                ids += len(row)
        copies += 1
    family, counted = TokenizerFamily(tokenizer), OutputCounts(pool)
    begin = time.perf_counter()
    first = choose(counted, family.size, MiningRules(), family.spell)
    seconds = time.perf_counter() - begin
    again = choose(counted, family.size, MiningRules(), family.spell)
    digest = hashlib.sha256(json.dumps(first).encode()).hexdigest()
    return {
        "ids": counted.n_ids,
        "tokens": len(first),
        "seconds": seconds,
        "same_twice": first == again,
        "sha256": digest,
    }


def main() -> None:
    from transformers import PreTrainedTokenizerFast

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--tokenizer", default="pythia-50k")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--page", type=Path, help="put the table into this page")
    options = parser.parse_args()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(options.shared / "tokenizers" / options.tokenizer / "tokenizer.json")
    )
    report = {
        "command": " ".join(["python", *sys.argv]),
        "machine": machine_info(),
        "tasks": {task: curve(options, task, tokenizer) for task in TASKS},
        "a_million_ids": timed(options, tokenizer),
    }
    print(report["a_million_ids"])
    if options.page:
        text = put_into(options.page.read_text(), table(report["tasks"]), BEGIN, END)
        options.page.write_text(text)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Two drafters within one budget of nodes: tasc-spec's merge beside TAPS' router and trees.

    python benchmarks/taps/budgets.py PACK TEST.jsonl --json budgets.json

PACK has a trained drafter. Everything that is drafted is verified, up to N nodes, and both drafters
are asked at every step: so tokens a step compare the trees alone, and nothing is timed. TAPS (arXiv
2603.27027) chooses the tree whose nodes have the higher mean confidence (the product of the
probabilities along their paths), or verifies both trees side by side, which takes 2N nodes; equal
paths are found whether they stand there once or twice, so here they stand once, and what that saves
is counted. ``concatenated, N/2 each`` is the same within N. Answers must be plain decoding's.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tascade.bench.machine import machine_info
from tascade.core import EMPTY_TREE, ROOT, DraftTree, IntArray, Source
from tascade.data.load import load_examples
from tascade.data.prepare import spread
from tascade.decode.loop import AllNodes, Decoder
from tascade.draft.budget import Budget
from tascade.draft.neural.merged import MergedDrafter
from tascade.draft.neural.trained import TrainedDrafter
from tascade.draft.ngram.drafter import NgramDrafter
from tascade.model import TaskModel

NODES = (8, 16, 32)


def merge(first: DraftTree, second: DraftTree, limit: int) -> DraftTree:
    """The best ``limit`` nodes of two trees, equal paths as one.

    A token that both have below a node is as likely as the surer one says. Where what is below a
    node would then be more than certain, its tokens share what there is.
    """
    if not len(second) or not len(first):
        return (first if len(first) else second).first(limit)
    below: dict[int, dict[int, int]] = {ROOT: {}}
    # Of each node: its parent, its token, its share of the parent's survival, its source.
    nodes: list[list[float]] = []
    for tree in (first, second):
        place: dict[int, int] = {ROOT: ROOT}
        chances: dict[int, float] = {ROOT: 1.0}
        for i, (token, parent, chance, source) in enumerate(tree.rows()):
            above, chances[i] = place[parent], chance
            share = chance / max(chances[parent], 1e-9)
            at = below[above].setdefault(token, len(nodes))
            place[i] = at
            if at == len(nodes):
                nodes.append([above, token, share, source])
                below[at] = {}
            else:
                nodes[at][2:] = max(nodes[at][2], share), Source.BOTH
    survival: dict[int, float] = {ROOT: 1.0}
    for at, node in enumerate(nodes):  # parents come first
        above, share = int(node[0]), node[2]
        total = sum(nodes[child][2] for child in below[above].values())
        survival[at] = survival[above] * share / max(1.0, total)
    order = sorted(range(len(nodes)), key=lambda at: (-survival[at], at))[:limit]
    final = {at: i for i, at in enumerate(order)} | {ROOT: ROOT}
    return DraftTree(
        np.asarray([nodes[at][1] for at in order], np.int32),
        np.asarray([final[int(nodes[at][0])] for at in order], np.int32),
        np.asarray([survival[at] for at in order], np.float32),
        np.asarray([nodes[at][3] for at in order], np.int8),
    )


class Everything(AllNodes):
    """Verifies all that is drafted, and counts what that promised."""

    promised = 0.0

    def choose(self, survival: Any) -> int:
        count = super().choose(survival)
        self.promised += float(survival[:count].sum())
        return count


class Always(Budget):
    """Asks every drafter at every step, verifies all that they draft, and counts its promises."""

    promised = 0.0

    def plan(self) -> tuple[int, float]:
        self.calls_rest = False
        return self.max_nodes, 0.0

    def worth_a_call(self, expected: Any, seconds: Any, other: Any) -> bool:
        return True

    def choose(self, survival: Any) -> int:
        count = min(len(survival), self.max_nodes)
        self.promised += float(survival[:count].sum())
        return count


class TapsBaseline:
    """Both drafters draft by themselves at every step; what is verified, :meth:`tree` says."""

    name = "taps baseline"

    def __init__(self, corpus: NgramDrafter, trained: TrainedDrafter, nodes: int) -> None:
        self.corpus, self.trained, self.nodes = corpus, trained, nodes
        self.saved = self.asked = 0

    def start(self, prompt: IntArray) -> None:
        self.corpus.start(prompt)
        self.trained.start(prompt)

    def propose(self, limit: int, floor: float = 0.0) -> DraftTree:
        first = self.corpus.propose(self.nodes)
        second = self.trained.propose(self.nodes) if self.trained.fits() else EMPTY_TREE
        return self.tree(first, second)

    def tree(self, first: DraftTree, second: DraftTree) -> DraftTree:
        """Both, side by side."""
        both = merge(first, second, len(first) + len(second))
        self.asked += len(first) + len(second)
        self.saved += len(first) + len(second) - len(both)
        return both

    def commit(self, tokens: IntArray, verified: int, path: Sequence[int]) -> None:
        self.corpus.commit(tokens, verified, path)
        self.trained.commit(tokens, verified, path)


class Routed(TapsBaseline):
    """The tree of the higher mean confidence; the first one where they are alike."""

    def tree(self, first: DraftTree, second: DraftTree) -> DraftTree:
        """One of them."""
        means = [float(tree.survival.mean()) if len(tree) else 0.0 for tree in (first, second)]
        return second if means[1] > means[0] else first


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pack")
    parser.add_argument("rows")
    parser.add_argument("--count", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    task = TaskModel.from_pretrained(options.pack, dtype=options.dtype)
    params = task.params(max_new_tokens=options.tokens, temperature=0)
    examples = spread(list(load_examples(options.rows, split="test")), options.count)
    prompts = [task.encode(example.prompt) for example in examples]
    wanted = [task.plain.generate(prompt, params).tokens for prompt in prompts]
    table: dict[str, dict[str, Any]] = {}
    for nodes in NODES:
        for name in (
            "index",
            "network",
            "router",
            "concatenated, N/2 each",
            "concatenated, 2N",
            "merged",
        ):
            corpus, trained = task.new_drafter(), task.new_trained()
            trained.clock, trained.seconds = (lambda: 0.0), 0.0  # depth is not the clock's
            budget: Any = Everything(2 * nodes if name.endswith("2N") else nodes)
            drafter: Any = {
                "index": corpus,
                "network": trained,
                "router": Routed(corpus, trained, nodes),
                "concatenated, N/2 each": TapsBaseline(corpus, trained, nodes // 2),
                "concatenated, 2N": TapsBaseline(corpus, trained, nodes),
            }.get(name)
            if drafter is None:
                budget = Always(task.cost, max_nodes=nodes)
                drafter = MergedDrafter(corpus, trained, budget)
            decoder = Decoder(task.target, drafter, budget, task.tokenizer)
            made = [decoder.generate(prompt, params) for prompt in prompts]
            steps = [step for generation in made for step in generation.steps]
            each = np.array([g.stepped_tokens / max(1, g.forwards) for g in made])
            entry = {
                "tokens_per_step": round(
                    sum(g.stepped_tokens for g in made) / sum(g.forwards for g in made), 3
                ),
                "by_row": [round(float(value), 3) for value in each],
                "promised_per_step": round(budget.promised / max(1, len(steps)), 3),
                "accepted_per_step": round(float(np.mean([s.accepted for s in steps])), 3),
                "nodes_per_step": round(float(np.mean([step.drafted for step in steps])), 2),
                "identical": sum([*g.tokens] == [*w] for g, w in zip(made, wanted, strict=True)),
            }
            if isinstance(drafter, TapsBaseline) and drafter.asked:
                entry["drafted_twice"] = round(drafter.saved / drafter.asked, 3)
            table.setdefault(str(nodes), {})[name] = entry
            print(nodes, name, {k: v for k, v in entry.items() if k != "by_row"}, flush=True)
    if options.json:
        report = {
            "model": task.pack.info.model.rsplit("/", 1)[-1],
            "dtype": options.dtype,
            "rows": len(prompts),
            "tokens": options.tokens,
            "nodes": table,
            "machine": machine_info(),
        }
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()

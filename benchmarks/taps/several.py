"""Drafters of several tasks over one model: chosen by replay, by TAPS' router, or by an oracle.

    python benchmarks/taps/several.py MODEL WORK TRAIN.jsonl TEST.jsonl TRAIN.jsonl TEST.jsonl \\
        --json several.json

For each task (a pair of files) a network is trained on the model's own answers, which WORK keeps as
`learning.py` does. Then streams of test prompts, of one task each and of all in turns, are decoded
with each network alone; with TAPS' router (arXiv 2603.27027: at each step all draft, and the tree
of the higher mean confidence is verified); with the one whose likeliest tokens were right most
often in what was verified so far of this request (replay: one pass of each every few tokens); and,
as a bound, with the better one for each request (oracle). No index drafts beside them. Counts only.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from learning import QUIET, Answering, arguments

from tascade.bench.machine import machine_info
from tascade.core import DraftTree, IntArray
from tascade.data.prepare import spread
from tascade.decode.loop import AllNodes, Decoder
from tascade.decode.prefixes import Prefixes
from tascade.decode.target import Target
from tascade.draft.budget import NoDrafter
from tascade.draft.neural import training
from tascade.draft.neural.trained import TrainedDrafter

NODES, EVERY = 16, 8
"""Nodes a step; verified tokens between two replays."""


class Replayed(TrainedDrafter):
    """Counts how often its likeliest token was right, over all that was verified of a request."""

    def start(self, prompt: IntArray) -> None:
        super().start(prompt)
        self.right, self.seen, self._begin = 0, 0, len(prompt)

    def _catch_up(self) -> tuple[torch.Tensor, int]:
        self.replay()
        return super()._catch_up()

    @torch.inference_mode()
    def replay(self) -> None:
        """Read what was verified since, and count."""
        if not self.fits() or not self._behind():
            return
        words, states = self._unread()
        outputs = self._pass(words, states, self._read, every=True)
        for row, (said, _) in enumerate(self._likeliest(outputs[:-1])):
            if self._read + row + 2 >= self._begin:
                self.right += said[0] == words[row + 1]
                self.seen += 1
        self._read += len(words)
        self._output = outputs[-1, None]


class Several:
    """Drafts with one of some networks, or with what a router takes at each step."""

    name = "several"

    def __init__(self, drafters: Sequence[Replayed], by: str) -> None:
        self.drafters, self.by = drafters, by
        self.before = np.tile((0.5, 1.0), (len(drafters), 1))  # right, and seen

    def start(self, prompt: IntArray) -> None:
        self.before = 0.9 * self.before + [(d.right, d.seen) for d in self.drafters]
        for drafter in self.drafters:
            drafter.start(prompt)
        self.said, self.chosen = 0, int(np.argmax(self.before[:, 0] / self.before[:, 1]))

    def propose(self, limit: int, floor: float = 0.0) -> DraftTree:
        if self.by == "router":
            trees = [drafter.propose(limit, floor) for drafter in self.drafters]
            means = [float(tree.survival.mean()) if len(tree) else 0.0 for tree in trees]
            return trees[int(np.argmax(means))]
        if self.said >= EVERY:
            self.said = 0
            for drafter in self.drafters:
                drafter.replay()
            usual = self.before[:, 0] / self.before[:, 1]
            now = [(d.right + p) / (d.seen + 1) for d, p in zip(self.drafters, usual, strict=True)]
            self.chosen = int(np.argmax(now))
        trees = [
            drafter.propose(limit if at == self.chosen else 0, floor)
            for at, drafter in enumerate(self.drafters)
        ]
        return trees[self.chosen]

    def commit(self, tokens: IntArray, verified: int, path: Sequence[int]) -> None:
        self.said += len(tokens)
        for drafter in self.drafters:
            drafter.commit(tokens, verified, path)


def main() -> None:
    options = arguments(__doc__, "pairs of training and test rows").parse_args()
    answering = Answering(options)
    model, ends, params = answering.model, answering.ends, answering.params
    target = Target(model)
    streams: dict[str, list[IntArray]] = {}
    drafters: dict[str, Replayed] = {}
    for files in zip(options.files[::2], options.files[1::2], strict=True):
        name, data = answering.prepared(*files)
        own = answering.own(name, data)
        vocabulary = training.DraftVocabulary.of([answer for _, answer in own], 2048)
        samples = training.read_states(model, own, Prefixes(()), QUIET)
        network = training.train(model, samples, vocabulary, QUIET)
        drafters[name] = Replayed(network, vocabulary.ids, target, end_tokens=ends)
        streams[name] = [row[0] for row in spread(data.validation, options.held_out)]
        print("trained", name, flush=True)
    streams["in turns"] = list(chain(*zip(*streams.values(), strict=False)))
    for drafter in drafters.values():
        drafter.clock, drafter.seconds = (lambda: 0.0), 0.0  # depth is not the clock's
    plain = Decoder(target, NoDrafter())
    ways: dict[str, Any] = dict(drafters)
    ways |= {by: Several(list(drafters.values()), by) for by in ("router", "replay")}
    table: dict[str, dict[str, Any]] = {}
    for stream, prompts in streams.items():
        wanted = [plain.generate(prompt, params).tokens for prompt in prompts]
        counts = {}
        for name, drafter in ways.items():
            for each in drafters.values():
                each.forget()
            made = [Decoder(target, drafter, AllNodes(NODES)).generate(p, params) for p in prompts]
            counts[name] = np.array([[g.stepped_tokens, g.forwards] for g in made], float)
            table.setdefault(stream, {})[name] = {
                "tokens_per_step": round(float(np.divide(*counts[name].sum(0))), 3),
                "identical": sum([*g.tokens] == [*w] for g, w in zip(made, wanted, strict=True)),
            }
        alone = np.stack([counts[name] for name in drafters])
        best = np.argmin(alone[:, :, 1], 0)  # the fewest steps for the same answer
        chosen = alone[best, np.arange(len(prompts))].sum(0)
        table[stream]["oracle"] = {"tokens_per_step": round(float(np.divide(*chosen)), 3)}
        print(stream, len(prompts), table[stream], flush=True)
    report = {"model": Path(options.model).name, "dtype": options.dtype, "nodes": NODES}
    report |= {"every": EVERY, "prompts": {name: len(part) for name, part in streams.items()}}
    if options.json:
        found = report | {"streams": table, "machine": machine_info()}
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

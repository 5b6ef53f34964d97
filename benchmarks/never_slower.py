"""Does speculation ever cost? A pack on outputs that nothing predicts, and after a switch back.

    python benchmarks/never_slower.py PACK --data test.jsonl --json never_slower.json

The target is made to say a given script, token by token, whatever its logits: the plain outputs
of the rows (the task), or the same tokens shuffled over all rows (noise: the right frequencies,
nothing to predict). Plain and speculative decoding take turns row by row over the same scripts,
so that each ratio is between neighbours in time. Everything learned starts afresh in each repeat.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tascade.bench.machine import machine_info
from tascade.bench.methods import restorer
from tascade.bench.metrics import spread
from tascade.core import Generation
from tascade.data.encode import encode_prompt
from tascade.data.load import load_examples
from tascade.decode.loop import Decoder
from tascade.decode.sampling import SamplingParams
from tascade.model import TaskModel

MOST_SLOWER = 0.02
RECOVERED_SHARE = 0.9
RECOVERED_WITHIN = 200


class Script:
    """A logits processor that leaves one token to choose at each place of the output."""

    def __init__(self, prompt_length: int, tokens: Sequence[int]) -> None:
        self.start, self.tokens = prompt_length, tokens

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = torch.full_like(scores, torch.finfo(scores.dtype).min)
        scores[0, self.tokens[ids.shape[1] - self.start]] = 0.0
        return scores


@dataclass
class Row:
    prompt: Sequence[int]
    script: list[int]


@dataclass
class Pair:
    """One row decoded both ways."""

    plain: Generation
    spec: Generation


@dataclass
class Phase:
    pairs: list[Pair] = field(default_factory=list)

    def after(self, tokens: int) -> Phase:
        """The rows that begin when ``tokens`` tokens of this phase are out."""
        done = np.cumsum([0] + [len(pair.spec.tokens) for pair in self.pairs])
        return Phase([p for p, n in zip(self.pairs, done, strict=False) if n >= tokens])

    def ratio(self) -> float:
        """Speed of speculative decoding, plain decoding's being 1."""
        return sum(p.plain.seconds for p in self.pairs) / sum(p.spec.seconds for p in self.pairs)

    def tokens_per_step(self) -> float:
        forwards = sum(pair.spec.forwards for pair in self.pairs)
        return sum(pair.spec.stepped_tokens for pair in self.pairs) / max(1, forwards)

    def drafted_per_step(self) -> float:
        steps = [step for pair in self.pairs for step in pair.spec.steps]
        return sum(step.drafted for step in steps) / max(1, len(steps))


class Duel:
    """Plain and speculative decoding of the same scripts, in turns."""

    def __init__(self, task_model: TaskModel) -> None:
        self.plain = task_model.plain
        calibration = task_model.calibration.copy()
        self.spec = Decoder(
            task_model.target,
            task_model.new_drafter(calibration),
            task_model.new_budget(),
            task_model.tokenizer,
        )
        self.reset = restorer(self.spec, calibration)

    def run(self, rows: Sequence[Row]) -> Phase:
        phase = Phase()
        for i, row in enumerate(rows):
            both = {}
            for name in ("plain", "spec") if i % 2 else ("spec", "plain"):
                params = SamplingParams(max_new_tokens=len(row.script), ignore_end=True)
                both[name] = getattr(self, name).generate(
                    row.prompt, params, [Script(len(row.prompt), row.script)]
                )
                assert both[name].tokens == row.script, "the script was not followed"
            phase.pairs.append(Pair(**both))
        return phase


def task_rows(task_model: TaskModel, data: str, count: int) -> list[Row]:
    """Prompts spread over the file, with what plain decoding says to them."""
    examples = list(load_examples(data, split="test"))
    chosen = [examples[i * len(examples) // count] for i in range(min(count, len(examples)))]
    rows, params = [], task_model.params()
    for example in chosen:
        prompt = encode_prompt(task_model.tokenizer, example.prompt)
        tokens = task_model.plain.generate(prompt, params).tokens
        script = [token for token in tokens if token not in task_model.ends]
        if script:
            rows.append(Row(prompt, script))
    return rows


def shuffled(rows: Sequence[Row], seed: int = 0) -> list[Row]:
    """The same rows with all their tokens dealt out anew."""
    deck = np.random.default_rng(seed).permutation([t for row in rows for t in row.script]).tolist()
    return [replace(row, script=[deck.pop() for _ in row.script]) for row in rows]


def prefill_part(phase: Phase) -> float:
    """Extra time spent on prompts, as a share of plain decoding's time."""
    extra = sum(p.spec.prefill_seconds - p.plain.prefill_seconds for p in phase.pairs)
    return extra / sum(p.plain.seconds for p in phase.pairs)


def measure_noise(duel: Duel, noise: Sequence[Row], repeats: int) -> dict[str, Any]:
    phases = []
    for _ in range(repeats):
        duel.reset()
        phases.append(duel.run(noise))
    plain = np.median([[p.plain.seconds for p in phase.pairs] for phase in phases], axis=0)
    spec = np.median([[p.spec.seconds for p in phase.pairs] for phase in phases], axis=0)
    return {
        "tokens": sum(len(row.script) for row in noise),
        "slower_by": spread([1 / phase.ratio() - 1 for phase in phases]),
        "slower_by_row_medians": float(spec.sum() / plain.sum() - 1),
        "slower_by_quarters": [
            float(b.sum() / a.sum() - 1)
            for a, b in zip(np.array_split(plain, 4), np.array_split(spec, 4), strict=True)
        ],
        "of_it_in_prefill": float(np.median([prefill_part(phase) for phase in phases])),
        "tokens_per_step": phases[0].tokens_per_step(),
        "drafted_per_step": phases[0].drafted_per_step(),
    }


def measure_switch(
    duel: Duel, task: Sequence[Row], noise: Sequence[Row], repeats: int
) -> dict[str, Any]:
    """Task, noise, the same task rows again; the rows after the first 200 tokens are compared."""
    shares, before, after, steps = [], [], [], []
    for _ in range(repeats):
        duel.reset()
        first, _, again = duel.run(task), duel.run(noise), duel.run(task)
        first, again = first.after(RECOVERED_WITHIN), again.after(RECOVERED_WITHIN)
        before.append(first.ratio())
        after.append(again.ratio())
        shares.append(after[-1] / before[-1])
        steps.append((first.tokens_per_step(), again.tokens_per_step()))
    return {
        "tokens": {
            "task": sum(len(r.script) for r in task),
            "noise": sum(len(r.script) for r in noise),
        },
        "within_tokens": RECOVERED_WITHIN,
        "speedup_before": spread(before),
        "speedup_after": spread(after),
        "recovered": spread(shares),
        "tokens_per_step_before": steps[0][0],
        "tokens_per_step_after": steps[0][1],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pack")
    parser.add_argument("--data", required=True, help="test rows with prompts")
    parser.add_argument("--model", default=None, help="another copy of the pack's model")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    task_model = TaskModel.from_pretrained(args.pack, args.model, dtype=args.dtype)
    machine = machine_info()
    task = task_rows(task_model, args.data, args.rows)
    noise = shuffled(task)
    duel = Duel(task_model)
    duel.run(task[:2])
    result = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": "python " + " ".join(sys.argv),
        "machine": machine,
        "model": Path(task_model.pack.info.model).name,
        "dtype": args.dtype,
        "repeats": args.repeats,
        "rows": len(task),
        "noise": measure_noise(duel, noise, args.repeats),
        "switch": measure_switch(duel, task, noise, args.repeats),
    }
    result["passed"] = {
        "noise": result["noise"]["slower_by"]["median"] <= MOST_SLOWER,
        "switch": result["switch"]["recovered"]["median"] >= RECOVERED_SHARE,
    }
    text = json.dumps(result, indent=1)
    if args.json:
        args.json.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()

"""TASC-ft end to end: tune a model on a task, judge it on test rows, time it alone and with drafts.

    python benchmarks/tune_pilot.py --json benchmarks/tune_pilot.json

For another model, on a GPU or not: ``--model Qwen/Qwen2.5-0.5B-Instruct --train train.jsonl
--validation validation.jsonl --test test.jsonl --task mine``. Everything is learned and chosen on
train and validation rows; test rows are answered once the model is exported. The control is LoRA on
the same rows for as many rounds, without new tokens.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import tascade
from tascade.bench.machine import machine_info
from tascade.config import GateConfig, SpecConfig, TuneConfig
from tascade.data.choose import spread
from tascade.data.load import load_examples
from tascade.decode.loop import Decoder
from tascade.decode.target import Target
from tascade.draft.budget import NoDrafter
from tascade.enrich.gate import Answer, evaluate
from tascade.enrich.stage import tune
from tascade.enrich.tokens.merger import TokenMerger
from tascade.enrich.tokens.stored import read_tokens
from tascade.model import TaskModel

SHARED = Path(__file__).resolve().parents[2] / "shared"
TIMED_ROWS, BATCH, REPEATS, OWN_SECONDS = 48, 8, 5, 150.0


@dataclasses.dataclass(frozen=True)
class Plan:
    """New tokens, prompts of the model's own for each training prompt, and rounds."""

    tokens: int
    prompts: float
    epochs: int


PLANS = {"multilabel_nlupp": Plan(40, 4.0, 4), "text_to_sql_advising": Plan(60, 1.0, 3)}


def equal(text: str, reference: str) -> float:
    return float(text.split() == reference.split())


def recipe(options: argparse.Namespace, plan: Plan) -> tascade.Recipe:
    stage = TuneConfig(
        tokens=plan.tokens,
        epochs=plan.epochs,
        prompts=plan.prompts,
        control=True,
        gate=GateConfig(refuse=False),
    )
    spec = SpecConfig(own_answers=True, own_seconds=3600.0)
    return tascade.Recipe(dtype=options.dtype, spec=spec, tune=stage)


def cpu_seconds() -> float:
    return sum(
        getattr(resource.getrusage(who), name)
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
        for name in ("ru_utime", "ru_stime")
    )


def answers(decoder: Decoder, task_model: TaskModel, prompts: Sequence[Any]) -> list[np.ndarray]:
    params = task_model.params()
    return [np.array(decoder.generate(p, params).tokens, np.int32) for p in prompts]


def timed(ways: Mapping[str, Callable[[Any], int]], prompts: Sequence[Any]) -> dict[str, Any]:
    """Seconds and steps of each way, in turns; the first round warms up and does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    steps: dict[str, int] = {}
    for repeat in range(REPEATS + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            steps[name] = sum(way(prompt) for prompt in prompts)
            if repeat:
                seconds[name].append(time.perf_counter() - start)
    base = np.array(seconds["base"])
    found = {}
    for name in ways:
        ratios = np.sort(base / np.array(seconds[name]))
        found[name] = {
            "seconds": seconds[name],
            "forwards": steps[name],
            "speedup": {
                "median": float(np.median(ratios)),
                "low": float(ratios[0]),
                "high": float(ratios[-1]),
            },
        }
    return found


def measure(task: str, files: dict[str, str], options: argparse.Namespace, plan: Plan) -> Any:
    work = Path(options.work or tempfile.mkdtemp(prefix="tune-")) / task
    chosen = recipe(options, plan)
    began, cpu = time.time(), cpu_seconds()
    tuned = tune(
        options.model,
        files["train"],
        held_out=files["validation"],
        out=work / "model",
        recipe=chosen,
        resume=options.resume,
        progress=tell,
    )
    spent: dict[str, Any] = {"seconds": time.time() - began, "cpu_seconds": cpu_seconds() - cpu}
    spent |= {"resumed": True} if options.resume else {}
    assert tuned.path is not None
    assert tuned.control is not None
    merger = read_tokens(tuned.path)
    assert merger is not None
    packs, quick = {}, dataclasses.replace(chosen.spec, own_seconds=OWN_SECONDS)
    for name, model in (("base", options.model), ("tuned", tuned.path)):
        packs[name] = tascade.adapt(
            model,
            files["train"],
            validation=files["validation"],
            out=work / f"pack-{name}",
            recipe=dataclasses.replace(chosen, spec=quick),
            progress=tell,
        )
    return {
        "task": task,
        "plan": dataclasses.asdict(plan),
        "spent": spent,
        "tuning": tuned.to_json(),
        "test": judged(files["test"], tuned, merger, packs),
        "speed": raced(files["test"], packs),
    }


def judged(test: str, tuned: Any, merger: TokenMerger, packs: dict[str, TaskModel]) -> Any:
    """The gate's figures, on test rows."""
    base, new = packs["base"], packs["tuned"]
    examples = [e for e in load_examples(test) if e.prompt is not None]
    prompts = [base.encode(e.prompt) for e in examples]
    control = Decoder(Target(tuned.control.model), NoDrafter(), None, base.tokenizer)
    said = {}
    # Drafts change no answer, and these are many.
    for name, decoder in (("base", base.decoder), ("tuned", new.decoder), ("control", control)):
        said[name] = [
            Answer(ids, base.tokenizer.decode(merger.unmerge(ids), skip_special_tokens=True))
            for ids in answers(decoder, base, prompts)
        ]
    wanted = [e.completion for e in examples]
    nothing = GateConfig(refuse=False)
    verdict = evaluate(
        said["tuned"], said["base"], wanted, merger, nothing, equal, control=said["control"]
    )
    found = verdict.to_json()
    del found["drift"]  # not measured again
    return found


def together(pack: TaskModel) -> Callable[[list[Any]], int]:
    """Transformers' generate over prompts padded on the left; returns the steps."""

    def way(prompts: list[Any]) -> int:
        longest = max(map(len, prompts))
        ids = torch.zeros(len(prompts), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = torch.as_tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        device = pack.model.device
        out = pack.model.generate(
            ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=pack.params().max_new_tokens,
            do_sample=False,
            eos_token_id=list(pack.ends),
            pad_token_id=0,
        )
        return int(out.shape[1]) - longest

    return way


def raced(test: str, packs: dict[str, TaskModel]) -> Any:
    """One request at a time: base, base with drafts, tuned, tuned with drafts; and 8 together."""
    examples = [e for e in load_examples(test) if e.prompt is not None]
    prompts = [packs["base"].encode(e.prompt) for e in spread(examples, TIMED_ROWS)]
    ways = {}
    for name, pack in packs.items():
        for kind, decoder in (("", pack.plain), ("+spec", pack.decoder)):

            def way(prompt: Any, decoder: Decoder = decoder, pack: TaskModel = pack) -> int:
                return decoder.generate(prompt, pack.params()).forwards

            ways[name + kind] = way
    order = sorted(prompts, key=len)
    groups = [order[at : at + BATCH] for at in range(0, len(order), BATCH)]
    batched = {name: together(pack) for name, pack in packs.items()}
    return {"batch_1": timed(ways, prompts), f"batch_{BATCH}": timed(batched, groups)}


def tell(stage: str, done: int, total: int | None) -> None:
    if done % 200 == 0:
        print(f"{time.strftime('%H:%M:%S')} {stage} {done}/{total}", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(SHARED / "models/pilot"))
    parser.add_argument("--task", action="append")
    parser.add_argument("--train")
    parser.add_argument("--validation")
    parser.add_argument("--test")
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--prompts", type=float)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--work", help="keep models and packs here")
    parser.add_argument("--resume", action="store_true", help="go on with what --work holds")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    tasks, results = options.task or list(PLANS), []
    for task in tasks:
        given = {"train": options.train, "validation": options.validation, "test": options.test}
        files = {k: v or str(SHARED / "data" / task / f"{k}.jsonl") for k, v in given.items()}
        asked = {k: getattr(options, k) for k in ("tokens", "prompts", "epochs")}
        plan = PLANS.get(task, Plan(100, 1.0, 3))
        plan = dataclasses.replace(plan, **{k: v for k, v in asked.items() if v is not None})
        results.append(measure(task, files, options, plan))
        write(options, results)


def write(options: argparse.Namespace, results: list[Any]) -> None:
    found = {
        "command": " ".join(["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]]),
        "machine": machine_info(),
        "settings": {"dtype": options.dtype, "tune": dataclasses.asdict(TuneConfig())},
        "results": results,
    }
    text = json.dumps(found, indent=1) + "\n"
    if options.json:
        options.json.write_text(text)
    print(text)


if __name__ == "__main__":
    main()

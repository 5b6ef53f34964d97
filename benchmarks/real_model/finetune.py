"""Fine-tune a model on a task's train rows: LoRA, merged, saved in bfloat16.

    python benchmarks/real_model/finetune.py MODEL TASK_FOLDER OUT --json finetune.json

``TASK_FOLDER`` holds train.jsonl and validation.jsonl. The same command goes on where it was
stopped. What is learned is bounded in tokens, prompts among them, since two cores learn some 300 a
second, 100 on a CPU without instructions for bfloat16: by default those of a quarter of an hour (or
three), in at most three rounds. The JSON has the loss of each step.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import write
from transformers import AutoModelForCausalLM, AutoTokenizer

from tascade.config import Recipe, TuneConfig
from tascade.data.encode import end_tokens
from tascade.data.prepare import prepare, spread
from tascade.enrich.tokens.merger import TokenMerger
from tascade.enrich.train.checkpoint import begin_run, model_digest, rows_digest
from tascade.enrich.train.lora import load_peft
from tascade.enrich.train.samples import Sample, collate, make_samples, passes
from tascade.enrich.train.train import train
from tascade.enrich.train.trainer import answer_loss
from tascade.util.progress import spelt

TOKENS, ROUNDS, HELD_OUT = 270_000, 3, 64
JUDGED = 0.1  # tokens that the loss before and after is measured on, as a part of those learned


def chosen(samples: list[Sample], tokens: int, seed: int) -> tuple[list[Sample], int]:
    """As many samples and rounds as there are tokens for, drawn at random."""
    total = sum(map(len, samples))
    if total <= tokens:
        return samples, min(ROUNDS, tokens // total)
    order = np.random.default_rng(seed).permutation(len(samples))
    ends = np.cumsum([len(samples[i]) for i in order])
    return [samples[i] for i in order[: int(np.searchsorted(ends, tokens))]], 1


@torch.inference_mode()
def held_out_loss(model: Any, samples: list[Sample]) -> float:
    """Mean loss of the answers' tokens."""
    parts = passes(samples)
    sizes = [sum(len(sample.answer) for sample in part) for part in parts]
    losses = [float(answer_loss(model, collate(part))) for part in parts]
    return float(np.average(losses, weights=sizes))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder of a model in Transformers' format, or hub id")
    parser.add_argument("task", type=Path, help="folder with train.jsonl and validation.jsonl")
    parser.add_argument("out", type=Path, help="folder for the fine-tuned model")
    parser.add_argument("--json", type=Path, help="a file for losses and settings")
    help_tokens = f"most tokens to learn from, prompts among them; {TOKENS:,} by default"
    parser.add_argument("--tokens", type=int, default=TOKENS, help=help_tokens)
    parser.add_argument("--seed", type=int, default=0, help="of the rows chosen; 0 by default")
    options = parser.parse_args()
    if (options.out / "config.json").is_file():
        print(f"{options.out} is there")
        return
    load_peft()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    # float32 weights: PEFT's own way, in which the products run in bfloat16 (autocast).
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    ends = end_tokens(model, tokenizer)
    data = prepare(
        tokenizer,
        ends,
        options.task / "train.jsonl",
        options.task / "validation.jsonl",
        Recipe(),
        lambda *_: None,
    )
    nothing = TokenMerger((), model.config.vocab_size)
    samples = make_samples(data.train, nothing, 1024)
    learned, rounds = chosen(samples, options.tokens, options.seed)
    tokens = rounds * sum(map(len, learned))
    judged = spread(make_samples(data.validation, nothing, 1024), HELD_OUT)
    within = int(np.searchsorted(np.cumsum([len(s) for s in judged]), JUDGED * tokens))
    kept = judged[: max(1, within)]
    config = TuneConfig(epochs=rounds, batch=8, seed=options.seed)
    state = options.out.with_name(options.out.name + ".part")
    about = {
        "model": model_digest(model),
        "rows": rows_digest([(s.prompt, s.answer) for s in learned]),
        "config": json.loads(json.dumps(asdict(config))),
    }
    state.parent.mkdir(parents=True, exist_ok=True)
    begin_run(state, about, resume=True)
    print(
        f"learning {len(learned)} of {len(samples)} rows, {tokens:,} tokens, {rounds} rounds; "
        "--tokens sets how many; stopped, the same command goes on",
        flush=True,
    )
    before = held_out_loss(model, kept)
    print(f"held-out loss {before:.3f} on {len(kept)} rows", flush=True)
    began, first = time.time(), 0

    def tell(stage: str, done: int, total: int | None) -> None:
        nonlocal began, first
        if not first:
            began, first = time.time(), done
            print(f"{stage} {done} of {total}", flush=True)
            return
        left = (time.time() - began) / (done - first) * ((total or done) - done)
        print(f"{stage} {done} of {total}, {spelt(left)} left", flush=True)

    start = time.time()
    made = train(model, nothing, learned, kept, config, state / "state", tell)
    seconds = time.time() - start
    after = held_out_loss(made.model, kept)
    made.model.to(torch.bfloat16).save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    report = {
        "task": options.task.name,
        "rows": len(learned),
        "rows_of": len(data.train),
        "rounds": rounds,
        "tokens": tokens,
        "seconds": round(seconds, 1),
        "held_out_rows": len(kept),
        "held_out_loss": {"before": before, "after": after},
        "config": about["config"],
        "losses": [round(loss, 4) for loss in made.losses],
    }
    print({key: report[key] for key in ("rows", "rounds", "seconds", "held_out_loss")})
    write(report, options.json, show=False)
    shutil.rmtree(state)


if __name__ == "__main__":
    main()

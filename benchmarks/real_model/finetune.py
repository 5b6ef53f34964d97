"""Fine-tune a model on a task's train rows: LoRA, merged, saved in bfloat16.

    python benchmarks/real_model/finetune.py MODEL TASK_FOLDER OUT --json finetune.json

``TASK_FOLDER`` holds train.jsonl and validation.jsonl. The same command goes on where it was
stopped. What is learned is bounded in tokens, prompts among them, since two cores learn some 300 a
second: by default a quarter of an hour's, in at most three rounds. The JSON has the loss of each
step.
"""

from __future__ import annotations

import argparse
import json
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
from tascade.enrich.train.samples import Sample, collate, make_samples
from tascade.enrich.train.train import train
from tascade.enrich.train.trainer import answer_loss

TOKENS, ROUNDS, HELD_OUT = 270_000, 3, 64


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
    return float(np.mean([float(answer_loss(model, collate([sample]))) for sample in samples]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("task", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if (options.out / "config.json").is_file():
        print(f"{options.out} is there")
        return
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
    kept = spread(make_samples(data.validation, nothing, 1024), HELD_OUT)
    config = TuneConfig(epochs=rounds, batch=8, seed=options.seed)
    state = options.out.with_name(options.out.name + ".part")
    about = {
        "model": model_digest(model),
        "rows": rows_digest([(s.prompt, s.answer) for s in learned]),
        "config": json.loads(json.dumps(asdict(config))),
    }
    state.parent.mkdir(parents=True, exist_ok=True)
    begin_run(state, about, resume=True)
    before, began = held_out_loss(model, kept), time.time()

    def tell(stage: str, done: int, total: int | None) -> None:
        if done % 10 == 0 or done == total:
            print(f"{stage} {done}/{total}, {time.time() - began:.0f} s", flush=True)

    made = train(model, nothing, learned, kept, config, state / "state", tell)
    seconds = time.time() - began
    after = held_out_loss(made.model, kept)
    made.model.to(torch.bfloat16).save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    report = {
        "task": options.task.name,
        "rows": len(learned),
        "rows_of": len(data.train),
        "rounds": rounds,
        "tokens": rounds * sum(map(len, learned)),
        "seconds": round(seconds, 1),
        "held_out_rows": len(kept),
        "held_out_loss": {"before": before, "after": after},
        "config": about["config"],
        "losses": [round(loss, 4) for loss in made.losses],
    }
    print({key: report[key] for key in ("rows", "rounds", "seconds", "held_out_loss")})
    write(report, options.json, show=False)


if __name__ == "__main__":
    main()

"""A pack inside vLLM and beside it: plain vLLM, its drafters, llama.cpp and tascade, taking turns.

    python benchmarks/vllm_path.py --shared FOLDER --packs FOLDER --task dst_sgd --json OUT

Run it with the Python of an environment that holds vLLM and tascade. One engine for each method
lives in its own process (``benchmarks/engines.py``); only one works at a time. Every turn keeps
``concurrency`` requests under way until all rows of the repeat are answered, greedy, float32 unless
told; methods rotate within each repeat, and a speed-up is the median of the ratios of neighbours.

No row is met twice: every repeat has test rows of its own, and validation rows warm the engines up.
The suffix drafter, which keeps the answers it has seen, answers the training prompts first: its
corpus then is what the pack holds, the model's own answers. What it kept of test rows is taken out
of its cache after each round, for they come again at another concurrency; within a round it learns
as it does in service. The pack keeps no answers, only how often its drafts were right. Prefixes are
read anew each time, or, with ``--prefixes``, kept as each engine does by default, and dropped
between concurrencies.

The methods of ``benchmarks/llama.py`` are llama.cpp's server with the same weights in bfloat16, and
in 8 and 4 bits, on as many threads as there are cores; ``loop`` is tascade without vLLM.

The incompressible workload is random prompts answered by the model with its head shuffled, which
says other tokens than it means: there is nothing to learn, or to find."""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engines import METHODS, OURS, Worker

MOST_SEQUENCES = 32
Rows = list[list[int]]


def model_of(options: argparse.Namespace) -> Path:
    return Path(options.model or options.shared / "models" / "pilot")


def encode(options: argparse.Namespace) -> tuple[dict[str, Rows], Callable[[Rows, Rows], int]]:
    """Token ids of the prompts of each split; and what counts the answers that are references."""
    from transformers import AutoTokenizer

    from tascade.data.encode import encode_prompt
    from tascade.data.load import load_examples

    tokenizer = AutoTokenizer.from_pretrained(model_of(options))
    folder = options.shared / "data" / options.task
    found, wanted = {}, {}
    for name in ("train", "validation", "test"):
        examples = list(load_examples(folder / f"{name}.jsonl"))[: options.warm]
        found[name] = [encode_prompt(tokenizer, e.prompt or "").tolist() for e in examples]
        wanted |= {
            tuple(ids): e.completion.strip() for ids, e in zip(found[name], examples, strict=True)
        }

    def right(prompts: Rows, answers: Rows) -> int:
        texts = (tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in answers)
        return sum(wanted.get(tuple(p)) == t for p, t in zip(prompts, texts, strict=True))

    return found, right


def rounds(prompts: dict[str, Rows], concurrency: int, repeats: int, most: int = 0) -> list[Rows]:
    """The rows of the warming round and of each repeat: of more requests at a time, more rows."""
    size = min(len(prompts["test"]) // repeats, most or 32 + 4 * concurrency)
    blocks = [prompts["test"][i * size : (i + 1) * size] for i in range(repeats)]
    return [prompts["validation"][:size], *blocks]


def noise_rounds(concurrency: int, repeats: int) -> list[Rows]:
    import numpy as np

    rng = np.random.default_rng(4)
    count = max(16, 2 * concurrency)
    return [
        [rng.integers(300, 4000, 64).tolist() for _ in range(count)] for _ in range(repeats + 1)
    ]


def shuffled_head(model: Path, folder: Path) -> Path:
    """A copy of a model that says other tokens than it means."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(model)
    order = torch.randperm(loaded.config.vocab_size, generator=torch.Generator().manual_seed(0))
    head = loaded.get_output_embeddings().weight.detach().clone()
    loaded.config.tie_word_embeddings = False
    loaded.lm_head.weight = torch.nn.Parameter(head[order])
    loaded.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    return folder


def ratios(
    seconds: dict[str, list[float]], tokens: dict[str, list[int]], base: str, ours: str
) -> dict[str, float]:
    """Speed of ``ours`` against ``base``: median, low and high over the repeats."""
    each = [
        (b / n) / (a / m)
        for a, m, b, n in zip(seconds[ours], tokens[ours], seconds[base], tokens[base], strict=True)
    ]
    return {"median": statistics.median(each), "low": min(each), "high": max(each)}


def measure(
    workers: dict[str, Worker],
    rows: list[Rows],
    concurrency: int,
    options: argparse.Namespace,
    right: Callable[[Rows, Rows], int],
) -> dict[str, Any]:
    """Every method on every round of ``rows``; the first round warms up and is not counted."""
    seconds: dict[str, list[float]] = {method: [] for method in workers}
    tokens: dict[str, list[int]] = {method: [] for method in workers}
    steps: dict[str, list[int]] = {method: [] for method in workers}
    answers: dict[str, list[Rows]] = {method: [] for method in workers}
    names = list(workers)
    base = "plain" if "plain" in names else names[0]
    for worker in workers.values():
        worker.ask(then=["forget_prompts"])
    for repeat, prompts in enumerate(rows):
        for method in names[repeat % len(names) :] + names[: repeat % len(names)]:
            run = {"prompts": prompts, "concurrency": concurrency, "workload": options.workload}
            run |= {"most": options.tokens}
            done = workers[method].ask(run=run, then=["forget_answers"])
            if repeat:
                seconds[method].append(done["seconds"])
                tokens[method].append(sum(map(len, done["answers"])))
                steps[method].append(done.get("steps"))
                answers[method].append(done["answers"])
    result: dict[str, Any] = {
        "concurrency": concurrency,
        "workload": options.workload,
        "requests": sum(map(len, rows[1:])),
        "methods": {},
    }
    for method in names:
        each = [t / s for t, s in zip(tokens[method], seconds[method], strict=True)]
        row: dict[str, Any] = {"tokens_per_second": statistics.median(each)}
        row |= {"seconds": seconds[method], "tokens": tokens[method]}
        row["steps"] = steps[method]
        if options.workload != "sampled":
            same = [
                a == b
                for ours, theirs in zip(answers[method], answers[base], strict=True)
                for a, b in zip(ours, theirs, strict=True)
            ]
            row |= {"identical": sum(same), "differing": len(same) - sum(same)}
        if options.workload == "task":
            row["references"] = sum(map(right, rows[1:], answers[method]))
        result["methods"][method] = row
    for ours in OURS:
        if ours in names:
            result[f"{ours}_against"] = {
                base: ratios(seconds, tokens, base, ours) for base in names if base != ours
            }
    return result


def report(options: argparse.Namespace) -> dict[str, Any]:
    from tascade.bench.machine import machine_info
    from vllm import __version__

    with tempfile.TemporaryDirectory() as folder:
        model = model_of(options)
        if options.workload != "task":
            model = shuffled_head(model, Path(folder) / "shuffled")
        told = {
            "model": str(model),
            "pack": str(options.packs / options.task),
            "dtype": options.dtype,
            "requests": max(MOST_SEQUENCES, *options.concurrency),
            "length": options.length,
            "prefixes": options.prefixes,
            "drafter": options.drafter,
            "llama": str(options.llama),
        }
        workers = {name: Worker(name, told, verbose=options.verbose) for name in options.methods}
    prompts, right = encode(options)
    if "suffix" in workers:
        warm = {"prompts": prompts["train"], "concurrency": MOST_SEQUENCES, "workload": "task"}
        workers["suffix"].ask(run=warm | {"most": options.tokens}, then=["keep_answers"])
    results = []
    each_rows = options.rows or [0]
    for i, concurrency in enumerate(options.concurrency):
        most = each_rows[min(i, len(each_rows) - 1)]
        rows = rounds(prompts, concurrency, options.repeats, most)
        if options.workload != "task":
            rows = noise_rounds(concurrency, options.repeats)
        results.append(measure(workers, rows, concurrency, options, right))
        print(json.dumps(brief(results[-1])), flush=True)
    stats = {
        method: found
        for method in OURS
        if method in workers and (found := workers[method].ask(then=["stats"])["stats"])
    }
    for worker in workers.values():
        worker.close()
    return {
        "command": command(options),
        "machine": machine_info() | {"vllm": __version__},
        "settings": {
            "task": options.task,
            "model": model_of(options).name,
            "dtype": options.dtype,
            "max_tokens": options.tokens,
            "max_num_seqs": told["requests"],
            "prefixes_kept": options.prefixes,
            "suffix_warmed_with": f"own answers to {len(prompts['train'])} training prompts",
        },
        "results": results,
        **stats,
    }


def command(options: argparse.Namespace) -> str:
    """The command line, without the folders of this machine."""
    words = ["--task", options.task, "--workload", options.workload, "--methods", *options.methods]
    words += ["--dtype", options.dtype, "--tokens", options.tokens, "--warm", options.warm]
    words += ["--repeats", options.repeats, "--concurrency", *options.concurrency]
    words += ["--rows", *options.rows] if options.rows else []
    words += ["--length", options.length] + (["--prefixes"] if options.prefixes else [])
    return " ".join(map(str, ["python benchmarks/vllm_path.py", *words]))


def brief(result: dict[str, Any]) -> dict[str, Any]:
    last = [f"{ours}_against" for ours in OURS if f"{ours}_against" in result][:1]
    against = {k: round(v["median"], 2) for ours in last for k, v in result[ours].items()}
    speeds = {k: round(v["tokens_per_second"]) for k, v in result["methods"].items()}
    differing = {k: v.get("differing") for k, v in result["methods"].items()}
    workload, concurrency = result["workload"], result["concurrency"]
    return {"at": concurrency, "on": workload, "x": against, "tok/s": speeds, "differ": differing}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--packs", type=Path, required=True, help="holds a pack for each task")
    parser.add_argument("--task", required=True)
    parser.add_argument("--warm", type=int, default=3000, help="most rows of a split")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS[:4]))
    parser.add_argument("--workload", choices=["task", "incompressible", "sampled"], default="task")
    parser.add_argument("--verbose", action="store_true", help="show what the engines print")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--model", help="the pilot by default")
    parser.add_argument("--drafter", default="", help="folder of `tascade export`")
    parser.add_argument("--llama", type=Path, help="work folder of benchmarks/llama.py")
    parser.add_argument("--dtype", default="float32", help="of vLLM; a pack has its own")
    parser.add_argument("--tokens", type=int, default=256, help="most tokens of an answer")
    parser.add_argument("--length", type=int, default=2048, help="of a prompt and its answer")
    parser.add_argument("--rows", type=int, nargs="+", help="of a repeat, at each concurrency")
    parser.add_argument("--prefixes", action="store_true", help="let the engines keep prefixes")
    options = parser.parse_args()
    found = report(options)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""A pack inside vLLM: plain vLLM, its ngram and suffix drafters and tascade, taking turns.

    python benchmarks/vllm_path.py --shared FOLDER --packs FOLDER --task dst_sgd --json OUT

Run it with the Python of an environment that holds vLLM and tascade. One engine for each method
lives in its own process; only one works at a time. Every turn keeps ``concurrency`` requests under
way until all rows of the repeat are answered, greedy, float32; methods rotate within each repeat,
and a speed-up is the median of the ratios of neighbours.

No row is met twice: every repeat has test rows of its own, and validation rows warm the engines up.
The suffix drafter, which keeps the answers it has seen, answers the training prompts first: its
corpus then is what the pack holds, the model's own answers. What it kept of test rows is taken out
of its cache after each round, for they come again at another concurrency; within a round it learns
as it does in service. The pack keeps no answers, only how often its drafts were right.

The incompressible workload is random prompts answered by the model with its head shuffled, which
says other tokens than it means: there is nothing to learn, or to find."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

METHODS = ("plain", "ngram", "suffix", "tascade", "idle", "network", "joined")
METHODS += ("ngram_gpu", "host", "device")  # of vLLM's second model runner
OURS = ("tascade", "joined", "host", "device")
MOST_SEQUENCES = 32
LENGTH = 2048
NOISE_TOKENS = 48


def speculative(method: str, pack: str, drafter: str) -> dict[str, Any]:
    """Engine arguments of a method: ngram as vLLM's guide has it, suffix at its defaults.

    ``network`` is the pack's trained drafter alone, as vLLM has it; ``joined`` has both. ``host``
    and ``device`` are tascade in vLLM's second model runner, without and with async scheduling;
    ``plain`` and ``ngram_gpu`` run in whichever runner vLLM chooses.
    """
    ours = {
        "additional_config": {"tascade": {"pack": pack}},
        "worker_extension_cls": "tascade.integrations.vllm.WorkerExtension",
    }
    if method == "network":
        config = {"method": "eagle3", "model": drafter, "num_speculative_tokens": 4}
        return {"speculative_config": config}
    if method == "joined":
        config = {"method": "eagle3", "model": drafter, "num_speculative_tokens": 16}
        return {"speculative_config": config | {"disable_padded_drafter_batch": True}} | ours
    if method in ("ngram_gpu", "host", "device"):
        config = {"method": "ngram_gpu", "num_speculative_tokens": 16}
        if method == "ngram_gpu":
            lookup = {"prompt_lookup_min": 2, "prompt_lookup_max": 5}
            return {"speculative_config": config | lookup}
        return {"speculative_config": config, "async_scheduling": method == "device"} | ours
    if method == "ngram":
        config = {"method": "ngram", "num_speculative_tokens": 8}
        return {"speculative_config": config | {"prompt_lookup_min": 2, "prompt_lookup_max": 5}}
    if method == "suffix":
        return {"speculative_config": {"method": "suffix", "num_speculative_tokens": 16}}
    if method == "idle":
        config = {"method": "custom_class", "model": "vllm_path.Idle"}
        return {"speculative_config": config | {"num_speculative_tokens": 16}}
    if method == "tascade":
        name = "tascade.integrations.vllm.TascadeProposer"
        config = {"method": "custom_class", "model": name, "num_speculative_tokens": 16}
        return {"speculative_config": config} | ours
    return {}


class Idle:
    """A proposer that never drafts."""

    def __init__(self, vllm_config: Any) -> None:
        """What vLLM gives, unused."""

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to load."""

    def propose(self, sampled_token_ids: Any, *args: Any, **kwargs: Any) -> list[list[int]]:
        return [[] for _ in sampled_token_ids]


def work(method: str, model: str, pack: str, options: argparse.Namespace) -> None:
    """The process of one engine: answers jobs read from standard input, a JSON line each."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    if method in ("host", "device"):
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"
    out = os.dup(1)
    os.dup2(2, 1)  # whatever the libraries print must not come between the answers
    from vllm import LLM

    llm = LLM(
        model=model,
        dtype=options.dtype,
        max_num_seqs=max(MOST_SEQUENCES, *options.concurrency),
        max_model_len=LENGTH,
        enable_prefix_caching=False,
        seed=0,
        **speculative(method, pack, str(options.drafter)),
    )
    kept: set[str] = set()
    say(out, {"ready": True})
    for line in sys.stdin:
        job = json.loads(line)
        result = drive(llm, options.tokens, **job["run"]) if "run" in job else {}
        if job.get("forget") and method == "suffix":
            forget(llm, kept)
        elif method == "suffix":
            kept = answers_of(llm)
        if job.get("stats") and method in OURS:
            result["stats"] = llm.collective_rpc("tascade_stats")[0]
        say(out, result)


def suffix_cache(llm: Any) -> Any:
    core = llm.llm_engine.engine_core.engine_core
    return core.model_executor.driver_worker.worker.model_runner.drafter.suffix_cache


def answers_of(llm: Any) -> set[str]:
    """Names of the requests whose answers the suffix drafter holds."""
    return set(suffix_cache(llm).cached_requests)


def forget(llm: Any, kept: set[str]) -> None:
    """Take from the suffix drafter the answers it learned since ``kept`` was noted."""
    cache = suffix_cache(llm)
    for name in set(cache.cached_requests) - kept:
        cache.evict_cached_response(name)
    assert set(cache.cached_requests) == kept


def say(out: int, message: dict[str, Any]) -> None:
    os.write(out, (json.dumps(message) + "\n").encode())


def drive(
    llm: Any, most: int, prompts: list[list[int]], concurrency: int, workload: str
) -> dict[str, Any]:
    """Answer all prompts, ``concurrency`` of them under way at a time, ``most`` tokens each."""
    from vllm import SamplingParams

    options: dict[str, Any] = {"temperature": 2.0 if workload == "sampled" else 0.0}
    lengths = [most] * len(prompts)
    if workload != "task":  # of many lengths, or plain decoding would go in lockstep
        options["ignore_eos"] = True
        lengths = [NOISE_TOKENS + (37 * i) % (2 * NOISE_TOKENS) for i in range(len(prompts))]
    engine = llm.llm_engine
    answers: dict[str, list[int]] = {}
    waiting = [(str(i), prompt) for i, prompt in enumerate(prompts)][::-1]
    begin, under_way, steps = time.perf_counter(), 0, 0
    while waiting or under_way:
        while waiting and under_way < concurrency:
            name, prompt = waiting.pop()
            params = SamplingParams(max_tokens=lengths[int(name)], **options)
            engine.add_request(name, {"prompt_token_ids": prompt}, params)
            under_way += 1
        steps += 1
        for output in engine.step():
            if output.finished:
                answers[output.request_id.split("-")[0]] = list(output.outputs[0].token_ids)
                under_way -= 1
    seconds = time.perf_counter() - begin
    ordered = [answers[str(i)] for i in range(len(prompts))]
    tokens = sum(map(len, ordered))
    return {"seconds": seconds, "tokens": tokens, "steps": steps, "answers": ordered}


class Worker:
    """The other end of :func:`work`."""

    def __init__(self, method: str, model: Path, options: argparse.Namespace) -> None:
        command = [sys.executable, __file__, "--work", method, "--model", str(model)]
        command += ["--shared", str(options.shared), "--packs", str(options.packs)]
        command += ["--dtype", options.dtype, "--tokens", str(options.tokens)]
        command += ["--drafter", str(options.drafter)]
        command += ["--concurrency", *map(str, options.concurrency)]
        self.process = subprocess.Popen(
            [*command, "--task", options.task],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if options.verbose else subprocess.DEVNULL,
            text=True,
        )
        self.read()

    def read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("an engine's process ended; run with --verbose to see why")
        message: dict[str, Any] = json.loads(line)
        return message

    def ask(self, **job: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return self.read()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(60)


def model_of(options: argparse.Namespace) -> Path:
    return Path(options.model or options.shared / "models" / "pilot")


def encode(options: argparse.Namespace) -> dict[str, list[list[int]]]:
    """Token ids of the prompts of each split."""
    from transformers import AutoTokenizer

    from tascade.data.encode import encode_prompt
    from tascade.data.load import load_examples

    tokenizer = AutoTokenizer.from_pretrained(model_of(options))
    folder = options.shared / "data" / options.task
    found = {}
    for name in ("train", "validation", "test"):
        examples = list(load_examples(folder / f"{name}.jsonl"))[: options.warm]
        found[name] = [encode_prompt(tokenizer, e.prompt or "").tolist() for e in examples]
    return found


def rounds(
    prompts: dict[str, list[list[int]]], concurrency: int, repeats: int, most: int = 0
) -> Any:
    """The rows of the warming round and of each repeat: of more requests at a time, more rows."""
    size = min(len(prompts["test"]) // repeats, most or 32 + 4 * concurrency)
    blocks = [prompts["test"][i * size : (i + 1) * size] for i in range(repeats)]
    return [prompts["validation"][:size], *blocks]


def noise_rounds(concurrency: int, repeats: int) -> Any:
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
    seconds: dict[str, list[float]], tokens: dict[str, list[int]], base: str, ours: str = "tascade"
) -> Any:
    """Speed of ``ours`` against ``base``: median, low and high over the repeats."""
    each = [
        (b / n) / (a / m)
        for a, m, b, n in zip(seconds[ours], tokens[ours], seconds[base], tokens[base], strict=True)
    ]
    return {"median": statistics.median(each), "low": min(each), "high": max(each)}


def measure(
    workers: dict[str, Worker], rows: list[list[list[int]]], concurrency: int, options: Any
) -> dict[str, Any]:
    """Every method on every round of ``rows``; the first round warms up and is not counted."""
    seconds: dict[str, list[float]] = {method: [] for method in workers}
    tokens: dict[str, list[int]] = {method: [] for method in workers}
    steps: dict[str, list[int]] = {method: [] for method in workers}
    answers: dict[str, list[list[list[int]]]] = {method: [] for method in workers}
    names = list(workers)
    for repeat, prompts in enumerate(rows):
        for method in names[repeat % len(names) :] + names[: repeat % len(names)]:
            run = {"prompts": prompts, "concurrency": concurrency, "workload": options.workload}
            done = workers[method].ask(run=run, forget=True)
            if repeat:
                seconds[method].append(done["seconds"])
                tokens[method].append(done["tokens"])
                steps[method].append(done["steps"])
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
                for ours, theirs in zip(answers[method], answers["plain"], strict=True)
                for a, b in zip(ours, theirs, strict=True)
            ]
            row |= {"identical": sum(same), "differing": len(same) - sum(same)}
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
        workers = {method: Worker(method, model, options) for method in options.methods}
    prompts = encode(options)
    if "suffix" in workers:
        warm = {"prompts": prompts["train"], "concurrency": MOST_SEQUENCES, "workload": "task"}
        workers["suffix"].ask(run=warm)
    results = []
    for concurrency in options.concurrency:
        rows = rounds(prompts, concurrency, options.repeats, options.rows)
        if options.workload != "task":
            rows = noise_rounds(concurrency, options.repeats)
        results.append(measure(workers, rows, concurrency, options))
        print(json.dumps(brief(results[-1])), flush=True)
    stats = {
        method: workers[method].ask(stats=True)["stats"] for method in OURS if method in workers
    }
    for worker in workers.values():
        worker.close()
    arguments = [
        "--task",
        options.task,
        "--workload",
        options.workload,
        "--repeats",
        str(options.repeats),
        "--methods",
        *options.methods,
    ]
    arguments += ["--dtype", options.dtype, "--tokens", str(options.tokens)]
    arguments += ["--rows", str(options.rows)] if options.rows else []
    return {
        "command": " ".join(["python benchmarks/vllm_path.py", *arguments]),
        "machine": machine_info() | {"vllm": __version__},
        "settings": {
            "task": options.task,
            "dtype": options.dtype,
            "max_tokens": options.tokens,
            "max_num_seqs": max(MOST_SEQUENCES, *options.concurrency),
            "suffix_warmed_with": f"own answers to {len(prompts['train'])} training prompts",
        },
        "results": results,
        **stats,
    }


def brief(result: dict[str, Any]) -> dict[str, Any]:
    last = [f"{ours}_against" for ours in OURS if f"{ours}_against" in result][-1:]
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
    parser.add_argument("--warm", type=int, default=3000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS[:4]))
    parser.add_argument("--workload", choices=["task", "incompressible", "sampled"], default="task")
    parser.add_argument("--verbose", action="store_true", help="show what the engines print")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--work", choices=METHODS, help=argparse.SUPPRESS)
    parser.add_argument("--model", help="the pilot by default")
    parser.add_argument("--drafter", default="", help="folder of `tascade export`")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--tokens", type=int, default=256, help="most tokens of an answer")
    parser.add_argument("--rows", type=int, default=0, help="rows of a repeat, if not by load")
    options = parser.parse_args()
    if options.work:
        pack = str(options.packs / options.task)
        work(options.work, options.model, pack, options)
        return
    found = report(options)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

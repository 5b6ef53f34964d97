"""The engines that ``benchmarks/vllm_path.py`` compares, each in a process of its own.

A process reads jobs from standard input, a JSON line each, and answers a line for each. It is made
by :class:`Worker`, whose arguments it gets as its first job.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import llama

METHODS = ("plain", "ngram", "suffix", "tascade", "idle", "network", "joined")
METHODS += ("ngram_gpu", "host", "device")  # of vLLM's second model runner
METHODS += ("loop", *llama.METHODS)  # tascade's own loop; llama.cpp
OURS = ("tascade", "joined", "host", "device", "loop")
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
        config = {"method": "custom_class", "model": "engines.Idle"}
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


class Vllm:
    """An engine of vLLM in this process."""

    def __init__(self, method: str, told: dict[str, Any]) -> None:
        os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        if method in ("host", "device"):
            os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"
        from vllm import LLM

        self.kept: set[str] = set()
        self.suffix = method == "suffix"
        self.llm = LLM(
            model=told["model"],
            dtype=told["dtype"],
            max_num_seqs=told["requests"],
            max_model_len=told["length"],
            enable_prefix_caching=told["prefixes"],
            seed=0,
            **speculative(method, told["pack"], told["drafter"]),
        )

    def drive(self, **job: Any) -> dict[str, Any]:
        return drive(self.llm, **job)

    def keep_answers(self) -> None:
        """What the suffix drafter has learned so far stays."""
        if self.suffix:
            self.kept = set(suffix_cache(self.llm).cached_requests)

    def forget_answers(self) -> None:
        """Take from the suffix drafter the answers it learned since :meth:`keep_answers`."""
        if self.suffix:
            cache = suffix_cache(self.llm)
            for name in set(cache.cached_requests) - self.kept:
                cache.evict_cached_response(name)
            assert set(cache.cached_requests) == self.kept

    def forget_prompts(self) -> None:
        self.llm.reset_prefix_cache()

    def stats(self) -> Any:
        return self.llm.collective_rpc("tascade_stats")[0]


def suffix_cache(llm: Any) -> Any:
    core = llm.llm_engine.engine_core.engine_core
    return core.model_executor.driver_worker.worker.model_runner.drafter.suffix_cache


class Loop:
    """tascade's own loop, one request after the other; it keeps the pack's prefixes alone."""

    def __init__(self, pack: str) -> None:
        from tascade import TaskModel

        self.task = TaskModel.from_pretrained(pack)

    def drive(
        self, prompts: list[list[int]], concurrency: int, most: int, workload: str
    ) -> dict[str, Any]:
        params = self.task.params(max_new_tokens=most, temperature=0.0)
        begin = time.perf_counter()
        made = [self.task.decoder.generate(prompt, params) for prompt in prompts]
        seconds = time.perf_counter() - begin
        return {"seconds": seconds, "answers": [[int(token) for token in m.tokens] for m in made]}


def drive(
    llm: Any, prompts: list[list[int]], concurrency: int, most: int, workload: str
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
    return {"seconds": seconds, "steps": steps, "answers": ordered}


def opened(method: str, told: dict[str, Any]) -> Any:
    if method in llama.METHODS:
        work, model = Path(told["llama"]), Path(told["model"])
        return llama.LlamaServer(method, work, model, told["requests"], told["length"])
    return Loop(told["pack"]) if method == "loop" else Vllm(method, told)


def work(method: str) -> None:
    """The process of one engine."""
    out = os.dup(1)
    os.dup2(2, 1)  # whatever the libraries print must not come between the answers

    def say(message: dict[str, Any]) -> None:
        os.write(out, (json.dumps(message) + "\n").encode())

    engine = opened(method, json.loads(sys.stdin.readline()))
    say({"ready": True})
    for line in sys.stdin:
        job = json.loads(line)
        result = engine.drive(**job["run"]) if "run" in job else {}
        for what in job.get("then", ()):
            result[what] = getattr(engine, what, nothing)()
        say(result)
    getattr(engine, "close", nothing)()


def nothing() -> None:
    """What an engine does of which it has no need."""


class Worker:
    """The other end of :func:`work`."""

    def __init__(self, method: str, told: dict[str, Any], *, verbose: bool) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__, method],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if verbose else subprocess.DEVNULL,
            text=True,
        )
        self.ask(**told)

    def ask(self, **job: Any) -> dict[str, Any]:
        """Give it a job (``run`` prompts, and methods of its engine to call ``then``); wait."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("an engine's process ended; run with --verbose to see why")
        message: dict[str, Any] = json.loads(line)
        return message

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(60)


if __name__ == "__main__":
    work(sys.argv[1])

"""A server under load: many clients, memory, and everything that should not happen.

    python benchmarks/server_load.py PACK --data test.jsonl --json benchmarks/server_load.json
    python benchmarks/server_load.py PACK --data test.jsonl --engine vllm --json ...

A server in its own process, the built-in one or vLLM's (then run it with the Python that holds
vLLM); the official client asks ``--requests`` times, ``--concurrency`` at a time, every second
answer streamed. Every text must be what the model says in this process. Memory is the resident size
of the server and its children after a fifth of the requests and at the end. What should not happen
is tried on the built-in server alone: vLLM's answers to it are vLLM's.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
from openai import AsyncOpenAI

from tascade.bench.machine import machine_info
from tascade.data.load import load_examples
from tascade.model import TaskModel

MOST_TOKENS = 64
MOST_GROWTH = 0.02


class Server:
    """`tascade serve` on a free port."""

    def __init__(self, pack: str, engine: str, *flags: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url, self.key = f"http://127.0.0.1:{port}", "load"
        command = [sys.executable, "-m", "tascade.cli", "serve", pack, "--engine", engine]
        self.process = subprocess.Popen(
            [*command, "--port", str(port), "--served-model-name", "m", *flags],
            # oneDNN keeps a kernel for each number of rows that it met, 1,024 by default: they come
            # to half a gigabyte in vLLM's worker. With fewer what is left is what may be a leak.
            env={"VLLM_CPU_KVCACHE_SPACE": "1", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64"}
            | os.environ
            | {"TASCADE_API_KEY": self.key, "VLLM_API_KEY": self.key},
            stderr=subprocess.DEVNULL,
        )
        while True:
            time.sleep(0.2)
            try:
                if httpx.get(f"{self.url}/health").status_code == 200:
                    return
            except httpx.TransportError:
                assert self.process.poll() is None

    def memory(self) -> int:
        server = psutil.Process(self.process.pid)
        return sum(p.memory_info().rss for p in (server, *server.children(recursive=True)))

    def close(self) -> None:
        """End it and its children."""
        with contextlib.suppress(psutil.NoSuchProcess):  # it may have ended, as it was told to
            for child in psutil.Process(self.process.pid).children(recursive=True):
                child.kill()
        self.process.kill()

    def post(self, content: bytes, key: str = "load", path: str = "chat/completions") -> int:
        headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
        reply = httpx.post(f"{self.url}/v1/{path}", content=content, headers=headers, timeout=60)
        return reply.status_code


async def ask(client: AsyncOpenAI, prompt: str, *, stream: bool) -> tuple[str, float]:
    begin = time.perf_counter()
    options: Any = {"temperature": 0, "max_tokens": MOST_TOKENS, "stream": stream}
    messages: Any = [{"role": "user", "content": prompt}]
    reply = await client.chat.completions.create(model="m", messages=messages, **options)
    if not stream:
        return reply.choices[0].message.content or "", time.perf_counter() - begin
    text = ""
    async for chunk in reply:
        text += "".join(choice.delta.content or "" for choice in chunk.choices)
    return text, time.perf_counter() - begin


async def load(server: Server, prompts: list[str], wanted: list[str], options: Any) -> Any:
    """A fifth of the load warms up; memory is counted from there. Returns the figures."""
    client = AsyncOpenAI(base_url=f"{server.url}/v1", api_key=server.key, max_retries=0)
    turn = asyncio.Semaphore(options.concurrency)
    failures: list[str] = []
    seconds: list[float] = []

    async def one(i: int) -> None:
        async with turn:
            try:
                text, took = await ask(client, prompts[i % len(prompts)], stream=i % 2 == 1)
            except Exception as error:
                failures.append(repr(error))
                return
            seconds.append(took)
            if text != wanted[i % len(prompts)]:
                failures.append(f"request {i} said something else")

    warm = options.requests // 5
    await asyncio.gather(*(one(i) for i in range(warm)))
    base = server.memory()
    begin = time.perf_counter()
    await asyncio.gather(*(one(i) for i in range(warm, options.requests)))
    took, end = time.perf_counter() - begin, server.memory()
    quantiles = dict(zip(("p50", "p99"), np.quantile(seconds, (0.5, 0.99)).tolist(), strict=True))
    return {
        "requests": options.requests,
        "concurrency": options.concurrency,
        "failures": failures,
        "requests_per_second": (options.requests - warm) / took,
        "seconds": quantiles,
        "memory": {"after_warm_up": base, "end": end, "growth": end / base - 1.0},
    }


def endless(prompt: str) -> bytes:
    body = {"messages": [{"role": "user", "content": prompt}], "temperature": 50.0, "stream": True}
    return json.dumps(body | {"seed": 0, "max_tokens": 900}).encode()


def leaves(server: Server, prompt: str) -> bool:
    """Clients that go away mid-stream leave a server that answers at once."""
    headers = {"authorization": "Bearer load", "content-type": "application/json"}
    address = f"{server.url}/v1/chat/completions"
    for _ in range(10):
        with httpx.stream("POST", address, content=endless(prompt), headers=headers) as reply:
            next(reply.iter_lines())
    page = httpx.get(f"{server.url}/metrics", headers=headers).text
    said = json.dumps({"messages": [{"role": "user", "content": "x"}], "max_tokens": 1}).encode()
    return server.post(said) == 200 and "tascade_cancelled_total" in page


def stops(server: Server, prompt: str) -> bool:
    """SIGTERM while streams are open: each ends with [DONE], and the server with 0."""
    headers = {"authorization": "Bearer load", "content-type": "application/json"}
    address = f"{server.url}/v1/chat/completions"
    with httpx.stream(
        "POST", address, content=endless(prompt), headers=headers, timeout=60
    ) as reply:
        lines = reply.iter_lines()
        next(lines)
        server.process.send_signal(signal.SIGTERM)
        last = [line for line in lines if line][-1]
    return last == "data: [DONE]" and server.process.wait(60) == 0


def nasty(server: Server, prompt: str) -> dict[str, bool]:
    """What clients should not do, and whether the server took it as it should."""
    deep = b"[" * 100_000
    long = json.dumps({"messages": [{"role": "user", "content": "word " * 50_000}]}).encode()
    cases: dict[str, Callable[[], bool]] = {
        "malformed bodies: 400": lambda: (
            {server.post(body) for body in (b"", b"{", b"null", b"\xff\xfe", deep, b'{"n": 1e999}')}
            == {400}
        ),
        "a huge prompt: 400": lambda: server.post(long) == 400,
        "a huge body: 413": lambda: server.post(b'"' + b"x" * 8_000_000 + b'"') == 413,
        "a wrong key: 401": lambda: server.post(endless("x"), key="wrong") == 401,
        "clients that leave mid-stream": lambda: leaves(server, prompt),
        "SIGTERM under load": lambda: stops(server, prompt),
    }
    return {name: case() for name, case in cases.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pack")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--engine", choices=["builtin", "vllm"], default="builtin")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    model = TaskModel.from_pretrained(options.pack, dtype="float32")
    prompts = [str(row.prompt) for row in list(load_examples(options.data))[:50]]
    wanted = [model.run(prompt, max_new_tokens=MOST_TOKENS).text for prompt in prompts]
    builtin = options.engine == "builtin"
    # Few blocks of KV cache, which the warm-up touches all: vLLM sets aside more than it uses.
    flags = ("--grace", "1") if builtin else ("--num-gpu-blocks-override", "256")
    server = Server(options.pack, options.engine, "--dtype", "float32", *flags)
    try:
        found = asyncio.run(load(server, prompts, wanted, options))
        cases = nasty(server, prompts[0]) if builtin else {}
    finally:
        server.close()
    report = {
        "command": " ".join(["python", *sys.argv]),
        "machine": machine_info(),
        **found,
        "cases": cases,
        "passed": {
            "no failure": not found["failures"],
            "memory": found["memory"]["growth"] <= MOST_GROWTH,
        }
        | ({"cases": all(cases.values())} if builtin else {}),
    }
    print(json.dumps(report, indent=1))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()

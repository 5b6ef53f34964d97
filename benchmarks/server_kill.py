"""kill -9 of a server that learns, at random moments under load: what is lost?

    python benchmarks/server_kill.py PACK --data train.jsonl --json benchmarks/server_kill.json

Clients ask for sampled answers, so that most are new and are learned; the server dies at a random
moment; the pack and the learned folder are opened and compared with what the clients were told. An
answer counts as flushed when its client had it at least ``--flush`` seconds before the end: a
learner writes ten times a second.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from openai import AsyncOpenAI

from server_load import Server
from tascade.bench.machine import machine_info
from tascade.data.load import load_examples
from tascade.index.corpus import CorpusIndex
from tascade.index.learned import LearnedCorpus
from tascade.model import TaskModel

CLIENTS = 8
MOST_TOKENS = 160


@dataclass(slots=True)
class Told:
    """Answers that clients were given, with the moment each came."""

    texts: dict[str, float] = field(default_factory=dict)


async def ask_on(server: Server, prompts: list[str], rng: random.Random, told: Told) -> None:
    """Ask until the server is gone."""
    client = AsyncOpenAI(base_url=f"{server.url}/v1", api_key=server.key, max_retries=0)
    messages: Any
    while True:
        messages = [{"role": "user", "content": rng.choice(prompts)}]
        reply = await client.chat.completions.create(
            model="m",
            messages=messages,
            temperature=1.0,
            seed=rng.getrandbits(31),
            max_tokens=MOST_TOKENS,
        )
        if reply.choices[0].finish_reason == "stop":
            told.texts.setdefault(reply.choices[0].message.content or "", time.monotonic())


async def load(server: Server, prompts: list[str], rng: random.Random, told: Told) -> float:
    """Clients ask until the server is killed, at a random moment; returns when that was."""
    clients = [asyncio.ensure_future(ask_on(server, prompts, rng, told)) for _ in range(CLIENTS)]
    await asyncio.sleep(rng.uniform(0.5, 4.0))
    server.process.kill()
    end = time.monotonic()
    with contextlib.suppress(Exception):
        await asyncio.wait(clients, timeout=5)
    for client in clients:
        client.cancel()
    await asyncio.gather(*clients, return_exceptions=True)
    server.process.wait()
    return end


def stored(folder: Path, model: TaskModel) -> dict[str, int]:
    """Texts that survived, as the next owner of the folder finds them."""
    fingerprint, size = model.corpus.fingerprint, model.corpus.vocab_size
    LearnedCorpus(folder, fingerprint, size, 1_000_000).close()  # mends what was half-written
    index = CorpusIndex.open(folder, fingerprint=fingerprint)
    documents = [tokens.tolist() for _, tokens in index.documents()]
    decode = model.tokenizer.decode
    return {decode(ids, skip_special_tokens=True).strip(): len(ids) for ids in documents}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pack")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--flush", type=float, default=0.5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    model = TaskModel.from_pretrained(options.pack, dtype="float32")
    prompts = [str(row.prompt) for row in list(load_examples(options.data))[:500]]
    rng, told, rounds = random.Random(1), Told(), []
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "learned"
        for kill in range(options.kills):
            server = Server(options.pack, "--learn", str(folder))
            end = asyncio.run(load(server, prompts, rng, told))
            TaskModel.from_pretrained(options.pack, dtype="float32")  # the pack still opens
            found = stored(folder, model)
            lost = {text: at for text, at in told.texts.items() if text.strip() not in found}
            old = [text for text, at in lost.items() if at < end - options.flush]
            rounds.append(
                {
                    "told": len(told.texts),
                    "stored": len(found),
                    "lost_unflushed": len(lost) - len(old),
                    "lost_flushed": len(old),
                }
            )
            print(kill, rounds[-1], flush=True)
            for text in lost:
                del told.texts[text]
    report = {
        "command": "python benchmarks/server_kill.py PACK --data train.jsonl",
        "machine": machine_info(),
        "kills": options.kills,
        "flush_seconds": options.flush,
        "rounds": rounds,
        "passed": all(entry["lost_flushed"] == 0 for entry in rounds),
    }
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()

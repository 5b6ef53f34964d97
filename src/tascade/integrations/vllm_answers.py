"""Answers many prompts in vLLM, drafted for by tascade: a program that ``adapt --self`` starts.

    python -m tascade.integrations.vllm_answers FOLDER

It is a process of its own, so that all that vLLM holds is given back when it ends, and so that none
of what vLLM changes in a process is changed in the caller's. What passes between them are files of
token ids (:mod:`tascade.answers.engine` writes and reads them), no pickles:

- ``job.json``: the engine's settings;
- ``prompts.npz``: the prompts and how many tokens each answer may have;
- ``answers.jsonl``: ``[which prompt, [ids]]`` a line, as they come.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tascade.errors import ConfigError
from tascade.integrations.vllm_options import check_version

PROPOSER = "tascade.integrations.vllm.TascadeProposer"
_CHUNK_SECONDS, _LEAST_CHUNK, _MOST_CHUNK = 15.0, 8, 2048
_LOOK = 0.5


def main(folder: Path) -> None:
    """Answer the prompts of a job, a chunk at a time, as many as its seconds allow.

    Raises:
        ConfigError: a vLLM that was not tried, or one for another device than the job's.
    """
    begin = time.monotonic()
    job = json.loads((folder / "job.json").read_bytes())
    with np.load(folder / "prompts.npz") as arrays:
        prompts = np.split(arrays["ids"], arrays["ends"][:-1])
        limits = arrays["limits"].tolist()
    check_version(importlib.metadata.version(_distribution()))
    engine = _engine(job)
    done, chunk = 0, int(job["first"])
    with (folder / "answers.jsonl").open("a", encoding="ascii") as file:
        while done < len(prompts):
            if time.monotonic() - begin > job["seconds"]:
                break
            start, places = time.monotonic(), range(done, min(done + chunk, len(prompts)))
            asked = [prompts[at].tolist() for at in places]
            said = _said(engine, asked, [limits[at] for at in places], job["ends"])
            for at, ids in zip(places, said, strict=True):
                file.write(json.dumps([at, ids]) + "\n")
            file.flush()
            done += len(places)
            rate = len(places) / max(time.monotonic() - start, 1e-3)
            left = job["seconds"] - (time.monotonic() - begin)
            chunk = _next_chunk(len(places), rate, left, int(job["requests"]))


def run(folder: Path) -> None:
    """:func:`main`, which ends when the process that started this one is gone, whatever it is at.

    Raises:
        ConfigError: see :func:`main`.
    """
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    main(folder)


def _end_with(parent: int) -> None:
    """End this process, and those that it started, once ``parent`` is gone.

    Looked at from a thread of its own: loading an engine and a chunk of answers take a minute, in
    which nobody would read what is written.
    """
    while os.getppid() == parent:
        time.sleep(_LOOK)
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


def _next_chunk(last: int, rate: float, left: float, requests: int) -> int:
    """How many prompts to go on with.

    Args:
        last: how many there were.
        rate: how many were answered in a second.
        left: seconds until no more are begun.
        requests: how many are answered at once, if there are so many.
    """
    wanted = max(int(rate * _CHUNK_SECONDS), min(2 * last, requests))
    return max(min(wanted, int(rate * left), _MOST_CHUNK), _LEAST_CHUNK)


def _distribution() -> str:
    """What vLLM was installed as: its build for a CPU has another name."""
    return importlib.metadata.packages_distributions()["vllm"][0]


def _engine(job: dict[str, Any]) -> Any:
    from vllm.platforms import current_platform

    import vllm

    if current_platform.device_type != job["device"]:
        raise ConfigError(
            "this vLLM is for another device than the model is on",
            got=current_platform.device_type,
            wanted=job["device"],
        )
    speculative = {
        "method": "custom_class",
        "model": PROPOSER,
        "num_speculative_tokens": job["drafted"],
    }
    return vllm.LLM(
        model=job["model"],
        tokenizer=job["model"],
        dtype=job["dtype"],
        seed=0,
        # The checkpoint's defaults are in the job already: what it asks for is read once.
        generation_config="vllm",
        max_model_len=job["length"],
        max_num_seqs=job["requests"],
        speculative_config=speculative,
        additional_config={"tascade": job["tascade"]},
        **job["memory"],
    )


def _said(
    engine: Any, prompts: Sequence[list[int]], limits: Sequence[int], ends: Sequence[int]
) -> list[list[int]]:
    """The greedy answers, each up to its end token or its limit."""
    from vllm import SamplingParams

    # vLLM's own list of end tokens may be another: ours alone end an answer.
    options: dict[str, Any] = {"temperature": 0.0, "stop_token_ids": list(ends)}
    options |= {"ignore_eos": True, "detokenize": False}
    params = [SamplingParams(max_tokens=most, **options) for most in limits]
    given = [{"prompt_token_ids": ids} for ids in prompts]
    outputs = engine.generate(given, params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


if __name__ == "__main__":
    run(Path(sys.argv[1]))

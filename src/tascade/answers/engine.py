"""Another program that answers many prompts: vLLM, in a process of its own.

What it is asked and what it says are token ids in files (:mod:`tascade.integrations.vllm_answers`
is the program). It drafts from a copy of the pack that is being made, and from its own answers as
they come. Whatever it does not do just as tascade's own loop does is not asked of it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from tascade.core import IntArray
from tascade.decode.equality import NearTies
from tascade.decode.loop import Decoder
from tascade.decode.rope import Rope
from tascade.decode.sampling import SamplingParams
from tascade.decode.stop import bounded
from tascade.decode.supported import table_of_positions
from tascade.errors import TascadeError
from tascade.index.learned import LEARNED_SHARDS
from tascade.index.lookup import MAX_SHARDS
from tascade.pack import Pack
from tascade.util.cpu import dtype_name
from tascade.util.places import publish

MODULE = "tascade.integrations.vllm_answers"
_DRAFTED = 16
_REQUESTS = {"cpu": 32, "cuda": 128}
"""Requests at once, by the kind of device."""
_MOST_CACHE = 4 << 30
_SHARE_OF_FREE = 0.85
_POLL, _GRACE = 0.2, 180.0
Said = list[tuple[int, list[int]]]


class EngineError(TascadeError):
    """An engine cannot answer in the place of tascade's own loop."""


class Engine(Protocol):
    """What answers many prompts, each as plain greedy decoding would."""

    @property
    def name(self) -> str:
        """What it is called, in progress and messages."""
        ...

    def answers(
        self, prompts: Sequence[IntArray], params: SamplingParams, seconds: float, first: int
    ) -> Generator[Said]:
        """Answers as they come, in the order of the prompts.

        Args:
            prompts: token ids, [T] each.
            params: how they are decoded.
            seconds: after them no further prompt is begun with.
            first: at most so many prompts are answered before anything is heard of them.

        Yields:
            (which prompt, its answer) of those that are new; nothing, several times a second.

        Raises:
            EngineError: it cannot go on.
        """
        ...


def why_not_vllm(model: Any, stored: str, params: SamplingParams) -> str:
    """Why vLLM cannot answer just as the loaded model would here; empty where it can.

    Args:
        model: as it was loaded.
        stored: what another process loads it by, a folder or hub id; empty if there is nothing.
        params: how answers are decoded.
    """
    spec = importlib.util.find_spec("vllm")
    reasons = {
        "vLLM is not installed": spec is None or spec.origin is None,
        "the model is in memory alone": not stored,
        "answers are drawn": params.temperature > 0,
        "a penalty": params.repetition_penalty != 1.0,
        "stop strings": bool(params.stop),
        "log-probabilities": params.logprobs is not None,
        "logits processors of the generation config": params.rules is not None,
        "a quantized model": getattr(model.config, "quantization_config", None) is not None,
        "positions that depend on the length": Rope(model).by_longest,
        # vLLM takes the first device that it sees.
        f"a model on {model.device}": model.device.type not in _REQUESTS
        or bool(model.device.index),
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


@dataclass(frozen=True, slots=True)
class VllmEngine:
    """vLLM in a process of its own, for as long as it answers.

    Attributes:
        model: the loaded model, whose precision and device it is to have.
        stored: what it loads the model by.
        pack: what drafts.
        command: starts the program; the folder of its job is put behind.
    """

    model: Any
    stored: str
    pack: Pack
    command: tuple[str, ...] = (sys.executable, "-m", MODULE)
    name: str = "vLLM"

    def answers(
        self, prompts: Sequence[IntArray], params: SamplingParams, seconds: float, first: int
    ) -> Generator[Said]:
        """See :meth:`Engine.answers`."""
        if not prompts:
            return
        beside = self.pack.path
        with tempfile.TemporaryDirectory(prefix=f"{beside.name}.", dir=beside.parent) as made:
            folder, log = Path(made), Path(made, "log")
            self._write(folder, prompts, params, seconds, first)
            environment = {"VLLM_WORKER_MULTIPROC_METHOD": "spawn", **os.environ}
            if self.model.device.type == "cpu":
                # Engine and worker in one process: else the engine waits in a loop on a core of its
                # own, which vLLM takes from the worker's threads: half of two.
                environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
            with log.open("wb") as told:
                process = subprocess.Popen(
                    [*self.command, made],
                    stdin=subprocess.DEVNULL,
                    stdout=told,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    start_new_session=True,
                )
            try:
                with closing(_read(process, folder / "answers.jsonl", seconds)) as said:
                    yield from said
            finally:
                _end(process)
            if process.returncode:
                raise EngineError(f"{self.name} failed", got=_last_line(log))

    def _write(
        self,
        folder: Path,
        prompts: Sequence[IntArray],
        params: SamplingParams,
        seconds: float,
        first: int,
    ) -> None:
        """The job, and the pack that drafts."""
        config = self.model.config.get_text_config()
        limits = [
            bounded(params, len(p), table_of_positions(config), f"prompt {i}").max_new_tokens
            for i, p in enumerate(prompts)
        ]
        longest = max(len(p) + most for p, most in zip(prompts, limits, strict=True))
        positions = int(getattr(config, "max_position_embeddings", 0) or longest)
        if longest > positions:
            raise EngineError(
                "an answer may be longer than vLLM allows",
                got=f"{longest} tokens of prompt and answer",
                wanted=f"at most {positions}",
            )
        (folder / "pack").mkdir()
        publish(self.pack.path, folder / "pack", _link)
        Pack(folder / "pack", self.pack.info).save()
        tascade = {"pack": str(folder / "pack")}
        if self.pack.info.recipe["spec"]["shards"] <= MAX_SHARDS - LEARNED_SHARDS:
            tascade["learn"] = str(folder / "learned")
        device, length = self.model.device.type, min(positions, longest + _DRAFTED)
        job = {
            "model": self.stored,
            "dtype": dtype_name(self.model.dtype),
            "device": device,
            "tascade": tascade,
            "drafted": _DRAFTED,
            "length": length,
            "requests": _REQUESTS[device],
            "first": max(1, min(first, 2 * _REQUESTS[device])),
            "memory": _memory(config, self.model, length),
            "ends": list(params.end_tokens),
            "seconds": seconds,
        }
        (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
        (folder / "answers.jsonl").touch()
        sizes = np.cumsum([len(p) for p in prompts])
        ids = np.concatenate([np.asarray(p, np.int32) for p in prompts])
        np.savez(folder / "prompts.npz", ids=ids, ends=sizes, limits=np.asarray(limits, np.int64))


def same_words(
    decoder: Decoder,
    params: SamplingParams,
    answers: Sequence[tuple[IntArray, list[int], list[int]]],
) -> None:
    """Compare answers of an engine with the model's own here.

    A difference at a tie up to rounding is let pass; in half precision others are, unless all
    answers have one.

    Args:
        decoder: of the model here.
        params: how both were decoded.
        answers: prompt [T], the answer here, and the engine's.

    Raises:
        EngineError: it says something else.
    """
    target = decoder.target
    ties = NearTies(target, replace(params, rules=None))
    other = [
        (ours, theirs)
        for prompt, ours, theirs in answers
        if ours != theirs and not ties.is_near_tie(prompt, ours, theirs)
    ]
    most = 0 if target.model.dtype == torch.float32 else len(answers) - 1
    if len(other) > most:
        raise EngineError(
            "the engine's answers are not the model's",
            got=other[0][1][:12],
            wanted=f"{other[0][0][:12]}, as the loaded model says",
        )


def _memory(config: Any, model: Any, length: int) -> dict[str, Any]:
    """Options of vLLM by which it leaves the loaded model, and others, their memory."""
    if model.device.type == "cuda":
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(model.device)
        return {"gpu_memory_utilization": round(_SHARE_OF_FREE * free / total, 3)}
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    token = 2 * config.num_hidden_layers * heads * width * model.dtype.itemsize
    # Compiled steps are no faster there, and a minute later.
    need = token * (length + 128) * _REQUESTS["cpu"]
    return {"kv_cache_memory_bytes": min(need, _MOST_CACHE), "enforce_eager": True}


def _link(source: str, copy: str) -> None:
    """The same file under another name; a copy where the disk has no such thing."""
    try:
        os.link(source, copy)
    except OSError:
        Path(copy).write_bytes(Path(source).read_bytes())


def _read(process: subprocess.Popen[bytes], file: Path, seconds: float) -> Generator[Said]:
    """Whole lines as they are written, until the process has ended."""
    latest = time.monotonic() + seconds + _GRACE
    rest = b""
    with file.open("rb") as stream:
        while True:
            ended = process.poll() is not None
            *lines, rest = (rest + stream.read()).split(b"\n")
            try:
                said = [(int(at), [int(i) for i in ids]) for at, ids in map(json.loads, lines)]
            except (ValueError, TypeError) as error:
                raise EngineError("the engine wrote no answers", got=error) from error
            yield said
            if ended:
                return
            if time.monotonic() > latest:
                raise EngineError("the engine does not end", got=f"{_GRACE:g} s past its time")
            time.sleep(_POLL)


def _end(process: subprocess.Popen[bytes]) -> None:
    """See that the process has ended, with those that it started."""
    if process.poll() is None:
        for kind, patience in ((signal.SIGTERM, 15.0), (signal.SIGKILL, 15.0)):
            with suppress(ProcessLookupError):
                os.killpg(process.pid, kind)
            with suppress(subprocess.TimeoutExpired):
                process.wait(patience)
                break
    if process.returncode:  # it may have left some of its own
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def _last_line(log: Path) -> str:
    lines = log.read_text("utf-8", "replace").strip().splitlines()
    errors = [line for line in lines if "Error" in line]
    return (errors or lines or ["nothing was said"])[-1].strip()[:300]

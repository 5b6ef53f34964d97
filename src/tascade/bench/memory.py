"""What a way of decoding needs of memory, from the start of a process of its own.

What a process needed at most cannot be told of one that has held other things before: so each way
gets a process, which loads what it needs, decodes a few prompts, and says what the system counted.
By hand, with prompts as a JSON list on the standard input:

    echo '["a prompt"]' | python -m tascade.bench.memory PACK --head exact --drafts
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tascade.data.encode import Prompt, encode_prompt, end_tokens
from tascade.errors import TascadeError

_STATUS = Path("/proc/self/status")


@dataclass(frozen=True, slots=True)
class MemoryJob:
    """What a process is to load.

    pack: its folder. head: ``full``, ``masked`` or ``exact``. drafts: with the pack's indexes; the
    model alone is loaded otherwise. model: another copy of the pack's. dtype, device: how it is
    loaded. max_new_tokens: of each answer, which is greedy.
    """

    pack: str
    head: str = "full"
    drafts: bool = False
    model: str = ""
    dtype: str = "auto"
    device: str = "auto"
    max_new_tokens: int = 64


@dataclass(frozen=True, slots=True)
class Memory:
    """What a process needed, in bytes.

    vocabulary_bytes: of vocabulary rows on the device: embedding and LM head (once if they are one
        table) where they are there, and the small head with its room, as it was after the last
        answer.
    model_bytes: of all weights on the device, those among them.
    start_bytes, start_anonymous_bytes: resident, and anonymous of it, with the libraries imported
        and no model loaded yet.
    peak_bytes: most that was ever resident (VmHWM), loading included. Pages of mapped files count,
        the checkpoint's among them; they belong to the system, which may drop them.
    anonymous_bytes: resident after the last answer and the process's own (RssAnon).
    device_peak_bytes: most that tensors took on an accelerator; ``None`` on a CPU.
    """

    vocabulary_bytes: int
    model_bytes: int
    start_bytes: int
    start_anonymous_bytes: int
    peak_bytes: int
    anonymous_bytes: int
    device_peak_bytes: int | None = None

    def to_json(self) -> dict[str, Any]:
        """The ``memory`` object of a bench result."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def can_measure() -> bool:
    """Whether this system keeps Linux's account of memory."""
    return _STATUS.is_file()


def measure_memory(
    job: MemoryJob, prompts: Sequence[Prompt], seconds: float = 0.0
) -> dict[str, Any]:
    """Measure in a process of its own, which may take so many ``seconds``; 0 for any time.

    Returns:
        :meth:`Memory.to_json`; or ``{"skipped": why}``, as where there is no room for the model
        twice: what else is being measured need not be lost for that.
    """
    command = [sys.executable, "-m", "tascade.bench.memory", job.pack, "--head", job.head]
    command += ["--drafts"] if job.drafts else []
    command += ["--model", job.model] if job.model else []
    command += ["--dtype", job.dtype, "--device", job.device]
    command += ["--max-new-tokens", str(job.max_new_tokens)]
    given = json.dumps(list(prompts))
    try:
        done = subprocess.run(
            command,
            input=given,
            capture_output=True,
            text=True,
            check=False,
            timeout=seconds or None,
        )
    except subprocess.TimeoutExpired:
        return {"skipped": f"its process took longer than {seconds:.0f} s"}
    try:
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        last = (done.stderr.strip().splitlines() or [""])[-1]
        return {"skipped": f"its process ended with {done.returncode}. {last}"[:200].strip()}
    return found


def measure_here(job: MemoryJob, prompts: Sequence[Prompt]) -> Memory:
    """Load and decode in this process, and read what it has needed since its start.

    Raises:
        TascadeError: the pack, or its model, cannot be used.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401  # takes memory too

    from tascade.decode.sampling import SamplingParams
    from tascade.model import TaskModel  # noqa: F401
    from tascade.pack import Pack

    before = _resident()
    decoder, model, tailored = _load(job)
    chat = Pack.open(job.pack).chat
    tokenizer = decoder.tokenizer
    params = SamplingParams(
        max_new_tokens=job.max_new_tokens, end_tokens=end_tokens(model, tokenizer)
    )
    for prompt in prompts:
        decoder.generate(encode_prompt(tokenizer, prompt, chat), params)
    small = 0 if tailored is None else tailored.head.union.nbytes
    after, on_device = _resident(), model.device.type == "cuda"
    return Memory(
        vocabulary_bytes=small + _table_bytes(model),
        model_bytes=small + sum(part.nbytes for part in model.parameters()),
        start_bytes=before["VmRSS"],
        start_anonymous_bytes=before["RssAnon"],
        peak_bytes=after["VmHWM"],
        anonymous_bytes=after["RssAnon"],
        device_peak_bytes=torch.cuda.max_memory_allocated(model.device) if on_device else None,
    )


def _load(job: MemoryJob) -> tuple[Any, Any, Any]:
    """A decoder, the model under it, and its tailored head or ``None``: no more than is needed."""
    from tascade.decode.loop import Decoder
    from tascade.decode.target import Target
    from tascade.draft.budget import NoDrafter
    from tascade.load import load_model
    from tascade.model import TaskModel
    from tascade.pack import Pack
    from tascade.tailor.offload.load import load_offloaded
    from tascade.tailor.tailored import tailor_pack, vocab_config

    how = {"dtype": job.dtype, "device": job.device}
    if job.drafts:
        made = TaskModel.from_pretrained(job.pack, job.model or None, head=job.head, **how)
        return made.decoder, made.model, made.tailored
    pack = Pack.open(job.pack)
    ref, tables = job.model or pack.base, None
    if vocab_config(pack, job.head).loads_whole:
        model, tokenizer, _ = load_model(ref, **how)
    else:
        tables = load_offloaded(ref, dtype=job.dtype, device=job.device)
        model, tokenizer = tables.model, tables.tokenizer
    tailored = tailor_pack(pack, model, job.head, tables)
    if tailored is None:
        return Decoder(Target(model), NoDrafter(), None, tokenizer), model, None
    return tailored.decoder(NoDrafter(), None, tokenizer), model, tailored


def _table_bytes(model: Any) -> int:
    """Bytes of a model's own two tables, as far as it holds them."""
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    tables = [getattr(end, "weight", None) for end in ends]
    return sum(table.nbytes for table in {id(t): t for t in tables if t is not None}.values())


def _resident() -> dict[str, int]:
    """Bytes by name, of Linux's account of this process."""
    found = {}
    for line in _STATUS.read_text().splitlines():
        name, _, value = line.partition(":")
        if name in ("VmRSS", "VmHWM", "RssAnon"):
            found[name] = int(value.split()[0]) << 10
    return found


def main() -> None:
    """Measure what the command line asks for; print one line of JSON."""
    parser = argparse.ArgumentParser(prog="python -m tascade.bench.memory", description=__doc__)
    parser.add_argument("pack")
    parser.add_argument("--head", choices=("full", "masked", "exact"), default="full")
    parser.add_argument("--drafts", action="store_true")
    parser.add_argument("--model", default="")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    job = MemoryJob(**vars(parser.parse_args()))
    found: dict[str, Any]
    try:
        found = measure_here(job, json.load(sys.stdin)).to_json()
    except TascadeError as error:
        found = {"skipped": error.message}
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()

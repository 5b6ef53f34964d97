"""The device's drafts beside those of the numba kernels, for random contexts, by the interpreter.

INDEX SHARDS TOKENS CONTEXTS DRAFTED: prints how many contexts there were and what differed.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch

from tascade.draft.ngram.batch import BatchDrafter
from tascade.draft.ngram.device import DeviceDrafter
from tascade.draft.ngram.mixer_calibration import Calibration
from tascade.draft.ngram.sources import Task
from tascade.index.corpus import CorpusIndex

VOCAB, END, ROWS, LENGTH = 400, 1, 8, 384


def documents(tokens: int, rng: np.random.Generator) -> list[np.ndarray[Any, Any]]:
    """Templated outputs: long runs that all share, names that differ, rare slips."""
    templates = [rng.integers(2, VOCAB, rng.integers(6, 60)) for _ in range(12)]
    made, total = [], 0
    while total < tokens:
        document = templates[rng.integers(len(templates))].copy()
        slots = rng.integers(0, len(document), 1 + len(document) // 8)
        document[slots] = rng.integers(2, 30, len(slots))
        made.append(np.append(document, END).astype(np.int32))
        total += len(document) + 1
    return made


class Similar:
    """Examples of a prompt: some documents, by its first token."""

    def __init__(self, known: list[np.ndarray[Any, Any]]) -> None:
        self.known = known

    def lookup(self, prompt: Any, top: int = 8) -> list[np.ndarray[Any, Any]]:
        first = int(prompt[0]) if len(prompt) else 0
        return [self.known[(first * 31 + i) % len(self.known)] for i in range(first % (top + 1))]


def contexts(known: list[np.ndarray[Any, Any]], rng: np.random.Generator) -> Any:
    """A prompt and the output so far: of the task, with slips, or of nothing known."""
    document = known[rng.integers(len(known))]
    output = document[: rng.integers(1, len(document))].copy()
    if rng.random() < 0.3:
        output[rng.integers(len(output))] = rng.integers(0, VOCAB)
    if rng.random() < 0.05:
        # Some ids are none: the host leaves such a row alone, the device where it sees them.
        output = rng.integers(0, VOCAB + 40, min(len(output), 32)).astype(np.int32)
    prompt = rng.integers(2, VOCAB, rng.integers(1, 80)).astype(np.int32)
    if rng.random() < 0.5:
        copied = known[rng.integers(len(known))]
        prompt = np.concatenate([prompt, copied, prompt[:4], copied[:9]]).astype(np.int32)
    return prompt, output


def undrafted(device: DeviceDrafter) -> list[list[Any]]:
    """Rows that nothing can be drafted for: what the device drafted for them all the same."""
    ids = torch.randint(2, VOCAB, (ROWS, LENGTH), dtype=torch.int32)
    lengths = torch.full((ROWS,), 40, dtype=torch.int32)
    fresh = torch.ones(ROWS, dtype=torch.int32)
    lengths[0] = 0  # empty
    fresh[1] = 0  # its prompt is still being read
    ids[2, 39], ids[3, 39], ids[4, 30] = -1, VOCAB, 2**31 - 1  # no ids
    lengths[5] = LENGTH  # as long as may be
    ids[6, 39] = END
    rows = torch.tensor([6, 5, 4, 3, 2, 1, 0])
    drafts, odds = device.draft(ids, rows, lengths, torch.ones_like(lengths), fresh[rows])
    last = [max(0, int(ids[row, lengths[row] - 1])) if row else 0 for row in rows.tolist()]
    filled = [row == [token] * len(row) for row, token in zip(drafts.tolist(), last, strict=True)]
    return [] if all(filled) and not odds.any() else [[drafts.tolist(), odds.tolist(), last]]


def compare(shards: int, tokens: int, count: int, most: int, seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    known = documents(tokens, rng)
    folder = Path(tempfile.mkdtemp())
    index = CorpusIndex.build(
        folder / "index", known, vocab_size=VOCAB, fingerprint="rows", shards=shards
    )
    assert len(index.shards) == shards
    calibration = Calibration()
    calibration.cells[..., 0] *= rng.uniform(0.5, 1.0, calibration.cells.shape[:-1])
    calibration.weights += rng.uniform(-0.2, 0.2, calibration.weights.shape)
    task = Task(index, Similar(known), calibration)
    sizes: dict[str, Any] = {"requests": ROWS, "length": LENGTH, "most": most}
    device = DeviceDrafter(task, end_tokens=[END], device=torch.device("cpu"), **sizes)
    differ, drafted, worst, rows = [], 0, 0.0, 0
    host = BatchDrafter([task], end_tokens=[END], threads=1, **sizes)
    while rows < count:
        given = [contexts(known, rng) for _ in range(ROWS)]
        ids, lengths, prompts = np.zeros((ROWS, LENGTH), np.int32), [], []
        for row, (prompt, output) in enumerate(given):
            whole = np.concatenate([prompt, output])
            ids[row, : len(whole)] = whole
            lengths.append(len(whole))
            prompts.append(len(prompt))
            device.admit(row, torch.from_numpy(prompt))
        sampled = [output.tolist() for _, output in given]
        wanted = host.propose(sampled, np.array(lengths, np.int32), ids)
        odds = host._slots.survival[
            host._slot_of[:ROWS]
        ]  # of requests not seen before: none learned
        drafts, likely = device.draft(
            torch.from_numpy(ids),
            torch.arange(ROWS),
            torch.tensor(lengths, dtype=torch.int32),
            torch.tensor(prompts, dtype=torch.int32),
            torch.tensor([len(output) for _, output in given], dtype=torch.int32),
        )
        survival = likely.cumprod(1)
        for row, draft in enumerate(wanted):
            found = drafts[row, : len(draft)].tolist()
            filled = set(drafts[row, len(draft) :].tolist()) <= {int(given[row][1][-1])}
            if found != draft or not filled or survival[row, len(draft) :].any():
                differ.append([row + rows, found, draft])
            gaps = np.abs(survival[row, : len(draft)].numpy() - odds[row, : len(draft)])
            worst = max(worst, float(gaps.max(initial=0.0)))
            drafted += len(draft)
        rows += ROWS
    differ += undrafted(device)
    made = {"rows": rows, "drafted": drafted, "index_bytes": device.index_bytes}
    return made | {"differ": differ, "worst": worst}


if __name__ == "__main__":
    numbers = [int(word) for word in sys.argv[1:]]
    sys.stdout.write(json.dumps(compare(*numbers)))

"""What is trained on: prompts with answers in new tokens, gathered into batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tascade.core import IntArray
from tascade.enrich.tokens.merger import TokenMerger, split_at

Pair = tuple[IntArray | None, IntArray]
"""A prompt [P], if there is one, and its answer [A], in base ids."""
IGNORE_INDEX = -100
"""A target that is not asked for, as torch has it."""
_GRAIN = 32
"""Lengths are multiples of it: on a CPU the matrix library keeps kernels for each shape it has met,
and with every length its own a run over 135M weights came to 16 GB.
"""


_AT_ONCE = 1024
"""Tokens with their padding, on a CPU: a step over all samples at once took 14 GB with a model of
135M weights.
"""


@dataclass(frozen=True, slots=True)
class Sample:
    """``prompt`` [P]; ``answer`` [A], its end token included, in new tokens."""

    prompt: IntArray
    answer: IntArray

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)


@dataclass(frozen=True, slots=True)
class Batch:
    """Padded samples.

    ``ids``, ``mask``: [B, T], padded on the right; ``logits_to_keep``: how many last places the LM
    head is asked for; ``targets``: [B, logits_to_keep], what each of them should say,
    :data:`IGNORE_INDEX` where none is asked.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    logits_to_keep: int
    targets: torch.Tensor

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device."""
        ids, mask, targets = (part.to(device) for part in (self.ids, self.mask, self.targets))
        return Batch(ids, mask, self.logits_to_keep, targets)

    def logits(self, model: Any) -> torch.Tensor:
        """A model's logits where targets stand: [B, logits_to_keep, V]."""
        output = model(
            input_ids=self.ids,
            attention_mask=self.mask,
            logits_to_keep=self.logits_to_keep,
            use_cache=False,
        )
        logits: torch.Tensor = output.logits
        return logits[:, -self.logits_to_keep :]


def make_samples(
    rows: Sequence[Pair],
    merger: TokenMerger,
    max_length: int,
    boundaries: Sequence[IntArray] | None = None,
) -> list[Sample]:
    """Samples from (prompt, answer) pairs in base ids, the answers written with new tokens.

    Args:
        rows: pairs; those without a prompt, or longer than ``max_length``, are left out.
        merger: of the new tokens.
        max_length: tokens of a prompt and its answer in base ids.
        boundaries: ascending places of each row's answer that no new token reaches over.
    """
    found = []
    for number, (prompt, base) in enumerate(rows):
        if prompt is None or not len(prompt) or not len(base):
            continue
        if len(prompt) + len(base) <= max_length:
            parts = [base] if boundaries is None else split_at(base, boundaries[number])
            found.append(Sample(prompt, np.concatenate([merger.merge(part) for part in parts])))
    return found


def prompt_length(row: Pair) -> int:
    """How long a row's prompt is, 0 without one."""
    return 0 if row[0] is None else len(row[0])


def _padded(length: int) -> int:
    return length + -length % _GRAIN


def collate(samples: Sequence[Sample]) -> Batch:
    """One batch of samples, the head asked only where an answer stands."""
    longest = _padded(max(map(len, samples)))
    to_keep = longest - min(len(sample.prompt) for sample in samples) + 1
    to_keep = min(longest, to_keep + -to_keep % _GRAIN)
    ids = np.zeros((len(samples), longest), np.int64)
    mask = np.zeros_like(ids)
    targets = np.full((len(samples), longest + 1), IGNORE_INDEX, np.int64)
    for row, sample in enumerate(samples):
        p, end = len(sample.prompt), len(sample)
        ids[row, :p], ids[row, p:end] = sample.prompt, sample.answer
        mask[row, :end] = 1
        targets[row, p:end] = sample.answer
    targets = np.ascontiguousarray(targets[:, 1:][:, longest - to_keep :])
    # ^ a place says what comes behind it
    return Batch(torch.from_numpy(ids), torch.from_numpy(mask), to_keep, torch.from_numpy(targets))


def passes(samples: Sequence[Sample]) -> list[list[Sample]]:
    """The samples in groups that go through a model at once, the longest first.

    A group has :data:`_AT_ONCE` tokens at most, or one sample.
    """
    groups: list[list[Sample]] = []
    for sample in sorted(samples, key=len, reverse=True):
        longest = _padded(len(groups[-1][0])) if groups else 0
        if not groups or (len(groups[-1]) + 1) * longest > _AT_ONCE:
            groups.append([])
        groups[-1].append(sample)
    return groups


def batches(samples: Sequence[Sample], size: int, seed: int) -> Iterator[list[Sample]]:
    """All samples once, in random batches of about equal prompts, in random order.

    The same ``seed`` gives the same batches. Some may be smaller than ``size``.
    """
    rng = np.random.default_rng(seed)
    order, pool = rng.permutation(len(samples)), 32 * size
    groups: list[list[Sample]] = []
    for start in range(0, len(order), pool):
        near = sorted(order[start : start + pool].tolist(), key=lambda i: len(samples[i].prompt))
        groups += [[samples[i] for i in near[at : at + size]] for at in range(0, len(near), size)]
    for group in rng.permutation(len(groups)).tolist():
        yield groups[group]


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Have torch draw by ``seed`` in the block, and as if nothing had been drawn behind it.

    Args:
        seed: of the draws.
        device: whose draws these are, beside the host's. No other's are touched.
    """
    cuda = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if cuda else []):
        torch.default_generator.manual_seed(seed)
        if cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield

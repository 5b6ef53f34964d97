"""What is trained on: prompts with answers in new tokens, gathered into batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from tascade.core import IntArray
from tascade.enrich.tokens.merger import Merger, pieces

Pair = tuple[IntArray | None, IntArray]
"""A prompt [P], if there is one, and its answer [A], in base ids."""
NOTHING = -100
"""A target that is not asked for."""


@dataclass(frozen=True, slots=True)
class Sample:
    """``prompt`` [P]; ``answer`` [A], its end token included, in new tokens; ``base``: the same
    answer in base tokens; ``starts`` [A]: where each token of ``answer`` begins in ``base``.
    """

    prompt: IntArray
    answer: IntArray
    base: IntArray
    starts: IntArray

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)


@dataclass(frozen=True, slots=True)
class Batch:
    """Padded samples.

    ``ids``, ``mask``: [B, T], padded on the right; ``kept``: how many last places the LM head is
    asked for; ``targets``: [B, kept], what each of them should say, :data:`NOTHING` where none is
    asked; ``base``: the same answers in base tokens, targets only where a token of this batch's
    answers begins.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    kept: int
    targets: torch.Tensor
    base: Batch | None = None

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device."""
        ids, mask, targets = (part.to(device) for part in (self.ids, self.mask, self.targets))
        base = None if self.base is None else self.base.to(device)
        return Batch(ids, mask, self.kept, targets, base)


def merged(
    rows: Sequence[Pair],
    merger: Merger,
    longest: int,
    cuts: Sequence[IntArray] | None = None,
) -> list[Sample]:
    """Samples from (prompt, answer) pairs in base ids, the answers written with new tokens.

    Args:
        rows: pairs; those without a prompt, or longer than ``longest`` tokens, are left out.
        merger: of the new tokens.
        longest: tokens of a prompt and its answer in base ids.
        cuts: ascending places of each row's answer that no new token reaches over.
    """
    found = []
    for number, (prompt, base) in enumerate(rows):
        if prompt is None or not len(prompt) or not len(base):
            continue
        if len(prompt) + len(base) <= longest:
            parts = [base] if cuts is None else pieces(base, cuts[number])
            found.append(Sample(prompt, *_written(base, merger, parts)))
    return found


def prompt_length(row: Pair) -> int:
    """How long a row's prompt is, 0 without one."""
    return 0 if row[0] is None else len(row[0])


def _written(
    base: IntArray, merger: Merger, parts: Sequence[IntArray]
) -> tuple[IntArray, IntArray, IntArray]:
    answer = np.concatenate([merger.merge(part) for part in parts])
    lengths = merger.lengths_of(answer)
    starts = (np.cumsum(lengths) - lengths).astype(np.int32)
    return answer, base, starts


def collate(samples: Sequence[Sample], *, with_base: bool = False) -> Batch:
    """One batch of samples, the head asked only where an answer stands."""
    answers = [sample.answer for sample in samples]
    every = [np.arange(len(answer), dtype=np.int32) for answer in answers]
    batch = _padded([sample.prompt for sample in samples], answers, every)
    if not with_base:
        return batch
    base = [sample.base for sample in samples]
    starts = [sample.starts for sample in samples]
    return replace(batch, base=_padded([sample.prompt for sample in samples], base, starts))


def _padded(
    prompts: Sequence[IntArray], answers: Sequence[IntArray], asked: Sequence[IntArray]
) -> Batch:
    """A batch whose targets are those tokens of the answers that are asked for."""
    lengths = [len(p) + len(a) for p, a in zip(prompts, answers, strict=True)]
    longest = max(lengths)
    kept = longest - min(map(len, prompts)) + 1
    ids = np.zeros((len(prompts), longest), np.int64)
    mask = np.zeros_like(ids)
    targets = np.full((len(prompts), longest + 1), NOTHING, np.int64)
    for row, (prompt, answer, places) in enumerate(zip(prompts, answers, asked, strict=True)):
        p = len(prompt)
        ids[row, :p], ids[row, p : lengths[row]] = prompt, answer
        mask[row, : lengths[row]] = 1
        targets[row, p + places] = answer[places]
    targets = np.ascontiguousarray(targets[:, 1:][:, longest - kept :])
    # ^ a place says what comes behind it
    return Batch(torch.from_numpy(ids), torch.from_numpy(mask), kept, torch.from_numpy(targets))


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

"""The processes that train one model together, as ``accelerate launch`` starts them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch

T = TypeVar("T")
_PATIENCE = timedelta(hours=24)


@dataclass(frozen=True, slots=True)
class Fleet:
    """``count`` processes with a device each; this one is number ``rank``.

    Every process holds the whole model and takes its part of each batch; gradients are those of all
    the batch's tokens, so that many processes take the steps that one would. All read and write the
    same folders.
    """

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and prints."""
        return self.rank == 0

    def part(self, samples: Sequence[T]) -> Sequence[T]:
        """This process's part of a batch; empty if there are fewer samples than processes."""
        return samples[self.rank :: self.count]

    def wait(self) -> None:
        """Until every process is here."""
        if self.count > 1:
            torch.distributed.barrier()

    def total(self, value: float, device: torch.device) -> float:
        """The sum of every process's value."""
        if self.count == 1:
            return value
        both = torch.tensor([value], dtype=torch.float64, device=device)
        torch.distributed.all_reduce(both)
        return float(both)

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Make every process's gradients the sum of all."""
        if self.count == 1:
            return
        learning = [p for p in parameters if p.requires_grad]
        for parameter in learning:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        flat = torch.cat([p.grad.flatten() for p in learning if p.grad is not None])
        torch.distributed.all_reduce(flat)
        at = 0
        for parameter in learning:
            assert parameter.grad is not None
            parameter.grad.copy_(flat[at : at + parameter.numel()].view_as(parameter))
            at += parameter.numel()

    def align(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Give every process the first one's parameters."""
        if self.count > 1:
            for parameter in parameters:
                torch.distributed.broadcast(parameter.data, src=0)


def join_fleet(device: str) -> Fleet:
    """The processes this one was started with; alone unless ``accelerate launch`` started it.

    Args:
        device: ``cpu`` keeps the processes off the GPUs.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) <= 1:
        return Fleet()
    from accelerate import PartialState

    state = PartialState(cpu=device == "cpu", timeout=_PATIENCE)
    return Fleet(state.process_index, state.num_processes)

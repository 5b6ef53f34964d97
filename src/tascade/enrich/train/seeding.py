"""Random draws that follow from a seed, beside those of the program around."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


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

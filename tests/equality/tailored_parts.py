"""What the tests of tailored heads share: models, prompts, lists, a fixed plan, the oracle."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch

from all_pairs import sampled
from tascade import testing
from tascade.decode.lm_head import head_override
from tascade.decode.loop import Decoder
from tascade.decode.sampling import SamplingParams
from tascade.decode.target import Target
from tascade.draft.budget import NoDrafter
from tascade.tailor.offload.table import RowTable
from tascade.tailor.schedule import CheckSchedule

VOCAB = 96
# Tied random Gemmas, whose embeddings are scaled up, say the same token for ever.
_TIED = (False, True)


def _speaks(family: str, tied: bool, *_: Any) -> bool:
    return not (tied and "gemma" in family)


MODELS = [case for case in itertools.product(testing.FAMILIES, _TIED) if _speaks(*case)]


def models_and(*values: Sequence[Any]) -> list[Any]:
    """Families, tied or not, and other values: each pair of any two."""
    return sampled(testing.FAMILIES, _TIED, *values, allowed=_speaks)


@cache
def model(family: str, tied: bool = False) -> Any:
    return testing.tiny_model(family, tie_word_embeddings=tied)


@cache
def _plainly(family: str, tied: bool, prompt: tuple[int, ...], params: SamplingParams) -> list[int]:
    return Decoder(Target(model(family, tied)), NoDrafter()).generate(prompt, params).tokens


def plainly(family: str, tied: bool, prompt: list[int], params: SamplingParams) -> list[int]:
    """What plain decoding says, decoded once."""
    return _plainly(family, tied, tuple(prompt), params)


def prompts(count: int, vocab: int = VOCAB, *, seed: int = 5, most: int = 30) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab, int(rng.integers(1, most))).tolist() for _ in range(count)]


def static(share: float) -> list[int]:
    """Token ids whose choice has nothing to do with what is said."""
    return np.random.default_rng(7).permutation(VOCAB)[: round(share * VOCAB)].tolist()


def small_head(kind: Any, model: Any, share: float) -> Any:
    """A head of ``kind`` (tailored, or a batch's union) of a model's own rows."""
    full = head_override(model).full
    table = RowTable.from_tensor(full.weight.detach().cpu())
    return kind(table, static(share), bias=full.bias, device=model.device)


class Fixed(CheckSchedule):
    """Checks after ``max_unchecked`` guesses, come what may."""

    def plan(self) -> int:
        return self.max_unchecked

    def should_check(self, right: Sequence[float]) -> bool:
        return False


def every(tokens: int) -> CheckSchedule:
    """Checks after so many guesses, come what may."""
    return Fixed(lambda states: 1.0, lambda states: 0.0, tokens)


class Mask:
    """The oracle: all but some tokens ruled out of the full head's scores."""

    def __init__(self, kept: Iterable[int]) -> None:
        self.kept = sorted(set(kept))

    def __call__(self, ids: Any, scores: torch.Tensor) -> torch.Tensor:
        masked = torch.full_like(scores, -torch.inf)
        masked[:, self.kept] = scores[:, self.kept]
        return masked

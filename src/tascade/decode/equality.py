"""Comparing a method's output with plain decoding's, token for token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from tascade.core import IntArray
from tascade.decode.sampling import Sampler, SamplingParams, gumbel
from tascade.decode.target import Target

_TOLERANCE = {torch.float32: (1e-3, 0.0), torch.bfloat16: (0.0, 2**-6), torch.float16: (0.0, 2**-9)}
"""Absolute, and as a share of the largest logit: two steps of 2^-7 (2^-10 in half precision), the
width of the significand. Logits of one place, computed over steps of different lengths, differ by
this much from rounding alone."""


def first_difference(left: Sequence[int], right: Sequence[int]) -> int | None:
    """Where two outputs part; None if they are equal."""
    for i, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return i
    return None if len(left) == len(right) else min(len(left), len(right))


@dataclass(slots=True)
class NearTies:
    """Tells whether two outputs part where the plain target itself could hardly decide.

    The logits at that place are computed again, in one plain forward over the common prefix. It is
    a near tie if both tokens' scores are within the tolerance of the best score. A difference
    where one output has ended and the other goes on is none.
    """

    target: Target
    params: SamplingParams

    @torch.inference_mode()
    def is_near_tie(
        self, prompt: Sequence[int] | IntArray, left: Sequence[int], right: Sequence[int]
    ) -> bool:
        """Whether the first difference of two outputs of ``prompt`` is a near tie."""
        at = first_difference(left, right)
        if at is None or at >= min(len(left), len(right)):
            return False
        prefix = [*(int(token) for token in prompt), *left[:at]]
        self.target.begin()
        logits = self.target.forward(prefix)[-1].float()
        chooser = Sampler(self.params, (), np.asarray(prompt, np.int32))
        scores = chooser.scores(logits, torch.tensor([prefix], device=logits.device)).double()
        tolerance = self._tolerance(float(logits.abs().max()))
        if chooser.sampled:
            ids = torch.arange(len(scores), device=scores.device)
            scores = scores + gumbel(self.params.seed, at, ids)
            tolerance /= self.params.temperature
        worst = min(float(scores[left[at]]), float(scores[right[at]]))
        return float(scores.max()) - worst <= tolerance

    def _tolerance(self, largest: float) -> float:
        absolute, relative = _TOLERANCE.get(self.target.model.dtype, (1e-3, 0.0))
        return absolute + relative * largest

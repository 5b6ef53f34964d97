"""How far a tuned model has moved from its base on text that has nothing to do with the task."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from tascade.decode.exclusive import exclusive
from tascade.enrich.train.seeding import seeded

_ROWS, _TOKENS, _SIDE_BY_SIDE = 16, 32, 64


def free_text(model: Any, size: int, *, rows: int = _ROWS, seed: int = 0) -> torch.Tensor:
    """Text the base model writes from random tokens: [rows, tokens] ids, below ``size``."""
    parts = [
        _write(model, size, min(_SIDE_BY_SIDE, rows - at), seed * 1_000_003 + at)
        for at in range(0, rows, _SIDE_BY_SIDE)
    ]
    return torch.cat(parts)


def _write(model: Any, size: int, rows: int, seed: int) -> torch.Tensor:
    with exclusive(model), seeded(seed, model.device):
        begin = torch.randint(size, (rows, 1)).to(model.device)
        text: torch.Tensor = model.generate(
            begin,
            attention_mask=torch.ones_like(begin),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=_TOKENS - 1,
            min_new_tokens=_TOKENS - 1,
            pad_token_id=0,
        )
    return text


@torch.inference_mode()
def next_tokens(model: Any, text: torch.Tensor, size: int) -> torch.Tensor:
    """Log-probabilities of the next base token: [rows * tokens, size]."""
    with exclusive(model):
        logits = model(input_ids=text.to(model.device)).logits.float()
    found: torch.Tensor = logits.log_softmax(-1)[..., :size].reshape(-1, size).cpu()
    return found


def divergence(base: torch.Tensor, tuned: torch.Tensor) -> float:
    """KL(base || tuned) in nats a token, from log-probabilities [N, V] of each."""
    return float(functional.kl_div(tuned, base, reduction="batchmean", log_target=True))

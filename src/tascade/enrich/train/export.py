"""A tuned model as a plain Hugging Face checkpoint, with a tokenizer any engine opens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tascade.enrich.tokens.extend import save_extended
from tascade.enrich.tokens.stored import TUNING_FILE
from tascade.errors import TascadeError
from tascade.util.files import write_atomic
from tascade.util.places import forget_places

_MOST_APART = {torch.float32: 1e-4}
_COARSE = 2.0**-5  # of the largest logit: the same weights may go through other kernels


def write_model(
    model: Any, tokenizer: Any, expansions: Sequence[Sequence[int]], first: int, folder: Path
) -> None:
    """Write weights, config and the extended tokenizer to ``folder``."""
    model.save_pretrained(folder)
    if expansions:
        save_extended(tokenizer, expansions, first, folder)
    else:
        tokenizer.save_pretrained(folder)
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        forget_places(folder / name)  # of the base model's, where its own files have any


def reopen(folder: Path, model: Any, ids: Sequence[Sequence[int]]) -> tuple[Any, Any]:
    """Open an export as anyone would, and compare it with the model it was made from.

    Args:
        folder: see :func:`write_model`.
        model: what was written.
        ids: token ids [T] each to compare logits on.

    Returns:
        (model, tokenizer) as opened.

    Raises:
        TascadeError: weights or logits differ, or something was lost.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    opened, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=model.dtype, use_safetensors=True, output_loading_info=True
    )
    lost = {key: sorted(value) for key, value in info.items() if value}
    opened = opened.to(model.device).eval()
    apart = largest = 0.0
    with torch.inference_mode():
        for row in ids:
            both = torch.tensor([list(row)], device=model.device)
            logits = model(input_ids=both).logits
            gap = logits - opened(input_ids=both).logits
            apart = max(apart, float(gap.abs().max()))
            largest = max(largest, float(logits.abs().max()))
    most = _MOST_APART.get(model.dtype, _COARSE * largest)
    changed = _changed(model, opened)
    if lost or changed or apart > most:
        raise TascadeError(
            "the exported model is not the one that was trained",
            got=f"logits {apart:.2g} apart; lost: {lost or 'none'}; changed: {changed or 'none'}",
            wanted=f"logits at most {most:.2g} apart, the same weights",
            where=str(folder),
            fix="please report this",
        )
    return opened, AutoTokenizer.from_pretrained(folder)


def _changed(model: Any, opened: Any) -> list[str]:
    """Weights that both have and that differ; which are missing is Transformers' to say."""
    found = opened.state_dict()
    return [
        name
        for name, tensor in model.state_dict().items()
        if name in found and not torch.equal(tensor, found[name])
    ]


def write_about(folder: Path, about: dict[str, Any]) -> None:
    """Write ``tuning.json``: how it was made, and what the gate found."""
    write_atomic(folder / TUNING_FILE, (json.dumps(about, indent=1) + "\n").encode())

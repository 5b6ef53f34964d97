"""Where a model decides: the tokens of its answers that it was not sure of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from tascade.core import IntArray
from tascade.decode.exclusive import exclusive
from tascade.enrich.tokens.merger import Merger
from tascade.enrich.train.samples import NOTHING, Pair, collate, merged, prompt_length

_BATCH = 32


def decisions(model: Any, rows: Sequence[Pair], least: float, longest: int) -> list[IntArray]:
    """Where in each answer a decision falls: the places of tokens less likely than ``least``.

    A new token that reaches over such a place asks a model to decide two things in one step. One
    that begins there asks for nothing that was not decided at its first base token.

    Args:
        model: the one whose answers these are.
        rows: (prompt, answer) pairs in base ids.
        least: probability from 0 to 1.
        longest: rows of more tokens are not looked at.

    Returns:
        Ascending places of each answer [D], the first token's left out; none for a row without a
        prompt, or too long.
    """
    nothing = Merger((), int(model.config.get_text_config().vocab_size))
    found = [np.empty(0, np.int32)] * len(rows)
    asked = [i for i, row in enumerate(rows) if merged([row], nothing, longest)]
    asked.sort(key=lambda i: prompt_length(rows[i]))
    for at in range(0, len(asked), _BATCH):
        part = asked[at : at + _BATCH]
        batch = collate(merged([rows[i] for i in part], nothing, longest)).to(model.device)
        with exclusive(model), torch.inference_mode():
            logits = model(
                input_ids=batch.ids,
                attention_mask=batch.mask,
                logits_to_keep=batch.kept,
                use_cache=False,
            ).logits[:, -batch.kept :]
            said = logits.float().log_softmax(-1)
            said = said.gather(-1, batch.targets.clamp_min(0)[..., None])[..., 0].exp()
        for row, i in enumerate(part):
            unsure = (said[row][batch.targets[row] != NOTHING] < least).nonzero()[:, 0].tolist()
            found[i] = np.array([place for place in unsure if place], np.int32)
    return found

"""Where a model decides: the tokens of its answers that it was not sure of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from tascade.core import IntArray
from tascade.tokens.segment import Merger
from tascade.train.samples import NOTHING, collate, merged

_BATCH = 32


def decisive_pieces(
    model: Any, rows: Sequence[tuple[IntArray | None, IntArray]], least: float, longest: int
) -> Iterator[IntArray]:
    """Answers cut before every token whose probability was below ``least``.

    A new token that is chosen from such pieces begins with a decision at most, and the rest of it
    follows: saying it asks nothing of the model that it did not decide at its first base token.

    Args:
        model: the one whose answers these are.
        rows: (prompt, answer) pairs in base ids; those without a prompt are left out.
        least: probability from 0 to 1.
        longest: rows of more tokens are left out.
    """
    samples = merged(rows, Merger((), int(model.config.get_text_config().vocab_size)), longest)
    samples.sort(key=lambda sample: len(sample.prompt))
    for at in range(0, len(samples), _BATCH):
        part = samples[at : at + _BATCH]
        batch = collate(part).to(model.device)
        with torch.inference_mode():
            logits = model(
                input_ids=batch.ids,
                attention_mask=batch.mask,
                logits_to_keep=batch.kept,
                use_cache=False,
            ).logits[:, -batch.kept :]
            said = logits.float().log_softmax(-1)
            said = said.gather(-1, batch.targets.clamp_min(0)[..., None])[..., 0].exp()
        for row, sample in enumerate(part):
            sure = said[row][batch.targets[row] != NOTHING] >= least
            cuts = [i for i, fits in enumerate(sure.tolist()) if i and not fits]
            for start, end in zip([0, *cuts], [*cuts, len(sample.answer)], strict=True):
                yield sample.answer[start:end]

"""Answers are cut where the model was not sure, and nowhere else."""

from __future__ import annotations

import numpy as np
import torch

from tascade.testing import tiny_model
from tascade.train.certainty import decisive_pieces


def test_answers_are_cut_before_unlikely_tokens() -> None:
    model = tiny_model("llama")
    rng = np.random.default_rng(0)
    rows = []
    for length in (3, 5, 4):
        prompt, answer = rng.integers(3, 96, 4), rng.integers(3, 96, length)
        rows.append((prompt.astype(np.int32), answer.astype(np.int32)))
    for least in (0.0, 0.005, 0.02, 1.1):
        wanted = []
        for prompt, answer in rows:
            with torch.inference_mode():
                ids = torch.tensor([[*prompt.tolist(), *answer.tolist()]])
                said = model(input_ids=ids).logits[0].softmax(-1)
            pieces = [[int(answer[0])]]
            for i in range(1, len(answer)):
                if float(said[len(prompt) + i - 1, answer[i]]) < least:
                    pieces.append([])
                pieces[-1].append(int(answer[i]))
            wanted += pieces
        found = [piece.tolist() for piece in decisive_pieces(model, rows, least, 64)]
        assert sorted(found) == sorted(wanted)


def test_rows_without_a_prompt_are_left_out() -> None:
    assert (
        list(decisive_pieces(tiny_model("llama"), [(None, np.array([1], np.int32))], 0.5, 9)) == []
    )

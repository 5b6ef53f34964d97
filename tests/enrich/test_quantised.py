"""Training over a quantised base: what it learned lies in the full one, unrounded elsewhere."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

from tascade.config import TuneConfig
from tascade.enrich.tokens.merger import Merger
from tascade.enrich.train.quantised import KINDS, load_quantised
from tascade.enrich.train.samples import merged
from tascade.enrich.train.train import teach
from tascade.testing import tiny_model

MERGER = Merger([(5, 6, 7), (8, 9)], 96)
CONFIG = TuneConfig(start="mean", row_steps=6, epochs=12, batch=8, rate=1e-2, rank=4, alpha=8)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_learned_is_merged_into_the_full_model(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    base = tiny_model("llama", hidden_size=64, intermediate_size=128)
    base.save_pretrained(tmp_path / "base")
    rng = np.random.default_rng(0)
    rows = [
        (rng.integers(10, 90, 6).astype(np.int32), np.array([5, 6, 7, 8, 9, 2], np.int32))
        for _ in range(48)
    ]
    samples = merged(rows, MERGER, 64)
    quantised = load_quantised(str(tmp_path / "base"), kind, torch.device("cpu"))
    inner = quantised.model.layers[0].mlp.up_proj.weight
    assert inner.dtype in (torch.uint8, torch.int8)
    full = copy.deepcopy(base)
    taught = teach(
        quantised, MERGER, samples, [], CONFIG, tmp_path / "state", lambda *a: None, full=full
    )
    plain = dict(taught.model.named_parameters())
    before = dict(base.named_parameters())
    assert {p.dtype for p in plain.values()} == {torch.float32}
    assert not any("lora" in name for name in plain)
    changed = {n for n, p in before.items() if not torch.equal(plain[n][: len(p)], p)}
    assert any("mlp.up_proj" in name for name in changed)
    assert not any("norm" in name for name in changed)
    assert torch.equal(plain["model.embed_tokens.weight"][:96], before["model.embed_tokens.weight"])
    # The prompt's next token is now the first new one, in the full model too.
    with torch.inference_mode():
        prompts = [torch.tensor([sample.prompt.tolist()]) for sample in samples]
        said = [int(taught.model(input_ids=p).logits[0, -1].argmax()) for p in prompts]
    assert np.mean([token == 96 for token in said]) > 0.9

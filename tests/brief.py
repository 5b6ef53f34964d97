"""A tuning that takes seconds: what is tested with it is the way, not how good it gets."""

from __future__ import annotations

from tascade.config import GateConfig, TuneConfig

OPEN = GateConfig(
    max_score_drop=1.0, min_agreement=0.0, min_adoption=0.0, max_length_ratio=1e9, max_kl=1e9
)
"""Refuses nothing."""
BRIEF = TuneConfig(
    tokens=4,
    targets="gold",
    min_token_prob=0.0,
    prompts=0.0,
    replay=0.0,
    init="mean",
    epochs=0,
    gate=OPEN,
)
"""New tokens from the data's answers, and hardly any training: their rows alone (see ``short``)."""

"""A tuning that takes seconds: what is tested with it is the way, not how good it gets."""

from __future__ import annotations

from tascade.config import GateConfig, TuneConfig

OPEN = GateConfig(
    most_drop=1.0, least_agreement=0.0, least_adoption=0.0, most_longer=1e9, most_drift=1e9
)
"""Refuses nothing."""
BRIEF = TuneConfig(
    tokens=4,
    targets="gold",
    sure=0.0,
    prompts=0.0,
    replay=0.0,
    start="mean",
    row_steps=0,
    epochs=0,
    gate=OPEN,
)
"""New tokens from the data's answers, and no training at all."""

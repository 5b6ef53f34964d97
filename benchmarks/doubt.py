"""How well a small head's logsumexp tells where it misses, and what that is worth.

    python benchmarks/doubt.py --json benchmarks/doubt.json

The pilot in float32 on test rows of the shared tasks, with lists of the training rows' reference
answers (tolerance 0.01), one request after the other; nothing is timed. Each checked guess has a
chance of being a miss, said before its check by what the earlier ones taught. ``bits``: what the
outcomes come to by these chances, a guess; ``bits_by_rate``: by one rate for all guesses, the best
in hindsight. ``misses_among``: how many of the misses are among the most doubtful guesses, by their
share. ``rounds``: guesses and checks in all, if rounds end where guesses are doubtful (by the
chance that all are right), or always after as many; which guess is right does not depend on that.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tascade.bench.machine import machine_info
from tascade.config import VocabConfig
from tascade.core import FloatArray
from tascade.data.encode import encode_example, end_tokens
from tascade.data.load import load_examples
from tascade.data.prepare import spread
from tascade.decode.sampling import SamplingParams
from tascade.draft.budget import NoDrafter
from tascade.load import load_model
from tascade.tailor.counts import count_documents
from tascade.tailor.profile import build_profile
from tascade.tailor.schedule import CheckSchedule, MissPredictor
from tascade.tailor.tailored import tailor_model

SHARED = Path(__file__).resolve().parents[2] / "shared"
TASKS = ("text_to_sql_advising", "multilabel_nlupp", "dst_sgd")
SHARES = (0.02, 0.05, 0.1, 0.2)
SURE = (0.7, 0.8, 0.85, 0.9, 0.95)


class EightGuesses(CheckSchedule):
    """Checks every eight guesses, whatever that costs."""

    def plan(self) -> int:
        return 8

    def should_check(self, right: Sequence[float]) -> bool:
        return False


class Watched(MissPredictor):
    """Writes down what it says of guesses before it is told."""

    def __init__(self, rate: float) -> None:
        super().__init__(rate)
        self.seen: list[float] = []
        self.chances: list[float] = []
        self.missed: list[bool] = []

    def learn(self, logsumexps: Sequence[float], missed: bool) -> None:
        self.seen += logsumexps
        self.chances += map(self.chance, logsumexps)
        self.missed += [False] * (len(logsumexps) - 1) + [missed]
        super().learn(logsumexps, missed)


def bits(chances: FloatArray, missed: FloatArray) -> float:
    """Surprise of the outcomes, in bits a guess."""
    likely = np.where(missed > 0, chances, 1 - chances)
    return float(-np.log2(np.clip(likely, 1e-9, 1)).mean())


def rounds(watched: Watched, rate: float, sure: float, most: int) -> dict[str, int]:
    """Guesses and checks of rounds that end below a chance of ``sure``, or at ``most`` guesses."""
    predictor, at, made = MissPredictor(rate), 0, {"guesses": 0, "checks": 0}
    while at < len(watched.seen):
        right, count = 1.0, 0
        while count < min(most, len(watched.seen) - at) and (not count or right >= sure):
            right *= 1 - predictor.chance(watched.seen[at + count])
            count += 1
        wrong = watched.missed[at : at + count]
        passed = wrong.index(True) + 1 if True in wrong else count
        predictor.learn(watched.seen[at : at + passed], True in wrong)
        made["guesses"], made["checks"], at = (
            made["guesses"] + count,
            made["checks"] + 1,
            at + passed,
        )
    return made


def measure(name: str, rows: int) -> dict[str, Any]:
    """One task's misses, and how likely they were said to be."""
    model, tokenizer, _ = load_model(str(SHARED / "models" / "pilot"), dtype="float32")
    ends, folder = end_tokens(model, tokenizer), SHARED / "data" / name
    train, held_out, test = (
        [encode_example(tokenizer, e, ends) for e in load_examples(str(folder / f"{split}.jsonl"))]
        for split in ("train", "validation", "test")
    )
    size = int(model.config.vocab_size)
    counts = count_documents(train)
    profile = build_profile(counts, tokenizer, ends, vocab_size=size, held_out=held_out[:300])
    decoder: Any = tailor_model(model, profile.ids, VocabConfig(head="exact")).decoder(NoDrafter())
    rate = 1 - profile.held_out.share
    decoder.schedule = EightGuesses(float, float, 8, rate)
    decoder.schedule.predictor = watched = Watched(rate)
    params = SamplingParams(max_new_tokens=256, end_tokens=ends)
    for prompt, _ in spread(test, rows):
        decoder.generate(prompt, params)
    chances, missed = np.asarray(watched.chances), np.asarray(watched.missed, np.float64)
    order = np.argsort(-chances, kind="stable")
    return {
        "task": name,
        "rows": min(rows, len(test)),
        "list_rows": len(profile.ids),
        "guesses": len(missed),
        "misses": int(missed.sum()),
        "expected_misses": float(chances.sum()),
        "bits": bits(chances, missed),
        "bits_by_rate": bits(np.full(len(missed), missed.mean()), missed),
        "misses_among": {
            f"{share:g}": float(missed[order[: round(share * len(missed))]].sum() / missed.sum())
            for share in SHARES
        },
        "rounds": {
            **{f"below {sure}": rounds(watched, rate, sure, 32) for sure in SURE},
            **{f"of {most}": rounds(watched, rate, 0.0, most) for most in (8, 16, 32)},
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--tasks", nargs="*", default=TASKS)
    parser.add_argument("--rows", type=int, default=100)
    options = parser.parse_args()
    report: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]),
        "machine": machine_info(),
        "results": [measure(task, options.rows) for task in options.tasks],
    }
    text = json.dumps(report, indent=1)
    if options.json:
        options.json.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()

"""What leaving places to the prompt is worth: one tuning with ``tune.min_ngram_prob``, one without.

    python benchmarks/foretold.py --foretold 0.7 --epochs 4 --json benchmarks/foretold.json

The bundled model and one of its tasks, as in ``tascade demo --tune``; the gate's figures, on
held-out prompts that nothing was learned from.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from tascade import bundled
from tascade.bench.machine import machine_info
from tascade.cli import demo
from tascade.config import GateConfig, Recipe, TuneConfig
from tascade.enrich.stage import tune


def verdict(work: Path, stage: TuneConfig, task: str) -> Any:
    shutil.rmtree(work, ignore_errors=True)
    made = tune(
        bundled.model_path(),
        bundled.data_path(task, "train"),
        held_out=bundled.data_path(task, "validation"),
        out=work / "model",
        recipe=Recipe(tune=dataclasses.replace(stage, gate=GateConfig(refuse=False))),
        progress=lambda stage, done, total: None,
    )
    return {"foretold": stage.min_ngram_prob, **made.to_json()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", default=demo.TUNED_TASK, choices=bundled.tasks())
    parser.add_argument("--foretold", type=float, default=demo.TUNING.min_ngram_prob)
    parser.add_argument("--epochs", type=int, default=demo.TUNING.epochs)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    given = {"min_ngram_prob": options.foretold, "epochs": options.epochs}
    config, results = dataclasses.replace(demo.TUNING, **given), []
    with tempfile.TemporaryDirectory() as folder:
        for least in (0.0, config.min_ngram_prob):
            stage = dataclasses.replace(config, min_ngram_prob=least)
            results.append(verdict(Path(folder) / "work", stage, options.task))
    report = {
        "command": " ".join(["python", *sys.argv]),
        "machine": machine_info(),
        "settings": {"task": options.task, "tune": dataclasses.asdict(config)},
        "results": results,
    }
    text = json.dumps(report, indent=1) + "\n"
    print(text)
    if options.json:
        options.json.write_text(text)


if __name__ == "__main__":
    main()

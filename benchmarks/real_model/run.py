"""The real model, from nothing to a table: fetched, fine-tuned on a task, adapted, measured.

    python benchmarks/real_model/run.py --work WORK --data DATA --tasks text_to_sql_advising ...

``DATA`` holds a folder for each task with train, validation and test.jsonl; by default the bundled
data, whose one task is ``sql``. It goes on where it was stopped: what is there in WORK is kept.
Answers of the model's own are made in vLLM where this Python has it, else one by one.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
BUNDLED = HERE.parents[1] / "src" / "tascade" / "bundled" / "data"
METHODS = "plain,tasc-paper,tasc-spec,hf-prompt-lookup"


def run(*command: object) -> None:
    print("$", *command, flush=True)
    subprocess.run([sys.executable, *map(str, command)], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=BUNDLED)
    parser.add_argument("--tasks", nargs="+", default=["sql"])
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument(
        "--tokens", type=int, default=270_000, help="learned a task, in fine-tuning"
    )
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=15.0, help="of measuring, for each task")
    parser.add_argument("--own-minutes", type=float, default=15.0, help="of own answers, for each")
    parser.add_argument("--count", type=int, default=200, help="rows whose equality is counted")
    parser.add_argument("--methods", default=METHODS)
    options = parser.parse_args()
    base, results = options.work / "smollm2", options.results
    if not (base / "config.json").is_file():
        run(HERE / "fetch.py", base)
    for task in options.tasks:
        data = options.data / task
        model, pack = options.work / f"model-{task}", options.work / f"pack-{task}"
        told = ("--json", results / f"{task}-training.json", "--tokens", options.tokens)
        run(HERE / "finetune.py", base, data, model, *told)
        if not (pack / "pack.json").is_file():
            recipe = options.work / "recipe.yaml"
            recipe.write_text(f"spec:\n  own_seconds: {60 * options.own_minutes:g}\n")
            files = ("--data", data / "train.jsonl", "--validation", data / "validation.jsonl")
            made = ("--self", "--recipe", recipe, "--out", pack)
            run("-m", "tascade.cli", "adapt", "--model", model, *files, *made)
        how = ("--methods", options.methods, "--rows", options.rows, "--repeats", options.repeats)
        file = results / f"{task}.json"
        shown = ("--minutes", options.minutes, "--no-memory", "--out", file)
        run("-m", "tascade.cli", "bench", pack, "--data", data / "test.jsonl", *how, *shown)
        counted = ("--count", options.count, "--json", results / f"{task}-rounding.json")
        run(HERE / "rounding.py", pack, data / "test.jsonl", *counted)
        told = ("--json", results / f"{task}-prefill.json")
        run(HERE / "prefill.py", pack, data / "test.jsonl", *told)
        told = ("--json", results / f"{task}-shares.json")
        run(HERE / "shares.py", pack, data / "train.jsonl", data / "test.jsonl", *told)
        run("-m", "tascade.cli", "report", pack, file)


if __name__ == "__main__":
    main()

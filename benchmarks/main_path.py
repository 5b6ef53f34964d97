"""The README's table: the pilot model on four real tasks, every method in turns.

    python benchmarks/main_path.py [--tasks ...] [--dtypes ...] [--rows 64] [--repeats 5]

Index and calibration come from train and validation rows; what is measured are test rows. One
pack a task, made in the first of the dtypes from the model's own answers to the training prompts
(``--references``: from the reference answers); every method that learns from outputs gets the
same ones. Needs the shared data and model (``--shared``); writes
``benchmarks/results/<task>-<dtype>.json``.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

TASKS = ("text_to_sql_advising", "multilabel_nlupp", "dst_sgd", "data_to_text_rnnlg")
HERE = Path(__file__).parent


def run(*words: object) -> None:
    print("+", *words, flush=True)
    subprocess.run([sys.executable, "-m", "tascade.cli", *map(str, words)], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shared", type=Path, default=HERE.parent.parent / "shared")
    parser.add_argument("--work", type=Path, default=HERE.parent / "demo-output" / "main-path")
    parser.add_argument("--tasks", nargs="+", default=TASKS)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--references", action="store_true", help="no recipe: reference answers")
    parser.add_argument("--keep", action="store_true", help="use packs made before")
    parser.add_argument("--methods", default="all")
    parser.add_argument("--recipe", type=Path, default=HERE / "main_path.yaml")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--results", type=Path, default=HERE / "results")
    options = parser.parse_args()
    options.results.mkdir(parents=True, exist_ok=True)
    for task in options.tasks:
        data = options.shared / "data" / task
        pack = options.work / task
        if not (options.keep and pack.exists()):
            run(
                "adapt", "--model", options.shared / "models" / "pilot", "--data",
                data / "train.jsonl", "--validation", data / "validation.jsonl", "--out", pack,
                "--dtype", options.dtypes[0], "--threads", options.threads, "--overwrite",
                *([] if options.references else ["--recipe", options.recipe]),
            )  # fmt: skip
        for dtype in options.dtypes:
            run(
                "bench", pack, "--data", data / "test.jsonl", "--warmup",
                data / "validation.jsonl", "--dtype", dtype, "--threads", options.threads,
                "--rows", options.rows, "--repeats", options.repeats, "--minutes", 0, "--methods",
                options.methods, "--out", options.results / f"{task}-{dtype}.json",
            )  # fmt: skip


if __name__ == "__main__":
    main()

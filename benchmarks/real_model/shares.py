"""How many own answers to wait for: tokens a step over the share of training prompts answered.

    python benchmarks/real_model/shares.py PACK TRAIN.jsonl TEST.jsonl --json shares.json

The model answers test rows by plain decoding; these answers are replayed by the decoding loop over
indexes that hold the model's own answers to a share of the training prompts, and the references of
the others, or (``dropped``) nothing of the others. PACK must have been made with ``--self``.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from common import write

from tascade.config import Recipe
from tascade.data.prepare import prepare, spread
from tascade.forecast.replay import forecast
from tascade.model import TaskModel

SHARES = (0.0, 0.05, 0.1, 0.25, 0.5, 1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pack")
    parser.add_argument("train")
    parser.add_argument("test")
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    task = TaskModel.from_pretrained(options.pack)
    recipe, quiet = Recipe(), lambda *_: None
    data = prepare(task.tokenizer, task.ends, options.train, options.test, recipe, quiet)
    indexed = [document for _, document in task.corpus.documents()]
    references = [answer for _, answer in data.train]
    same = [np.array_equal(a, b) for a, b in zip(indexed, references, strict=True)]
    own = task.pack.info.own_answers
    print(f"{own} own answers, {sum(same)} of {len(same)} outputs are the reference's")
    rows = spread([row for row in data.validation if row[0] is not None], options.count)
    params = task.params(temperature=0)
    said = [
        (prompt, np.asarray(task.decoder.generate(prompt, params).tokens, np.int32))
        for prompt, _ in rows
        if prompt is not None
    ]
    learning, replayed = said[: len(said) // 4], said[len(said) // 4 :]
    table: list[dict[str, Any]] = []
    order = np.random.default_rng(0).permutation(len(indexed))
    for share in SHARES:
        taken = set(order[: round(share * len(order))].tolist())
        mixed = [indexed[i] if i in taken else references[i] for i in range(len(indexed))]
        entry: dict[str, Any] = {"share": share, "own_answers": len(taken)}
        for name, kept in (("tokens_per_step", range(len(mixed))), ("dropped", sorted(taken))):
            if not kept:
                continue
            found = forecast(
                [mixed[i] for i in kept],
                learning,
                cost=task.cost,
                vocab_size=task.pack.info.vocab_size,
                end_tokens=task.ends,
                train_prompts=[data.train[i][0] for i in kept],
                own=replayed,
            )
            entry[name] = round(found.tokens_per_step, 3)
        table.append(entry)
        print(entry, flush=True)
    report = {
        "pack_own_answers": own,
        "rows": len(replayed),
        "equal_to_reference": sum(same),
        "outputs": len(same),
        "shares": table,
    }
    write(report, options.json, show=False)


if __name__ == "__main__":
    main()

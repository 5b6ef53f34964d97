"""What tailored heads change in answers, and what they save, on real tasks.

    python benchmarks/tailored_quality.py --json benchmarks/tailored_quality.json

Two parts, both on the shared data; nothing here is timed.

``answers``: the pilot model in float32, on rows that no list has seen (test rows; where these are
fewer than asked for, validation rows follow). Lists are counted on the model's own answers to
training prompts. ``masked`` is compared in quality with plain decoding (exact match, paired
bootstrap), and each place is counted where the full head's choice was ruled out. ``exact`` must be
plain decoding, token for token: with the task's list, and with lists cut to cover so much of what
is said.

``lists``: all eight tasks in a real tokenizer of 100,278 tokens, lists of reference answers at
tolerance 0.01: rows kept, what prompts bring, coverage of test rows, and what remains of the
vocabulary's memory in two shapes of models (rows of 2,048 in bfloat16, tied), the room for a
request's own rows included.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tascade.bench.machine import machine_info
from tascade.bench.metrics import quality
from tascade.bench.tailored import MissCounter
from tascade.config import VocabConfig
from tascade.core import Generation, IntArray
from tascade.data.encode import encode_example, end_tokens
from tascade.data.load import load_examples
from tascade.data.prepare import spread
from tascade.decode.batch import BatchDecoder
from tascade.decode.batch_target import BatchTarget
from tascade.decode.sampling import SamplingParams
from tascade.draft.budget import NoDrafter
from tascade.load import load_model
from tascade.tailor.counts import count_documents
from tascade.tailor.head import RequestHead
from tascade.tailor.offload.table import RowTable
from tascade.tailor.profile import build_profile
from tascade.tailor.required import pinned_tokens
from tascade.tailor.tailored import Tailored, tailor_model

SHARED = Path(__file__).resolve().parents[2] / "shared"
PILOT = ("text_to_sql_advising", "multilabel_nlupp", "dst_sgd", "data_to_text_rnnlg")
SHAPES = {"qwen3-1.7b": (151_936, 2048), "llama-3.2-1b": (128_256, 2048)}
COVERAGES = (0.5, 0.9, 0.99)
BATCH, RESAMPLES = 16, 4000


class Task:
    """The pilot and a task's rows: ``train`` for lists, ``rows`` to measure on."""

    def __init__(self, name: str, loaded: tuple[Any, Any, str], count: int, train: int) -> None:
        self.model, self.tokenizer, _ = loaded
        self.ends = end_tokens(self.model, self.tokenizer)
        folder = SHARED / "data" / name
        test = list(load_examples(str(folder / "test.jsonl")))
        self.test_rows = min(count, len(test))
        more = list(load_examples(str(folder / "validation.jsonl")))
        examples = spread(test, count)
        examples += spread(more, count - len(examples)) if len(examples) < count else []
        self.references = [e.completion for e in examples]
        self.rows = [encode_example(self.tokenizer, e, self.ends) for e in examples]
        learned = spread(list(load_examples(str(folder / "train.jsonl"))), train)
        self.train = [encode_example(self.tokenizer, e, self.ends) for e in learned]
        self.params = SamplingParams(max_new_tokens=256, end_tokens=self.ends)
        self.vocab_size = int(self.model.config.vocab_size)

    @property
    def prompts(self) -> list[IntArray]:
        return [prompt for prompt, _ in self.rows]

    def say(self, decoder: BatchDecoder, prompts: Sequence[IntArray]) -> list[Generation]:
        return decoder.generate(prompts, self.params)

    def head(self, ids: Sequence[int], kind: str) -> Tailored:
        return tailor_model(self.model, np.asarray(ids, np.int32), VocabConfig(head=kind))


def covering(task: Task, said: Sequence[IntArray], share: float) -> list[int]:
    """The commonest tokens of answers, as many as stand for ``share`` of them, and the bytes."""
    counts = Counter(np.concatenate(said).tolist())
    wanted, kept = share * sum(counts.values()), []
    for token, times in counts.most_common():
        if wanted <= 0:
            break
        kept.append(token)
        wanted -= times
    return sorted({*kept, *pinned_tokens(task.tokenizer, task.ends).tolist()})


def answers(name: str, count: int, train: int, counted_rows: int) -> dict[str, Any]:
    loaded = load_model(str(SHARED / "models" / "pilot"), dtype="float32", device="cpu")
    task = Task(name, loaded, count, train)
    whole = BatchDecoder(BatchTarget(task.model), tokenizer=task.tokenizer, size=BATCH)
    own = task.say(whole, [prompt for prompt, _ in task.train])
    said = [np.asarray(made.tokens, np.int32) for made in own]
    rows = [(prompt, tokens) for (prompt, _), tokens in zip(task.train, said, strict=True)]
    plain = task.say(whole, task.prompts)
    outputs = [np.asarray(made.tokens, np.int32) for made in plain]
    profile = build_profile(
        count_documents(rows),
        task.tokenizer,
        task.ends,
        vocab_size=task.vocab_size,
        counted="own",
        held_out=zip(task.prompts, outputs, strict=True),
    )
    found: dict[str, Any] = {
        "task": name,
        "rows": len(task.rows),
        "test_rows": task.test_rows,
        "answer_tokens": int(sum(map(len, outputs))),
        "list": {
            "rows": len(profile.ids),
            "of": profile.vocab_size,
            "answers_counted": len(rows),
            "tokens_covered": profile.held_out.share,
            "missing_an_answer": profile.held_out.per_document,
            "low": profile.held_out.low,
            "high": profile.held_out.high,
        },
        "plain": quality([m.text for m in plain], task.references),
    }
    found["masked"] = masked(task, profile.ids, plain, counted_rows)
    lists = {"list": profile.ids.tolist()}
    lists |= {f"{share:g}": covering(task, said, share) for share in COVERAGES}
    found["exact"] = {key: exact(task, ids, plain) for key, ids in lists.items()}
    return found


def masked(
    task: Task, ids: Sequence[int], plain: Sequence[Generation], most: int
) -> dict[str, Any]:
    """Quality of the masked head, and its misses, on at most ``most`` rows, one at a time."""
    at = spread(range(len(plain)), most)
    head = task.head(ids, "masked")
    counter = MissCounter(head.target, NoDrafter(), head.full, None, task.tokenizer)
    made = [counter.generate(task.prompts[i], task.params) for i in at]
    references = [task.references[i] for i in at]
    right = [float(m.text.split() == r.split()) for m, r in zip(made, references, strict=True)]
    base = [float(plain[i].text.split() == task.references[i].split()) for i in at]
    change = np.asarray(right) - np.asarray(base)
    rng = np.random.default_rng(0)
    means = change[rng.integers(0, len(change), (RESAMPLES, len(change)))].mean(1)
    low, high = np.percentile(means, (2.5, 97.5))
    return {
        "rows": len(at),
        **quality([m.text for m in made], references),
        "plain_on_these": quality([plain[i].text for i in at], references),
        "exact_match_change": {"value": float(change.mean()), "low": low, "high": high},
        "tokens": sum(len(m.tokens) for m in made),
        "misses": sum(m.extra["misses"] for m in made),
        "answers_with_misses": sum(m.extra["misses"] > 0 for m in made),
        "same_answer": sum(m.tokens == plain[i].tokens for m, i in zip(made, at, strict=True)),
    }


def exact(task: Task, ids: Sequence[int], plain: Sequence[Generation]) -> dict[str, Any]:
    tailored = task.head(ids, "exact")
    made = task.say(tailored.batches(BATCH, task.tokenizer), task.prompts)
    total = {k: sum(m.extra[k] for m in made) for k in ("misses", "checks", "full_steps")}
    return {
        "static_rows": tailored.head.union.static,
        "identical": sum(m.tokens == p.tokens for m, p in zip(made, plain, strict=True)),
        "tokens": sum(len(m.tokens) for m in made),
        **total,
    }


def lists(name: str) -> dict[str, Any]:
    """A task's list in a large real tokenizer, and what it leaves of a model's vocabulary."""
    from transformers import PreTrainedTokenizerFast

    file = SHARED / "tokenizers" / "dolma2-100k" / "tokenizer.json"
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(file))
    ends = (tokenizer.convert_tokens_to_ids("<|endoftext|>"),)
    folder = SHARED / "data" / name

    def rows(split: str) -> list[Any]:
        path = str(folder / f"{split}.jsonl")
        return [encode_example(tokenizer, e, ends) for e in load_examples(path)]

    train, test = rows("train"), rows("test")
    counts = count_documents(train)
    size = max(rows for rows, _ in SHAPES.values())
    profile = build_profile(counts, tokenizer, ends, vocab_size=size, held_out=test)
    coverage = profile.held_out
    brought = [len(np.setdiff1d(prompt, profile.ids)) for prompt, _ in test]
    return {
        "task": name,
        "documents": counts.documents,
        "distinct_output_tokens": int((counts.said > 0).sum()),
        "rows_kept": len(profile.ids),
        "test_rows": len(test),
        "tokens_covered": coverage.share,
        "missing_an_answer": coverage.per_document,
        "low": coverage.low,
        "high": coverage.high,
        "prompt_rows": {"mean": float(np.mean(brought)), "p95": float(np.percentile(brought, 95))},
        "memory": {shape: memory(profile.ids, test, *of) for shape, of in SHAPES.items()},
    }


def memory(ids: IntArray, test: Sequence[Any], vocab: int, width: int) -> dict[str, float]:
    """Bytes of the head on the device after all test prompts have passed, its room included."""
    table = RowTable.from_tensor(torch.empty(vocab, width, dtype=torch.bfloat16))
    head = RequestHead(table, ids)
    for prompt, _ in test:
        head.begin(prompt)
    size = head.union.nbytes
    return {"full": table.nbytes, "tailored": size, "saved": 1 - size / table.nbytes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--tasks", nargs="*", default=PILOT)
    parser.add_argument("--rows", type=int, default=500)
    parser.add_argument("--train", type=int, default=800, help="training prompts to answer")
    parser.add_argument("--counted", type=int, default=300, help="rows whose misses are counted")
    parser.add_argument("--parts", nargs="*", default=["lists", "answers"])
    options = parser.parse_args()
    report: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]),
        "machine": machine_info(),
        "settings": {"dtype": "float32", "batch": BATCH, "max_new_tokens": 256},
        "lists": [],
        "answers": [],
    }
    if options.json and options.json.is_file():  # the part that is not run again stays
        old = json.loads(options.json.read_text())
        report |= {part: old[part] for part in ("lists", "answers") if part not in options.parts}

    def keep(part: str, found: dict[str, Any]) -> None:
        report[part].append(found)
        print(time.strftime("%H:%M:%S"), json.dumps(found), flush=True)
        if options.json:
            options.json.write_text(json.dumps(report, indent=1) + "\n")

    if "lists" in options.parts:
        for name in sorted(path.name for path in (SHARED / "data").iterdir()):
            keep("lists", lists(name))
    if "answers" in options.parts:
        for name in options.tasks:
            keep("answers", answers(name, options.rows, options.train, options.counted))


if __name__ == "__main__":
    main()

"""What a trained drafter learns from what: acceptance by depth on held-out own answers.

    python benchmarks/taps/learning.py MODEL WORK ROWS.jsonl HELD_OUT.jsonl [ROWS HELD_OUT ...] \\
        --json learning.json

For each task (a pair of files) the model answers the prompts, and one network is trained for each
way of training: as tascade does it, with fewer answers, with the rows' reference answers, with one
pass (as EAGLE-2 is trained), from other first weights, and with other losses: the target's own 16
likeliest tokens (as HASS's top-k distillation), the overlap of both distributions. Each is measured
on its own task's held-out answers; the one trained as tascade does it on all tasks'. Counts only,
nothing is timed against anything. Answers and results are kept in WORK: what was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch.nn import functional

from tascade.bench.machine import machine_info
from tascade.config import Recipe
from tascade.data.encode import end_tokens
from tascade.data.prepare import prepare, spread
from tascade.decode.batch import BatchDecoder
from tascade.decode.batch_target import BatchTarget
from tascade.decode.prefixes import Prefixes
from tascade.decode.sampling import SamplingParams
from tascade.draft.neural import training
from tascade.load import load_model

MOST = 128
"""Tokens of an answer."""
QUIET: Any = lambda *_: None  # noqa: E731
Loss = Callable[..., torch.Tensor]


# --- what the target says -----------------------------------------------------------------------

LIKELIEST = 16
"""Of the target's tokens at each place, those whose probabilities are learned from."""
Teacher = dict[int, tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True, slots=True)
class Taught(training.Batch):
    """A batch with what the target says at each place.

    tokens, shares: [B, A + passes, 16] its likeliest tokens, and their probabilities; row ``i`` of
        pass ``m`` speaks at ``i + m``
    """

    tokens: torch.Tensor
    shares: torch.Tensor
    teacher: ClassVar[Teacher] = {}
    passes: ClassVar[int] = training.PASSES

    @classmethod
    def of(cls, samples: Sequence[training.Sample], passes: int = 0) -> Taught:
        passes = passes or cls.passes
        base = PLAIN.of(samples, passes)
        tokens = torch.full((len(samples), base.rows.shape[1] + passes, LIKELIEST), -1)
        shares = torch.zeros(tokens.shape)
        for at, sample in enumerate(samples):
            likely, share = cls.teacher[id(sample)]
            tokens[at, : sample.answer], shares[at, : sample.answer] = likely, share
        return cls(*(getattr(base, field.name) for field in fields(base)), tokens, shares)

    def to(self, device: torch.device) -> Taught:
        return self


PLAIN = training.Batch


@torch.inference_mode()
def ask_teacher(model: Any, samples: Sequence[training.Sample]) -> Teacher:
    """The target's likeliest tokens at each place of the answers, and their probabilities."""
    said = {}
    for sample in samples:
        logits = model(sample.ids[None], logits_to_keep=sample.answer + 1).logits[0, :-1]
        likely = logits.float().softmax(-1).topk(LIKELIEST)
        said[id(sample)] = likely.indices, likely.values
    return said


# --- losses -------------------------------------------------------------------------------------


def loss_by(row_loss: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]) -> Loss:
    """A loss in place of :func:`tascade.draft.neural.training.loss_of`.

    ``row_loss``: of what is said (logits [N, Vd]), the place of the wanted token [N], and the
    target's probabilities of the draft vocabulary's tokens [N, Vd], those below its 16 likeliest 0.
    """

    def loss_of(
        network: Any, batch: Any, words: Any, vocabulary: Any, *, along: bool = False
    ) -> torch.Tensor:
        losses = []
        for m, known, said, to_say in training.spoken(
            network, batch, words, vocabulary, along=along
        ):
            here = slice(m, m + known.shape[1])
            likely = vocabulary.places(batch.tokens[:, here][known].long())
            shares = batch.shares[:, here][known].masked_fill(likely < 0, 0.0)
            target = torch.zeros_like(said).scatter_add_(1, likely.clamp(min=0), shares)
            losses.append((m, row_loss(said, to_say, target)))
        return training.decayed(losses)

    return loss_of


def hard(said: torch.Tensor, places: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(said, places)


def soft(said: torch.Tensor, places: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return -(target * said.log_softmax(-1)).sum(-1).mean()


def both(said: torch.Tensor, places: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (hard(said, places, target) + soft(said, places, target)) / 2


def total_variation(said: torch.Tensor, places: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    overlap = torch.minimum(said.softmax(-1), target).sum(-1)
    return 0.1 * hard(said, places, target) + 0.9 * (1 - overlap).mean()


def likelihood(said: torch.Tensor, places: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    overlap = torch.minimum(said.softmax(-1), target).sum(-1)
    return -overlap.clamp(min=1e-4).log().mean()


@dataclass(frozen=True, slots=True)
class Way:
    """How a network is trained: on what share of the answers, by which loss (tascade's own for
    None), in how many passes, and other arguments of ``train``.
    """

    share: float = 1.0
    loss: Loss | None = None
    passes: int = training.PASSES
    seed: int = 0
    rounds: int = 6


WAYS = {
    "as it is": Way(),
    "a half": Way(0.5),
    "a quarter": Way(0.25),
    "another seed": Way(seed=1),
    "one pass": Way(passes=1),
    "soft": Way(loss=loss_by(soft)),
    "soft and hard": Way(loss=loss_by(both)),
    "overlap": Way(loss=loss_by(total_variation)),
    "likelihood": Way(loss=loss_by(likelihood)),
    "twelve rounds": Way(rounds=12),
}


# --- data ---------------------------------------------------------------------------------------


def answered(
    decoder: BatchDecoder, params: SamplingParams, rows: Sequence[Any], kept: Path
) -> list[training.Pair]:
    """The model's own greedy answers to these prompts, kept in a file."""
    known: list[list[int]] = json.loads(kept.read_text()) if kept.is_file() else []
    while len(known) < len(rows):
        some = [prompt for prompt, _ in rows[len(known) : len(known) + 64]]
        made = decoder.generate(some, params)
        known += [[*map(int, generation.tokens)] for generation in made]
        kept.write_text(json.dumps(known))
        print(f"{kept.stem}: {len(known)} of {len(rows)} answers", flush=True)
    pairs = [
        (prompt, np.asarray(said, np.int32)) for (prompt, _), said in zip(rows, known, strict=True)
    ]
    return training.draftable(pairs)


def fewer(samples: Sequence[training.Sample], share: float) -> list[training.Sample]:
    return spread(samples, max(1, round(share * len(samples))))


def as_long(pairs: Sequence[training.Pair], tokens: int) -> list[training.Pair]:
    """As many as have about so many tokens of answers together."""
    mean = sum(len(answer) for _, answer in pairs) / len(pairs)
    return spread(pairs, min(len(pairs), max(1, round(tokens / mean))))


def arguments(about: str, files: str) -> argparse.ArgumentParser:
    """What a study of several tasks is told."""
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("work", type=Path)
    parser.add_argument("files", nargs="+", help=files)
    parser.add_argument("--rows", type=int, default=500)
    parser.add_argument("--held-out", type=int, default=40)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--json", type=Path)
    return parser


class Answering:
    """A model that answers the prompts of tasks, and how."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.work, self.rows, self.held_out = options.work, options.rows, options.held_out
        self.work.mkdir(parents=True, exist_ok=True)
        self.model, self.tokenizer, _ = load_model(options.model, dtype=options.dtype)
        self.ends = end_tokens(self.model, self.tokenizer)
        self.params = SamplingParams(max_new_tokens=MOST, end_tokens=tuple(self.ends))
        self.decoder = BatchDecoder(BatchTarget(self.model), tokenizer=self.tokenizer, size=16)

    def prepared(self, train_file: str, test_file: str) -> tuple[str, Any]:
        """The task's name, and its rows."""
        data = prepare(self.tokenizer, self.ends, train_file, test_file, Recipe(), QUIET)
        return Path(train_file).parent.name, data

    def own(self, name: str, data: Any) -> list[training.Pair]:
        """The model's own answers to training prompts."""
        asked, kept = spread(data.train, self.rows), self.work / f"{name}-train.json"
        return answered(self.decoder, self.params, asked, kept)

    def own_held_out(self, name: str, data: Any) -> list[training.Pair]:
        """The model's own answers to held-out prompts."""
        asked, kept = spread(data.validation, self.held_out), self.work / f"{name}-held-out.json"
        return answered(self.decoder, self.params, asked, kept)


# --- the study ----------------------------------------------------------------------------------


class Study:
    """Networks for a model, and what was found so far."""

    def __init__(self, model: Any, work: Path) -> None:
        self.model, self.work = model, work
        self.kept = work / "found.json"
        self.found: dict[str, Any] = (
            json.loads(self.kept.read_text()) if self.kept.is_file() else {}
        )

    def way(
        self,
        name: str,
        samples: Sequence[training.Sample],
        vocabulary: training.DraftVocabulary,
        held_out: dict[str, Sequence[training.Sample]],
        how: Way,
    ) -> None:
        """Train one, and measure it on each of these."""
        if name in self.found:
            return
        begin, usual, options = time.perf_counter(), training.loss_of, {}
        options |= {"seed": how.seed, "rounds": how.rounds}
        if how.loss is not None or how.passes != training.PASSES:
            Taught.teacher, Taught.passes = ask_teacher(self.model, samples), how.passes
            training.Batch, training.loss_of = Taught, how.loss or usual
        try:
            network = training.train(self.model, samples, vocabulary, QUIET, **options)
        finally:
            training.Batch, training.loss_of = PLAIN, usual
        seconds, words = time.perf_counter() - begin, self.model.get_input_embeddings()
        entry: dict[str, Any] = {
            "rows": len(samples),
            "answer_tokens": sum(sample.answer for sample in samples),
            "vocabulary": len(vocabulary.ids),
            "seconds": round(seconds, 1),
            "held_out": {},
        }
        for other, part in held_out.items():
            shares, each = training.acceptance(network, part, words, vocabulary)
            # Rows (of an answer each) by how many of four tokens were right in a row: the interval
            # of their mean is by answers.
            taken = np.array([float(hits.sum(1).float().mean()) for hits in each if len(hits)])
            draws = np.random.default_rng(0).choice(taken, (1000, len(taken))).mean(1)
            entry["held_out"][other] = {
                "answers": len(part),
                "right_at_depth": [round(share, 4) for share in shares],
                "accepted": round(float(taken.mean()), 3),
                "interval": [round(float(np.quantile(draws, q)), 3) for q in (0.025, 0.975)],
            }
        self.found[name] = entry
        self.kept.write_text(json.dumps(self.found))
        print(name, entry, flush=True)


def main() -> None:
    parser = arguments(__doc__, "pairs of training and held-out rows")
    parser.add_argument("--ways", default="", help="comma-separated; all by default")
    options = parser.parse_args()
    answering = Answering(options)
    model = answering.model
    study, none = Study(model, options.work), Prefixes(())
    parts: dict[str, Any] = {}
    for files in zip(options.files[::2], options.files[1::2], strict=True):
        name, data = answering.prepared(*files)
        own, own_tried = answering.own(name, data), answering.own_held_out(name, data)
        parts[name] = (
            own,
            [(prompt, answer[:MOST]) for prompt, answer in training.draftable(data.train)],
            training.read_states(model, own, none, QUIET),
            training.read_states(model, own_tried, none, QUIET),
        )
    every = {name: held_out for name, (*_, held_out) in parts.items()}
    chosen = set(options.ways.split(",")) if options.ways else None
    for name, (own, references, samples, held_out) in parts.items():
        of = training.DraftVocabulary.of
        vocabulary, here = of([answer for _, answer in own], 2048), {name: held_out}
        if chosen is None or "references" in chosen:
            tokens = sum(len(answer) for _, answer in own)
            others = as_long(references, tokens)
            theirs = of([answer for _, answer in others], 2048)
            read = training.read_states(model, others, none, QUIET)
            study.way(f"{name}: references", read, theirs, here, Way())
        for way, how in WAYS.items():
            if chosen is None or way in chosen:
                measured = every if way == "as it is" else here
                part = fewer(samples, how.share)
                study.way(f"{name}: {way}", part, vocabulary, measured, how)
    report = {"model": Path(options.model).name, "dtype": options.dtype, "ways": study.found}
    if options.json:
        options.json.write_text(json.dumps(report | {"machine": machine_info()}, indent=1) + "\n")


if __name__ == "__main__":
    main()

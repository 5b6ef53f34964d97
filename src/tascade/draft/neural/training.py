"""Training a drafter on a task's answers: the target's states are read once, then it learns."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from tascade.core import IntArray, Progress, Row
from tascade.data.prepare import spread
from tascade.decode.prefixes import Prefixes
from tascade.decode.taps import Taps, body_of
from tascade.draft.neural.network import DraftNetwork, DraftShape
from tascade.enrich.train.checkpoint import has_state, load_state, save_state
from tascade.enrich.train.trainer import use_bf16
from tascade.errors import ConfigError

Pair = tuple[IntArray, IntArray]

PASSES = 4
"""Tokens that each row drafts on in training."""
DECAY = 0.8
"""Weight of each pass against the one before (EAGLE-3, section 3.2)."""
ALONG_SHARE = 0.35
"""Share of batches that learn to go along a path, the others to draft by themselves."""
_RATE, _WARM, _LAST, _CLIP = 5e-4, 0.04, 0.1, 1.0
_BETAS, _DECAY = (0.9, 0.95), 0.01
_BATCH_TOKENS, _GRAIN = 2048, 32
_KEPT_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Sample:
    """A prompt with its answer, and the target's states over both.

    ids: [T] prompt and answer, from where the states are known on
    start: where the answer begins
    taps: [T, taps * d]
    """

    ids: torch.Tensor
    start: int
    taps: torch.Tensor

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def first(self) -> int:
        """The row that says the answer's second token, the first that can be drafted."""
        return self.start - 1

    @property
    def answer(self) -> int:
        """How many rows say a token of the answer."""
        return len(self.ids) - self.start - 1


@dataclass(frozen=True, slots=True)
class DraftVocabulary:
    """The tokens that a drafter can say: ``ids`` [Vd], ascending."""

    ids: torch.Tensor

    @classmethod
    def of(cls, answers: Sequence[IntArray], most: int) -> DraftVocabulary:
        """The most frequent tokens of these answers, ``most`` of them, those met once left out.

        Raises:
            ConfigError: no token occurs twice.
        """
        joined = np.concatenate(answers) if answers else np.empty(0, np.int32)
        ids, counts = np.unique(joined, return_counts=True)
        order = np.argsort(-counts, kind="stable")[:most]
        kept = np.sort(ids[order][counts[order] > 1])
        if not len(kept):
            raise ConfigError(
                "no token occurs twice in these answers",
                got=f"{len(answers)} answers, {len(joined)} tokens",
                wanted="answers that have something in common",
                where="data",
            )
        return cls(torch.from_numpy(kept.astype(np.int64)))

    def to(self, device: torch.device) -> DraftVocabulary:
        """The same on a device."""
        return DraftVocabulary(self.ids.to(device))

    def places(self, tokens: torch.Tensor) -> torch.Tensor:
        """Each token's place in ``ids``, or -1."""
        at = torch.searchsorted(self.ids, tokens).clamp(max=len(self.ids) - 1)
        return torch.where(self.ids[at] == tokens, at, -1)


def draftable(rows: Sequence[Row]) -> list[Pair]:
    """Those that leave something to draft: with a prompt, and an answer of two tokens or more."""
    return [(p, a) for p, a in rows if p is not None and len(p) and len(a) > 1]


def within(pairs: Sequence[Pair], tokens: int) -> list[Pair]:
    """As many, one at least and spread over all, as have about so many tokens together."""
    mean = sum(len(p) + len(a) for p, a in pairs) / max(1, len(pairs))
    return spread(pairs, max(1, int(tokens / max(1.0, mean))))


@torch.inference_mode()
def read_states(
    model: Any,
    pairs: Sequence[Pair],
    prefixes: Prefixes,
    tell: Progress,
    layers: Sequence[int] = (),
) -> list[Sample]:
    """Run the target once over each prompt with its answer, and keep its states in bfloat16.

    States of a kept prefix are not there in decoding, and so are none here. Answers of less than
    two tokens leave nothing to draft.

    Args:
        model: the target.
        pairs: prompts and answers; a prompt has a token at least.
        prefixes: of the pack.
        tell: progress.
        layers: whose states; those that a new drafter would read by default.
    """
    layers = layers or DraftShape.of(model.config.get_text_config(), 1).taps
    taps, samples = Taps(model, layers), []
    body = body_of(model)
    for done, (prompt, answer) in enumerate(pairs):
        tell("reading the model's states", done, len(pairs))
        if not len(prompt) or len(answer) < 2:
            continue
        ids = torch.from_numpy(np.concatenate((prompt, answer)).astype(np.int64))
        known = len(prefixes.of(prompt))
        with taps.taking():
            body(input_ids=ids[None].to(model.device), use_cache=False)
        states = torch.cat(taps.states, dim=-1)[0, known:].to("cpu", torch.bfloat16)
        samples.append(Sample(ids[known:], len(prompt) - known, states))
    return samples


@dataclass(frozen=True, slots=True)
class Batch:
    """Samples of about one length, filled up at their ends.

    ids: [B, T], -1 behind the end
    taps: [B, T, taps * d]
    rows: [B, A] those that say a token of the answer, filled up with the last row
    wanted: for each pass, [B, A] what each of them is to say; -1 for nothing
    hidden: [B, 1, A, T] 0 where a row may see another, minus infinity elsewhere
    """

    ids: torch.Tensor
    taps: torch.Tensor
    rows: torch.Tensor
    wanted: tuple[torch.Tensor, ...]
    hidden: torch.Tensor

    @classmethod
    def of(cls, samples: Sequence[Sample], passes: int = PASSES) -> Batch:
        """Put samples together."""
        most, answer = _filled(max(map(len, samples))), _filled(max(s.answer for s in samples))
        ids = torch.full((len(samples), most + passes + 2), -1)
        taps = torch.zeros(len(samples), most, samples[0].taps.shape[1])
        rows = torch.full((len(samples), answer), most - 1)
        for at, sample in enumerate(samples):
            ids[at, : len(sample)] = sample.ids
            taps[at, : len(sample)] = sample.taps
            rows[at, : sample.answer] = torch.arange(sample.first, sample.first + sample.answer)
        wanted = tuple(ids.gather(1, rows + 2 + m) for m in range(passes))
        seen = torch.arange(most) <= rows[..., None]
        hidden = torch.zeros(seen.shape).masked_fill_(~seen, -torch.inf)[:, None]
        return cls(ids, taps, rows, wanted, hidden)

    def to(self, device: torch.device) -> Batch:
        """The same on a device."""
        wanted = tuple(part.to(device) for part in self.wanted)
        ids, taps, rows, hidden = (
            part.to(device) for part in (self.ids, self.taps, self.rows, self.hidden)
        )
        return Batch(ids, taps, rows, wanted, hidden)

    def words(self, m: int) -> torch.Tensor:
        """Token ids that follow each row in pass ``m``: [B, T] in the first, [B, A] then."""
        if m == 0:
            return self.ids[:, 1 : 1 + self.taps.shape[1]].clamp(min=0)
        return self.ids.gather(1, self.rows + 1 + m).clamp(min=0)


def _filled(length: int) -> int:
    return length + -length % _GRAIN


def batches(samples: Sequence[Sample], rng: np.random.Generator) -> Iterator[list[Sample]]:
    """All samples once, those of like length together, in a drawn order."""
    order = sorted(range(len(samples)), key=lambda i: (len(samples[i]), rng.random()))
    groups: list[list[Sample]] = [[]]
    for i in order:
        if groups[-1] and len(samples[i]) * (len(groups[-1]) + 1) > _BATCH_TOKENS:
            groups.append([])
        groups[-1].append(samples[i])
    for at in rng.permutation(len(groups)):
        if groups[at]:
            yield groups[at]


def spoken(
    network: DraftNetwork,
    batch: Batch,
    words: torch.nn.Module,
    vocabulary: DraftVocabulary,
    *,
    along: bool = False,
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """What each pass says where it is to say something that it can: its number, which rows [B, A]
    these are, their logits [N, Vd], and the places of the tokens they are to say [N].

    ``along``: see :meth:`DraftNetwork.unroll`.
    """
    embedded = [words(batch.words(m)).detach().float() for m in range(len(batch.wanted))]
    outputs = network.unroll(embedded, batch.taps, batch.rows, batch.hidden, along=along)
    for m, (output, wanted) in enumerate(zip(outputs, batch.wanted, strict=True)):
        places = vocabulary.places(wanted)
        known = (places >= 0) & (wanted >= 0)
        if known.any():
            yield m, known, network.say(output[known]).float(), places[known]


def decayed(losses: Sequence[tuple[int, torch.Tensor]]) -> torch.Tensor:
    """The mean of the passes' losses, later passes counting less."""
    total = sum((DECAY**m * loss for m, loss in losses), torch.zeros(()))
    return total / max(sum(DECAY**m for m, _ in losses), 1e-9)


def loss_of(
    network: DraftNetwork,
    batch: Batch,
    words: torch.nn.Module,
    vocabulary: DraftVocabulary,
    *,
    along: bool = False,
) -> torch.Tensor:
    """Cross-entropy of what each pass of each row is to say (see :func:`spoken`)."""
    passes = spoken(network, batch, words, vocabulary, along=along)
    return decayed([(m, functional.cross_entropy(said, to_say)) for m, _, said, to_say in passes])


@torch.inference_mode()
def acceptance(
    network: DraftNetwork,
    samples: Sequence[Sample],
    words: torch.nn.Module,
    vocabulary: DraftVocabulary,
    passes: int = PASSES,
) -> tuple[list[float], list[torch.Tensor]]:
    """What share of the tokens drafted at depth 1, 2, ... is right if all before were.

    Every row of every answer drafts on by itself, as in decoding.

    Returns:
        the shares; and of each sample [A, passes] whether the tokens up to there were right: row
        ``i`` drafts from token ``i`` of the answer on, which it knows.
    """
    right, asked, each = np.zeros(passes), np.zeros(passes), []
    device = network.head.weight.device
    vocabulary = vocabulary.to(device)
    for sample in samples:
        batch = Batch.of([sample], passes).to(device)
        drafted = [words(batch.words(0)).float()]
        alive, hits = torch.ones_like(batch.rows, dtype=torch.bool), []
        for m, wanted in enumerate(batch.wanted):
            output = network.unroll(drafted, batch.taps, batch.rows, batch.hidden)[-1]
            said = vocabulary.ids[network.say(output).argmax(-1)]
            asked[m] += int((alive & (wanted >= 0)).sum())
            alive = alive & (said == wanted) & (wanted >= 0)
            right[m] += int(alive.sum())
            hits.append(alive[0, : sample.answer])
            drafted.append(words(said).float())
        each.append(torch.stack(hits, 1).cpu())
    return (right / np.maximum(1, asked)).tolist(), each


def train(
    model: Any,
    samples: Sequence[Sample],
    vocabulary: DraftVocabulary,
    tell: Progress,
    *,
    rounds: int = 6,
    seed: int = 0,
    kept: Path | None = None,
) -> DraftNetwork:
    """Learn to draft the answers of ``samples``; the network, in float32, where the model is.

    What a step learns follows from ``seed`` and its number alone, so that a run that was stopped
    goes on with the very steps it would have taken.

    Args:
        model: the target; its embeddings are read, and are not changed.
        samples: see :func:`read_states`.
        vocabulary: what the network is to be able to say.
        tell: progress.
        rounds: how often all samples are learned.
        seed: of the weights it begins with, and of the order.
        kept: folder of the state, which is written every minute, and gone on with if it is there.

    Raises:
        ConfigError: the state there cannot be read, or was left by another run.
    """
    torch.manual_seed(seed)
    network = DraftNetwork(DraftShape.of(model.config.get_text_config(), len(vocabulary.ids)))
    _begin(network, model, vocabulary)
    words, rng = model.get_input_embeddings(), np.random.default_rng(seed)
    device = words.weight.device
    network, vocabulary = network.to(device), vocabulary.to(device)
    steps = rounds * sum(1 for _ in batches(samples, np.random.default_rng(seed)))
    adam = torch.optim.AdamW(network.parameters(), lr=_RATE, betas=_BETAS, weight_decay=_DECAY)
    named = dict(network.named_parameters())
    about = {"settings": {"samples": len(samples), "rounds": rounds, "seed": seed}}
    begun = 0
    if kept is not None and has_state(kept):
        begun = int(load_state(kept, named, adam, about)["done"])
    half, saved = use_bf16(device), time.monotonic()
    for done, (group, along) in enumerate(_order(samples, rounds, rng)):
        if done < begun:
            continue
        if kept is not None and done > begun and time.monotonic() - saved >= _KEPT_SECONDS:
            save_state(kept, named, adam, {**about, "done": done})
            saved = time.monotonic()
        tell("training the drafter", done, steps)
        batch = Batch.of(group).to(device)
        adam.zero_grad()
        for options in adam.param_groups:
            options["lr"] = _RATE * _share(done, steps)
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            loss = loss_of(network, batch, words, vocabulary, along=along)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(network.parameters(), _CLIP)
        adam.step()
    return network.eval().requires_grad_(False)


def _order(
    samples: Sequence[Sample], rounds: int, rng: np.random.Generator
) -> Iterator[tuple[list[Sample], bool]]:
    """The batches of all rounds, and whether each goes along its answers."""
    for _ in range(rounds):
        for group in batches(samples, rng):
            yield group, rng.random() < ALONG_SHARE


def _share(step: int, steps: int) -> float:
    """Of the learning rate: up in a straight line, down along a cosine."""
    warm = max(1, round(_WARM * steps))
    if step < warm:
        return (step + 1) / warm
    gone = (step - warm) / max(1, steps - warm)
    return _LAST + (1 - _LAST) * (1 + math.cos(math.pi * gone)) / 2


def _begin(network: DraftNetwork, model: Any, vocabulary: DraftVocabulary) -> None:
    """The head's rows are the target's; what is read first is nearly its last tap as it is."""
    rows = model.get_output_embeddings().weight.detach()[vocabulary.ids].float()
    with torch.no_grad():
        network.head.weight.copy_(rows)
        d = network.shape.hidden
        network.fc.weight.mul_(0.1)
        network.fc.weight[:, -d:] += torch.eye(d)

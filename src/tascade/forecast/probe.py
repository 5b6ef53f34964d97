"""How many of these drafts' misses can be foreseen from the model's states, by a probe.

A drafter of EAGLE's kind reads the target's hidden states behind the token before last, and the
last token, and says the next one. A small network without attention stands in for it here: it
learns in minutes, on the task's training outputs, and is asked at the very places where a replay
of TASC-spec missed. It cannot copy from the prompt, so what it foresees is the least that a trained
drafter should.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from tascade.core import Progress, Row
from tascade.decode.taps import body_of
from tascade.draft.neural.training import draftable, within
from tascade.errors import ConfigError
from tascade.forecast.statistics import Pair

TRAINED_TOKENS = 60_000
"""Tokens of training rows that are read, prompts among them, and no more."""
BEST = (1, 4, 8)
_WIDTH, _DROPPED = 768, 0.1
_BATCH, _RATE, _DECAY = 128, 1e-3, 0.01
_ROUNDS, _PATIENCE = 12, 2
_HELD_BACK = 10
_SEED = 7_0311
_STAGE = "probing the model's states"


@dataclass(frozen=True, slots=True)
class Probe:
    """What a probe foresaw.

    at_misses: share of the missed tokens that were its likeliest one, among its four likeliest, and
        among its eight
    anywhere: the same over all tokens
    misses: how many were asked for
    learned_from: tokens of training outputs
    vocabulary: tokens that it can say
    """

    at_misses: tuple[float, ...]
    anywhere: tuple[float, ...]
    misses: int
    learned_from: int
    vocabulary: int

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return dataclasses.asdict(self)


Seen = tuple[torch.Tensor, torch.Tensor]
"""Inputs [n, d * k] and the token ids [n] that follow."""


def probe(
    model: Any,
    train: Sequence[Row],
    replayed: Sequence[Pair],
    missed: Sequence[Sequence[int]],
    tell: Progress,
    *,
    tokens: int = TRAINED_TOKENS,
) -> Probe:
    """Train a probe on ``train`` and ask it for the missed tokens of ``replayed``.

    Args:
        model: the target, a causal model of Transformers.
        train: prompts and outputs to learn from: as many as there are ``tokens`` for, spread.
        replayed: other prompts and outputs.
        missed: of each of these, the places in the output where drafts missed. The first two tokens
            of an output are never asked for: there a drafter has no state yet, or the prompt's.
        tell: progress.
        tokens: most tokens to learn from.

    Raises:
        ConfigError: no training row has a prompt and two tokens of output that others repeat.
    """
    chosen = within(draftable(train), tokens)
    total = len(chosen) + len(replayed)
    seen: list[Seen] = []
    for done, pair in enumerate(chosen):
        tell(_STAGE, done, total)
        seen.append(_read(model, pair))
    words, labels = _vocabulary(seen)
    if not len(words):
        raise ConfigError(
            "nothing to teach a drafter with",
            got=f"{len(train)} training rows",
            wanted="rows with prompts, and outputs of two tokens or more that repeat",
            where="data",
        )
    learned = _learn([(x, y) for (x, _), y in zip(seen, labels, strict=True)], len(words))
    right, there, asked = np.zeros(len(BEST)), np.zeros(len(BEST)), 0
    count = 0
    for done, (pair, places) in enumerate(zip(replayed, missed, strict=True), len(chosen)):
        tell(_STAGE, done, total)
        inputs, answer = _read(model, pair)
        if not len(answer):
            continue
        hits = _hits(learned, inputs, answer, words)
        at = np.asarray([place - 1 for place in places if place >= 1], np.int64)
        right, asked = right + hits[:, at].sum(1), asked + len(at)
        there, count = there + hits.sum(1), count + len(answer)
    return Probe(
        tuple(map(float, right / max(1, asked))),
        tuple(map(float, there / max(1, count))),
        asked,
        sum(len(y) for y in labels),
        len(words),
    )


@torch.inference_mode()
def _read(model: Any, pair: Pair) -> Seen:
    """What a drafter knows before each token of an output but the first, and that token."""
    prompt, output = pair
    ids = torch.from_numpy(np.concatenate((prompt, output)).astype(np.int64))[None]
    found = body_of(model)(
        input_ids=ids.to(model.device), output_hidden_states=True, use_cache=False
    )
    layers, at = found.hidden_states, slice(len(prompt) - 1, ids.shape[1] - 2)
    last = len(layers) - 1
    # EAGLE-3's taps, states on their way into these layers; and the final one.
    taps = (min(2, last), last // 2, max(0, last - 3))
    states = [*(layers[tap][0, at] for tap in taps), found.last_hidden_state[0, at]]
    words = layers[0][0, len(prompt) : -1]
    inputs = [functional.layer_norm(part.float(), part.shape[-1:]) for part in (*states, words)]
    return torch.cat(inputs, dim=1).to(torch.bfloat16).cpu(), ids[0, len(prompt) + 1 :]


def _vocabulary(seen: Sequence[Seen]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Token ids that occur twice or more, ascending; and each row's as places there, or -1."""
    if not seen:
        return torch.empty(0, dtype=torch.long), []
    words, counts = torch.unique(torch.cat([answer for _, answer in seen]), return_counts=True)
    words = words[counts > 1]
    return words, [_places(answer, words) for _, answer in seen]


def _places(answer: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    at = torch.searchsorted(words, answer).clamp(max=max(0, len(words) - 1))
    return torch.where(words[at] == answer, at, -1) if len(words) else torch.full_like(answer, -1)


def _learn(rows: Sequence[Seen], words: int) -> nn.Module:
    torch.manual_seed(_SEED)
    held = [row for i, row in enumerate(rows) if i % _HELD_BACK == 0 and len(rows) > 1]
    used = [row for i, row in enumerate(rows) if i % _HELD_BACK or len(rows) == 1]
    inputs, labels = (torch.cat(parts) for parts in zip(*used, strict=True))
    known = labels >= 0
    inputs, labels = inputs[known], labels[known]
    net = nn.Sequential(
        nn.Linear(inputs.shape[1], _WIDTH),
        nn.GELU(),
        nn.Dropout(_DROPPED),
        nn.Linear(_WIDTH, max(1, words)),
    )
    steps = -(-len(labels) // _BATCH) * _ROUNDS
    adam = torch.optim.AdamW(net.parameters(), lr=_RATE, weight_decay=_DECAY)
    rate = torch.optim.lr_scheduler.OneCycleLR(adam, _RATE, total_steps=max(1, steps))
    best, kept, worse = -1.0, net.state_dict(), 0
    for _ in range(_ROUNDS):
        net.train()
        order = torch.randperm(len(labels))
        for start in range(0, len(order), _BATCH):
            at = order[start : start + _BATCH]
            adam.zero_grad()
            loss = functional.cross_entropy(net(inputs[at].float()), labels[at])
            torch.autograd.backward(loss)
            adam.step()
            rate.step()
        net.eval()
        right = _accuracy(net, held or used)
        worse = 0 if right > best else worse + 1
        if right > best:
            best, kept = right, {name: value.clone() for name, value in net.state_dict().items()}
        if worse > _PATIENCE:
            break
    net.load_state_dict(kept)
    return net.eval()


@torch.inference_mode()
def _accuracy(net: nn.Module, rows: Sequence[Seen]) -> float:
    right = [(net(x.float()).argmax(1) == y).float() for x, y in rows if len(y)]
    return float(torch.cat(right).mean()) if right else 0.0


@torch.inference_mode()
def _hits(
    net: nn.Module, inputs: torch.Tensor, answer: torch.Tensor, words: torch.Tensor
) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """[len(BEST), n]: whether each token is among the likeliest."""
    scores = net(inputs.float())
    best = words[scores.topk(min(max(BEST), scores.shape[1]), dim=1).indices]
    same = (best == answer[:, None]).cumsum(1) > 0
    return np.stack([same[:, min(most, same.shape[1]) - 1].numpy() for most in BEST])

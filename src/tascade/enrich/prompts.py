"""Prompts and texts that the model writes itself, to learn from more than the examples.

A model asked only about prompts it was trained on shows how it remembers, not how it decides; with
prompts of its own making there is as much to learn from as there is time (the idea of Magpie,
arXiv 2406.08464, on the stems of the task's own prompts). No held-out row is seen in making them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from tascade.core import IntArray, Progress
from tascade.decode.exclusive import exclusive
from tascade.enrich.train.samples import seeded

_SHARED = 0.02
_FEWEST = 4
_STEMS = 32
_DRAWS = 40
_ROWS, _TOKENS, _SIDE_BY_SIDE = 16, 32, 64


def own_prompts(
    model: Any,
    prompts: Sequence[IntArray],
    count: int,
    *,
    seed: int = 0,
    batch: int = 0,
    tell: Progress | None = None,
) -> list[IntArray]:
    """Prompts like the task's, continued by the model from their common beginnings.

    Args:
        model: the base model.
        prompts: the training prompts, token ids [T] each.
        count: how many to try for.
        seed: of the sampling.
        batch: how many are written side by side, from one stem; 0 for as many as leave a variety
            of stems, 256 at most.
        tell: called with (stage, done, total).

    Returns:
        At most ``count``, each once, none of them one of ``prompts``. Fewer where the prompts have
        no common ending to know an end by, or where the model seldom reaches it.
    """
    ids = [prompt.tolist() for prompt in prompts]
    ending = _common_ending(ids)
    if not ending or count < 1:
        return []
    batch = batch or min(256, max(64, count // _STEMS))
    most = max(map(len, ids)) + 16
    known = {tuple(prompt) for prompt in ids}
    found: list[IntArray] = []
    for number, stem in enumerate(_rounds(ids, count, batch, seed)):
        room = most - len(stem)
        for written in _write(model, stem, batch, room, ending, seed + number):
            if tuple(written) not in known:
                known.add(tuple(written))
                found.append(np.array(written, np.int32))
        if tell is not None:
            tell("writing prompts", min(len(found), count), count)
        if len(found) >= count:
            break
    return found[:count]


def spliced_prompts(prompts: Sequence[IntArray], count: int, *, seed: int = 0) -> list[IntArray]:
    """Prompts made of the beginning of one and the rest of another, where both have two tokens.

    For a model that was taught answers alone, and so cannot write prompts.

    Args:
        prompts: the training prompts, token ids [T] each.
        count: how many to try for.
        seed: of the draws.

    Returns:
        At most ``count``, each once, none of them one of ``prompts`` or longer than all of them.
    """
    ids = [prompt.tolist() for prompt in prompts]
    places: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for number, prompt in enumerate(ids):
        for at in range(2, len(prompt)):
            places.setdefault((prompt[at - 2], prompt[at - 1]), []).append((number, at))
    known = {tuple(prompt) for prompt in ids}
    longest, rng = max(map(len, ids), default=0), np.random.default_rng(seed)
    found: list[IntArray] = []
    for _ in range(_DRAWS * count if longest > 2 else 0):
        one = ids[int(rng.integers(len(ids)))]
        if len(found) == count or len(one) < 3:
            continue
        at = int(rng.integers(2, len(one)))
        meeting = places[one[at - 2], one[at - 1]]
        number, start = meeting[int(rng.integers(len(meeting)))]
        child = (*one[:at], *ids[number][start:])
        if child not in known and len(child) <= longest:
            known.add(child)
            found.append(np.array(child, np.int32))
    return found


def _common_ending(prompts: Sequence[list[int]]) -> list[int]:
    if len(prompts) < 2:
        return []
    ending = prompts[0]
    for prompt in prompts[1:]:
        n = 0
        while n < min(len(ending), len(prompt)) and ending[-1 - n] == prompt[-1 - n]:
            n += 1
        ending = ending[len(ending) - n :]
    return ending


def _rounds(prompts: Sequence[list[int]], count: int, batch: int, seed: int) -> Iterator[list[int]]:
    """A stem for each batch: of a random prompt, what many others begin with as well."""
    rng = np.random.default_rng(seed)
    shared: Counter[tuple[int, ...]] = Counter()
    for prompt in prompts:
        shared.update(tuple(prompt[:n]) for n in range(1, len(prompt)))
    least = max(_FEWEST, int(_SHARED * len(prompts)))
    for _ in range(2 * (count // batch + 1)):
        prompt = prompts[int(rng.integers(len(prompts)))]
        n = 1
        while n + 1 < len(prompt) and shared[tuple(prompt[: n + 1])] >= least:
            n += 1
        yield prompt[:n]


def _write(
    model: Any, stem: list[int], batch: int, room: int, ending: list[int], seed: int
) -> Iterator[list[int]]:
    """Sampled continuations of ``stem`` that reach the ending."""
    if room < 1:
        return
    with exclusive(model), seeded(seed, model.device):
        begin = torch.tensor([stem] * batch, device=model.device)
        out = _sampled(
            model,
            begin,
            max_new_tokens=room,
            eos_token_id=ending[-1],
            pad_token_id=ending[-1],
        )
    for row in out.tolist():
        end = _find(row, ending, len(stem))
        if end >= 0:
            yield row[: end + len(ending)]


def _find(row: Sequence[int], ending: list[int], start: int) -> int:
    k = len(ending)
    return next((i for i in range(start, len(row) - k + 1) if row[i : i + k] == ending), -1)


def free_text(model: Any, size: int, *, rows: int = _ROWS, seed: int = 0) -> torch.Tensor:
    """Text the base model writes from random tokens: [rows, tokens] ids, below ``size``."""
    parts = []
    for at in range(0, rows, _SIDE_BY_SIDE):
        count, most = min(_SIDE_BY_SIDE, rows - at), _TOKENS - 1
        with exclusive(model), seeded(seed * 1_000_003 + at, model.device):
            begin = torch.randint(size, (count, 1)).to(model.device)
            parts.append(
                _sampled(model, begin, max_new_tokens=most, min_new_tokens=most, pad_token_id=0)
            )
    return torch.cat(parts)


def _sampled(model: Any, begin: torch.Tensor, **options: int) -> torch.Tensor:
    """``begin`` [rows, T], continued by draws from all of the model's distribution."""
    text: torch.Tensor = model.generate(
        begin,
        attention_mask=torch.ones_like(begin),
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        **options,
    )
    return text

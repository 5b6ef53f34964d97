"""Row counts whose rows come out alike, bit for bit: what makes drafts lossless in half precision.

In half precision on a CPU a token's logits depend on how many tokens are computed beside it, in
three ways, each found by comparing bits on SmolLM2-135M:

- Attention takes another kernel for a single query. So a pass has two rows at least.
- Sums over keys are ordered by the number of keys. So that is filled up to a multiple of
  :data:`KEY_BLOCK`, the keys behind hidden by the mask. Libraries for CPUs without instructions for
  bfloat16 order them otherwise from one multiple to the next: there nothing is promised.
- A matrix product takes another kernel from some number of rows on. Which one is the library's and
  the machine's business: a self-test finds the counts that agree, and no pass has others.

What it gains and what it costs is measured by ``benchmarks/real_model/rounding.py``.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

KEY_BLOCK = 32
"""Keys shown to attention come in multiples of so many."""
TESTED = tuple(range(2, 33, 2))
"""Row counts that are compared; a pass over another number is filled up to one of them.

More rows would agree too with linear layers given 32 at a time (all up to 128, on SmolLM2), but its
step over 64 rows then takes 94 ms instead of 66, and one over 32 takes 54: the longer drafts of its
strongest task (31 tokens a step instead of 19) would not repay it.
"""
DOUBT = 1 / 8
"""How far ahead a token must be, as a share of its row's largest logit, to be taken behind a branch
beside the likeliest path. Keys between a branch and its path (its siblings', hidden by the mask)
shift the order of attention's sums: by up to 0.6 of logits of some 20, in a seventh of such rows.
"""
_ENOUGH, _LEAST = 16, 8
"""Rows that leave room for a draft, and fewest that a guarantee is worth a short draft for."""
_PASTS = (32, 96, 192)
"""Tokens before the compared rows: multiples of :data:`KEY_BLOCK`, so that all counts see as many
keys. Each text is read once, and the cache cut back to it between the passes, as in use: right
behind a reading keys lie otherwise in memory, and there, on a CPU without instructions for
bfloat16, two rows came out as four did, while some steps later they did not.
"""
_KEYS_FROM = (56, 184, 248, 376, 504, 1016)
"""Tokens before rows that see one more block of keys in a long pass than in a short one."""
_SEED = 6_2831

Logits = Callable[[list[int], int, Sequence[int]], dict[int, torch.Tensor]]
"""Of token ids, P and some numbers n: the logits [n, V] of the n ids behind the first P, each in a
pass over these n.
"""


@dataclass(frozen=True, slots=True)
class RowCounts:
    """Row counts, ascending, whose rows were equal to each other's in every bit."""

    counts: tuple[int, ...]

    @property
    def most(self) -> int:
        """The largest of them."""
        return self.counts[-1]

    def fit(self, rows: int) -> int:
        """The smallest of them for so many rows, which are at most :attr:`most`."""
        return next(count for count in self.counts if count >= rows)


_found: weakref.WeakKeyDictionary[Any, dict[Any, RowCounts | None]] = weakref.WeakKeyDictionary()


def row_counts(model: Any, logits: Logits) -> RowCounts | None:
    """The counts that agree for a model on this machine, looked for once; ``None`` if too few do.

    The smallest count that agrees with enough larger ones is what a single token is filled up to.
    """
    known, key = _found.setdefault(model, {}), conditions(model)
    if key not in known:
        known[key] = _agreeing(model, logits)
    return known[key]


def remember(model: Any, counts: Sequence[float]) -> None:
    """Take the counts that were found for a model on this machine before; none for too few.

    Wrong ones cost the equality in the last bits, and no more.
    """
    kept = tuple(sorted(n for n in map(int, counts) if n in TESTED))
    _found.setdefault(model, {})[conditions(model)] = RowCounts(kept) if kept else None


def remembered(model: Any) -> list[float]:
    """What :func:`remember` takes; nothing where nobody has looked."""
    found = _found.get(model, {}).get(conditions(model))
    return [] if found is None else [float(n) for n in found.counts]


def conditions(model: Any) -> tuple[int, torch.dtype, str]:
    """What the last bits of a model's numbers depend on, on one machine."""
    return torch.get_num_threads(), model.dtype, model.config._attn_implementation


def _agreeing(model: Any, logits: Logits) -> RowCounts | None:
    config = model.config.get_text_config()
    room = int(getattr(config, "max_position_embeddings", None) or 2048) - TESTED[-1]
    draws = torch.Generator().manual_seed(_SEED)
    classes = {count: set(TESTED) for count in TESTED}
    if room < 1:
        return None

    def passes(past: int, counts: Sequence[int]) -> dict[int, torch.Tensor]:
        ids = torch.randint(0, int(config.vocab_size), (past + TESTED[-1],), generator=draws)
        return logits(ids.tolist(), past, counts)

    for past in _PASTS:
        rows = passes(min(past, room), TESTED)
        for count, agreeing in classes.items():
            agreeing &= _alike(count, rows)
    best: set[int] = max(classes.values(), key=lambda c: (min(max(c), _ENOUGH), -min(c)))
    least, most = min(best), max(best)
    if most < _LEAST:
        return None
    for past in (past for past in _KEYS_FROM if past <= room):
        rows = passes(past, (least, most))
        if not torch.equal(rows[least], rows[most][:least]):
            return None
    return RowCounts(tuple(sorted(best)))


def _alike(count: int, rows: dict[int, torch.Tensor]) -> set[int]:
    """Counts from ``count`` on whose rows are its own, and each other's as far as they reach."""
    found, known = {count}, rows[count]
    for n in (n for n in rows if n > count):
        if torch.equal(rows[n][: len(known)], known):
            found.add(n)
            known = rows[n]
    return found

"""What an engine hands to the batch drafter, checked: its kernels write where lengths say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tascade.core import IntArray, LongArray
from tascade.errors import ConfigError
from tascade.util.jit import lean


def check_batch(
    sampled: Sequence[Sequence[int]], lengths: Any, ids: Any, *, requests: int, longest: int
) -> tuple[LongArray, IntArray]:
    """Check a batch as :meth:`~tascade.draft.ngram.batch.BatchDrafter.propose` takes it.

    Args:
        sampled: [B], see there.
        lengths: [>= B], see there.
        ids: [>= B, L], see there.
        requests: most rows.
        longest: most tokens of a request; a row with more, as an engine may hold, is left alone.

    Returns:
        [B] how many tokens each row has just been given, and how many it holds in all; both 0 for
        a row to leave alone.

    Raises:
        ConfigError: arrays of another type or shape, too many rows, or a length that the row's
            tokens do not have.
    """
    for name, found, axes in (("lengths", lengths, 1), ("ids", ids, 2)):
        if not isinstance(found, np.ndarray) or found.dtype != np.int32 or found.ndim != axes:
            raise ConfigError(
                f"{name} cannot be drafted from",
                got=f"{getattr(found, 'dtype', type(found).__name__)} {list(np.shape(found))}",
                wanted=f"an int32 array with {axes} axes",
                where=name,
            )
    rows = len(sampled)
    if rows > requests:
        raise ConfigError("too many rows", got=rows, wanted=f"at most {requests} requests")
    if rows > min(len(lengths), len(ids)):
        raise ConfigError(
            "the batch lacks rows",
            got=f"{len(lengths)} lengths, {len(ids)} of ids",
            wanted=str(rows),
        )
    fresh = np.fromiter(map(len, sampled), np.int64, rows)
    whole = np.where(fresh > 0, lengths[:rows], 0)
    wrong = np.flatnonzero((whole < fresh) | (whole > ids.shape[1]))
    if len(wrong):
        row = int(wrong[0])
        raise ConfigError(
            "a row cannot hold so many tokens",
            got=f"{whole[row]} tokens, {fresh[row]} of them new",
            wanted=f"at least the new ones, at most {ids.shape[1]}",
            where=f"row {row}",
        )
    fresh[whole > longest] = 0
    return fresh, np.where(fresh > 0, whole, 0).astype(np.int32)


def check_tasks(wanted: Sequence[int], count: int) -> None:
    """Refuse a row of a task that is not there (below 0: of none).

    Raises:
        ConfigError: with the task.
    """
    for row, task in enumerate(wanted):
        if task >= count:
            raise ConfigError("no such task", got=task, wanted=f"below {count}", where=f"row {row}")


@lean
def leave_strange(ids: Any, lengths: Any, slot_of: Any, known: Any, vocabulary: int) -> None:
    """Leave alone the rows with a token that is none: below 0, or not below ``vocabulary``.

    An engine keeps such for what has no id, or none yet (prompts of embeddings, tokens to come).
    Tokens a slot knows, ``known`` [S], were seen before. Sets ``slot_of`` [B] to -2 for them; its
    other values as :func:`~tascade.draft.ngram.request_states.match_rows` leaves them.
    """
    for b in range(len(slot_of)):
        if slot_of[b] == -2:
            continue
        at = known[slot_of[b]] if slot_of[b] >= 0 else 0
        for i in range(at, lengths[b]):
            if not 0 <= ids[b, i] < vocabulary:
                slot_of[b] = -2
                break

"""The state of a batch's requests, and the kernels that find out whose it is.

A request lives in a slot: its tokens, the chain over them, its similar examples' chain, its last
draft and what that was based on. Which slot is whose is settled by content (:func:`match_rows`), so
that a slot can never serve another request: it holds nothing but the request's own tokens.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tascade.core import FloatArray, IntArray, LongArray
from tascade.draft.ngram.candidates import KEPT_VOTERS, MAX_CANDIDATES, SOURCES
from tascade.index.lookup import HASH_BITS, MAX_LEVELS, chain_extend
from tascade.util.jit import inner, lean

EXAMPLE_TOKENS = 8192
"""Tokens of similar examples a slot holds."""
_STRIDE = 64


class Slots(NamedTuple):
    """State of ``S`` requests with ``L`` tokens and ``K`` drafted ones at most.

    task, known, prompt, nodes, example_length: [S] int64; which task's corpus and calibration it
    uses, tokens in the chain, of them the prompt, nodes of the last draft (-1: none), tokens of
    similar examples; given: how many of the last draft went to the engine. The rest as in
    ``HashChain``, ``new_tree``, ``new_memo`` and ``new_scratch``, one row for each slot. Pages no
    request has touched cost nothing.
    """

    task: LongArray
    known: LongArray
    prompt: LongArray
    nodes: LongArray
    given: LongArray
    example_length: LongArray
    tokens: IntArray
    previous: IntArray
    table: IntArray
    example_tokens: IntArray
    example_previous: IntArray
    example_table: IntArray
    draft: IntArray
    survival: FloatArray
    kinds: npt.NDArray[np.int8]
    raw: npt.NDArray[np.float64]
    memo_tokens: IntArray
    memo_shares: npt.NDArray[np.float64]
    memo_match: LongArray
    memo_used: LongArray
    voters: LongArray
    held: IntArray


def new_slots(count: int, length: int, nodes: int) -> Slots:
    """``count`` free slots for requests of at most ``length`` tokens, drafts of ``nodes``."""
    table = 1 << HASH_BITS
    return Slots(
        np.zeros(count, np.int64),
        np.zeros(count, np.int64),
        np.zeros(count, np.int64),
        np.full(count, -1, np.int64),
        np.zeros(count, np.int64),
        np.zeros(count, np.int64),
        np.empty((count, length), np.int32),
        np.empty((count, length + 1), np.int32),
        np.empty((count, table), np.int32),
        np.empty((count, EXAMPLE_TOKENS), np.int32),
        np.empty((count, EXAMPLE_TOKENS + 1), np.int32),
        np.empty((count, table), np.int32),
        np.zeros((count, nodes), np.int32),
        np.zeros((count, nodes), np.float32),
        np.zeros((count, nodes), np.int8),
        np.zeros((count, nodes), np.float64),
        np.zeros((count, nodes + 1, MAX_CANDIDATES), np.int32),
        np.zeros((count, nodes + 1, MAX_CANDIDATES, SOURCES), np.float64),
        np.zeros((count, nodes + 1, SOURCES), np.int64),
        np.zeros((count, nodes + 1), np.int64),
        np.empty((count, nodes + 2, MAX_LEVELS, KEPT_VOTERS), np.int64),
        np.zeros((count, nodes + 2, MAX_LEVELS + 2), np.int32),
    )


@inner
def _same(known: Any, row: Any, n: int) -> bool:
    """Whether two token arrays agree in their first ``n``: in strides, which compile to SIMD."""
    if n == 0:
        return True
    if known[n - 1] != row[n - 1]:
        return False
    at = 0
    while at + _STRIDE <= n:
        differing = 0
        for j in range(at, at + _STRIDE):
            differing += known[j] != row[j]
        if differing:
            return False
        at += _STRIDE
    while at < n:
        if known[at] != row[at]:
            return False
        at += 1
    return True


@inner
def _settled(sampled: int, given: int, survival: Any, outcome: Any) -> None:
    """Count what became of a request's last draft."""
    outcome[0] += 1.0
    outcome[1] += min(sampled - 1, given)
    outcome[2] += given
    for i in range(given):
        outcome[3] += survival[i]


@lean
def match_rows(
    ids: Any,
    lengths: Any,
    fresh: Any,
    wanted: Any,
    slots: Any,
    last: Any,
    claimed: Any,
    out: Any,
    outcome: Any,
) -> int:
    """Find the slot that holds each row's tokens of before: by full comparison, never by number.

    ``ids``: [>= B, L] int32, the engine's rows; ``lengths``: [>= B], how many tokens each holds;
    ``fresh``: [B], how many of them are new, 0 for a row to leave alone; ``wanted``: [B], each
    row's task; ``last``: [>= B], the slot each row had last time or -1, where to look first. Sets
    ``claimed`` [S] to 1 for each slot found, ``out`` [B] to the slots, -1 for a request not seen
    before and -2 for a row to leave alone, and ``outcome`` to [requests found, draft tokens
    accepted, given, and promised]. Returns how many requests were not seen before.
    """
    known, tokens = slots.known, slots.tokens
    claimed[:] = 0
    outcome[:] = 0.0
    missing = 0
    for b in range(len(fresh)):
        out[b] = -1 if fresh[b] else -2
        # A row may have gone on while no drafts were asked for: what is known is then a prefix.
        s, before = last[b], lengths[b] - fresh[b]
        likely = fresh[b] > 0 and s >= 0 and claimed[s] == 0 and slots.task[s] == wanted[b]
        if likely and 0 < known[s] <= before and _same(tokens[s], ids[b], known[s]):
            out[b] = s
            claimed[s] = 1
        missing += out[b] == -1
    for b in range(len(fresh) if missing else 0):
        before = lengths[b] - fresh[b]
        if out[b] != -1 or before == 0:
            continue
        for s in range(len(known)):
            likely = claimed[s] == 0 and known[s] == before and slots.task[s] == wanted[b]
            if likely and _same(tokens[s], ids[b], before):
                out[b] = s
                claimed[s] = 1
                missing -= 1
                break
    for b in range(len(fresh)):
        if out[b] >= 0:
            _settled(fresh[b], slots.given[out[b]], slots.survival[out[b]], outcome)
    return missing


@inner
def _clear_slot(slots: Any, s: int, task: int, prompt: int, examples: Any) -> None:
    """Make slot ``s`` a new request's: nothing of the one before remains reachable."""
    slots.task[s] = task
    slots.known[s] = 0
    slots.prompt[s] = prompt
    slots.nodes[s] = -1
    slots.given[s] = 0
    slots.held[s, :, MAX_LEVELS] = 0
    slots.table[s, :] = -1
    slots.example_length[s] = 0
    if len(examples):
        slots.example_table[s, :] = -1
        n = min(len(examples), EXAMPLE_TOKENS)
        slots.example_length[s] = chain_extend(
            slots.example_tokens[s],
            slots.example_previous[s],
            slots.example_table[s],
            0,
            examples[len(examples) - n :],
            HASH_BITS,
        )


@lean
def clear_slots(slots: Any, which: Any, tasks: Any, prompts: Any, examples: Any, ends: Any) -> None:
    """Make the slots ``which`` [N] new requests' (see :func:`_clear_slot`).

    ``examples``: [T] int32, those of all requests, one behind the other, up to ``ends`` [N] each.
    """
    begin = 0
    for i in range(len(which)):
        _clear_slot(slots, which[i], tasks[i], prompts[i], examples[begin : ends[i]])
        begin = ends[i]

"""Numba kernels that draft for all requests of a batch in one call: chains, ragged, zero allowed.

A request lives in a slot: its tokens, the chain over them, its similar examples' chain, its last
draft and what that was based on. Which slot is whose is settled by content (:func:`match_rows`), so
that a slot can never serve another request: it holds nothing but the request's own tokens.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tascade.core import FloatArray, IntArray
from tascade.draft.evidence import CORPUS, MAX_CANDIDATES, SOURCES, gather, new_scratch
from tascade.draft.jit import kernel
from tascade.draft.lookup import DEPTH, HASH_BITS, chain_extend
from tascade.draft.mixing import probability, survive
from tascade.draft.search import settle

LongArray = npt.NDArray[np.int64]

EXAMPLE_TOKENS = 8192
"""Tokens of similar examples a slot holds."""
SURVIVAL_BINS = 64
_LEAST = 0.02
_STRIDE = 64


class Slots(NamedTuple):
    """State of ``S`` requests with ``L`` tokens and ``K`` drafted ones at most.

    task, known, prompt, nodes, example_length: [S] int64; which task's corpus and calibration it
    uses, tokens in the chain, of them the prompt, nodes of the last draft (-1: none), tokens of
    similar examples. The rest as in ``HashChain``, ``new_tree`` and ``new_memo``, one row for each
    slot. Pages no request has touched cost nothing.
    """

    task: LongArray
    known: LongArray
    prompt: LongArray
    nodes: LongArray
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


def new_slots(count: int, length: int, nodes: int) -> Slots:
    """``count`` free slots for requests of at most ``length`` tokens, drafts of ``nodes``."""
    table = 1 << HASH_BITS
    return Slots(
        np.zeros(count, np.int64),
        np.zeros(count, np.int64),
        np.zeros(count, np.int64),
        np.full(count, -1, np.int64),
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
    )


def new_batch_work(nodes: int) -> tuple[Any, ...]:
    """Working memory of :func:`draft_rows`."""
    return (
        np.empty(nodes + DEPTH, np.int32),
        np.empty(nodes + DEPTH, np.int32),
        np.arange(-1, nodes - 1, dtype=np.int32),
        np.zeros(nodes, np.int8),
        new_scratch(nodes),
    )


@kernel
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


@kernel
def match_rows(
    ids: Any, rows: Any, lengths: Any, fresh: Any, slots: Any, last: Any, claimed: Any, out: Any
) -> None:
    """Find the slot that holds each row's tokens of before: by full comparison, never by number.

    ``ids``: [R, L] int32, the engine's rows; ``rows``, ``lengths``, ``fresh``: [B], which of them,
    how many tokens they hold, how many of these are new; ``last``: [R], the slot each row had
    last time or -1, where to look first. Sets ``claimed`` [S] to 1 for each slot found, and
    ``out`` [B] to the slots, -1 for a request not seen before.
    """
    known, tokens = slots.known, slots.tokens
    claimed[:] = 0
    out[:] = -1
    for b in range(len(rows)):
        before = lengths[b] - fresh[b]
        s = last[rows[b]]
        likely = s >= 0 and claimed[s] == 0 and known[s] == before and before > 0
        if likely and _same(tokens[s], ids[rows[b]], before):
            out[b] = s
            claimed[s] = 1
    for b in range(len(rows)):
        before = lengths[b] - fresh[b]
        if out[b] >= 0 or before == 0:
            continue
        for s in range(len(known)):
            if claimed[s] == 0 and known[s] == before and _same(tokens[s], ids[rows[b]], before):
                out[b] = s
                claimed[s] = 1
                break


@kernel
def clear_slot(slots: Any, s: int, task: int, prompt: int, examples: Any) -> None:
    """Make slot ``s`` a new request's: nothing of the one before remains reachable."""
    slots.task[s] = task
    slots.known[s] = 0
    slots.prompt[s] = prompt
    slots.nodes[s] = -1
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


@kernel
def _window(tokens: Any, start: int, end: int, separated: bool, nodes: int, window: Any) -> int:
    """Write ``tokens[start:end]`` reversed behind ``nodes`` free places; returns how many."""
    n = 0
    at = end - 1
    while n < DEPTH and at >= start:
        window[nodes + n] = tokens[at]
        n += 1
        at -= 1
    while separated and n < DEPTH and at >= start - 2:
        window[nodes + n] = -1
        n += 1
        at -= 1
    return n


@kernel
def _grow_chain(
    limit: int,
    floor: float,
    barriers: Any,
    sources: Any,
    sizes: Any,
    mixer: Any,
    out: Any,
    memo: Any,
    work: Any,
) -> int:
    """Draft the likeliest chain of at most ``limit`` tokens, down to survival ``floor``.

    ``sizes``: lengths of the two reversed contexts in ``work``. Returns the number of nodes.
    """
    tokens, survival, kinds, raw = out
    memo_tokens, memo_shares, memo_match, memo_used = memo
    output_window, request_window, _, _, scratch = work
    _, weights, final, path, odds = mixer
    nodes = len(output_window) - DEPTH
    product, least, n = 1.0, 1.0, 0
    bar = max(_LEAST, floor)
    memo_used[0] = 0
    while n < limit:
        rc, rx = output_window[nodes - n :], request_window[nodes - n :]
        nc, nx = min(DEPTH, sizes[0] + n), min(DEPTH, sizes[1] + n)
        cut = min(0.4, max(0.02, 0.4 * bar / product))
        found = (memo_tokens[n], memo_shares[n], memo_match[n])
        used = gather(sources, rc, nc, rx, nx, cut, scratch, found, (n, n - 1))
        memo_used[n] = used
        total, top, best = 0.0, 0.0, -1
        for i in range(used):
            p = probability(memo_shares[n, i], memo_match[n], odds, weights, final)
            total += p
            if p > top:
                top, best = p, i
        if best < 0:
            break
        product *= top / max(total, 1.0)
        least = min(least, survive(product, path))
        if least < bar:
            break
        token = memo_tokens[n, best]
        tokens[n], survival[n], raw[n] = token, least, product
        from_request = False
        for s in range(1, SOURCES):
            from_request = from_request or memo_shares[n, best, s] > 0
        from_corpus = memo_shares[n, best, CORPUS] > 0
        kinds[n] = 3 if from_corpus and from_request else (1 if from_corpus else 2)
        n += 1
        memo_used[n] = 0
        output_window[nodes - n] = token
        request_window[nodes - n] = token
        ends = False
        for barrier in barriers:
            ends = ends or token == barrier
        if ends:
            break
    return n


@kernel
def draft_rows(
    ids: Any,
    rows: Any,
    lengths: Any,
    slot_of: Any,
    slots: Any,
    tasks: Any,
    barriers: Any,
    limit: int,
    floor: float,
    length_limit: int,
    work: Any,
) -> None:
    """Take in each row's new tokens, learn from its last draft, and draft anew.

    ``ids``, ``rows``, ``lengths`` as in :func:`match_rows`; ``slot_of``: [B], each row's slot.
    ``tasks``: (shard table of all tasks, where each task's shards begin [P + 1], hash chain of
    documents not yet in a shard, the calibrations' arrays stacked, updated in place). At most
    ``limit`` nodes for a row (0: none) of at least ``floor`` survival, none after an end token
    (``barriers``), none beyond ``length_limit`` tokens. Drafts are left in the slots.
    """
    shards, begins, recent, stages = tasks
    cells, weights, final, path, odds = stages
    nodes = len(work[2])
    for b in range(len(rows)):
        s, n, row = slot_of[b], lengths[b], ids[rows[b]]
        out = (slots.draft[s], work[2], slots.survival[s], slots.kinds[s], slots.raw[s])
        memo = (slots.memo_tokens[s], slots.memo_shares[s], slots.memo_match[s], slots.memo_used[s])
        task = slots.task[s]
        mixer = (cells[task], weights[task], final[task], path[task], odds[task])
        new = row[slots.known[s] : n]
        if slots.nodes[s] >= 0:
            settle(new, slots.nodes[s], out, mixer, memo, work[3])
        slots.nodes[s] = -1
        slots.known[s] = chain_extend(
            slots.tokens[s], slots.previous[s], slots.table[s], slots.known[s], new, HASH_BITS
        )
        room = min(limit, length_limit - n - 1)
        over = False
        for barrier in barriers:
            over = over or row[n - 1] == barrier
        if room <= 0 or over:
            continue
        context = (slots.tokens[s], slots.previous[s], slots.table[s], n, HASH_BITS)
        similar = (
            slots.example_tokens[s],
            slots.example_previous[s],
            slots.example_table[s],
            slots.example_length[s],
            HASH_BITS,
        )
        nc = _window(slots.tokens[s], slots.prompt[s], n, True, nodes, work[0])
        nx = _window(slots.tokens[s], 0, n, False, nodes, work[1])
        slots.nodes[s] = _grow_chain(
            room,
            floor,
            barriers,
            (shards[begins[task] : begins[task + 1]], recent, similar, context),
            (nc, nx),
            mixer,
            (out[0], out[2], out[3], out[4]),
            memo,
            work,
        )


@kernel
def tally(slot_of: Any, slots: Any, counts: Any, sums: Any) -> None:
    """Nodes and their survival summed by survival, the surest bin first."""
    counts[:] = 0
    sums[:] = 0.0
    for b in range(len(slot_of)):
        s = slot_of[b]
        for i in range(slots.nodes[s]):
            share = slots.survival[s, i]
            bin_ = min(int((1.0 - share) * SURVIVAL_BINS), SURVIVAL_BINS - 1)
            counts[bin_] += 1
            sums[bin_] += share


@kernel
def cut_rows(slot_of: Any, slots: Any, bins: int, out: Any) -> None:
    """How many of each row's nodes lie in the ``bins`` surest bins: [B] int64 into ``out``."""
    for b in range(len(slot_of)):
        s = slot_of[b]
        kept = 0
        while kept < slots.nodes[s]:
            bin_ = min(int((1.0 - slots.survival[s, kept]) * SURVIVAL_BINS), SURVIVAL_BINS - 1)
            if bin_ >= bins:
                break
            kept += 1
        out[b] = kept

"""Numba kernels that draft for all requests of a batch in one call: ragged chains, zero allowed."""

from __future__ import annotations

from typing import Any

import numpy as np

from tascade.draft.ngram.candidates import (
    CORPUS,
    KEPT_VOTERS,
    SHARD_BITS,
    ends_answer,
    gather,
    new_scratch,
    source_kind,
)
from tascade.draft.ngram.mixer import probability, survive
from tascade.draft.ngram.tree_search import update_calibration
from tascade.index.lookup import DEPTH, HASH_BITS, MAX_LEVELS, chain_extend, shard_tokens
from tascade.util.jit import inner, lean

SURVIVAL_BINS = 64
LEAST = 0.02
LEAST_SHARE = 0.1
QUORUM = 12
REACH = 16
_MANY = 32


def new_batch_work(nodes: int) -> tuple[Any, ...]:
    """Working memory of :func:`draft_rows`."""
    return (
        np.empty(nodes + DEPTH, np.int32),
        np.empty(nodes + DEPTH, np.int32),
        np.arange(-1, nodes - 1, dtype=np.int32),
        np.zeros(nodes, np.int8),
        new_scratch(0),
    )


@inner
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


@inner
def _agreed(shards: Any, token: int, above: int, row: int, scratch: Any, found: Any) -> int:
    """The one candidate below ``token`` where the corpus's voters all say the same; else nothing.

    Most tokens of a templated answer are such: no other source needs to be asked, and the cost is
    a read for each voter. Returns how many candidates were written, 0 or 1.
    """
    voters, held = scratch[7], scratch[8]
    if above < 0 or held[above, MAX_LEVELS] == 0:
        return 0
    said, total, levels = -1, 0, held[above, MAX_LEVELS]
    for level in range(levels):
        kept = 0
        for i in range(min(held[above, level], KEPT_VOTERS)):
            voter = voters[above, level, i]
            tokens = shard_tokens(shards, voter >> SHARD_BITS)
            p = voter & ((1 << SHARD_BITS) - 1)
            if p + 1 >= len(tokens) or tokens[p] != token:
                continue
            following = tokens[p + 1]
            if following < 0 or (total > 0 and following != said):
                return 0
            said = following
            voters[row, level, kept] = voter + 1
            kept += 1
            total += 1
        held[row, level] = kept
        if level == 0 and kept < min(held[above, 0], QUORUM):
            return 0
    if total < QUORUM:
        return 0
    share = 0.0
    for level in range(levels - 1, -1, -1):
        if held[row, level]:  # Witten-Bell, with one distinct token
            share = (held[row, level] + share) / (held[row, level] + 1.0)
    match = held[above, MAX_LEVELS + 1] + 1
    held[row, MAX_LEVELS], held[row, MAX_LEVELS + 1] = levels, match
    found[0][0] = said
    found[1][0, :] = 0.0
    found[1][0, CORPUS] = share
    found[2][:] = 0
    found[2][CORPUS] = min(match, DEPTH)
    return 1


@inner
def _grow_chain(
    limit: int,
    floor: float,
    end_tokens: Any,
    sources: Any,
    sizes: Any,
    mixer: Any,
    out: Any,
    memo: Any,
    work: Any,
    above: int,
) -> int:
    """Draft the likeliest chain of at most ``limit`` tokens, down to survival ``floor``.

    ``sizes``: lengths of the two reversed contexts in ``work``; ``above``: the row whose voters
    stand before the last token, or -1. Returns the number of nodes.
    """
    tokens, survival, kinds, raw = out
    memo_tokens, memo_shares, memo_match, memo_used = memo
    output_window, request_window, scratch = work
    _, weights, final, path, odds = mixer
    nodes = len(output_window) - DEPTH
    product, least, n = 1.0, 1.0, 0
    bar = max(LEAST, floor)
    memo_used[0] = 0
    while n < limit:
        rc, rx = output_window[nodes - n :], request_window[nodes - n :]
        nc, nx = min(DEPTH, sizes[0] + n), min(DEPTH, sizes[1] + n)
        parent = n - 1 if n else above
        found = (memo_tokens[n], memo_shares[n], memo_match[n])
        used = _agreed(sources[0], rc[0], parent, n, scratch, found)
        if used == 0:
            cut = min(0.4, max(LEAST_SHARE, 0.4 * bar / product))
            used = gather(sources, rc, nc, rx, nx, cut, scratch, found, (n, parent, REACH))
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
        kinds[n] = source_kind(memo_shares[n, best])
        n += 1
        memo_used[n] = 0
        output_window[nodes - n] = token
        request_window[nodes - n] = token
        if ends_answer(token, end_tokens):
            break
    return n


@inner
def _stands_at(new: Any, n_nodes: int, draft: Any, used: Any) -> int:
    """The row of the last draft that all new tokens but the last led to, or -1."""
    depth = len(new) - 1
    if n_nodes < 0 or depth < 0 or depth > n_nodes:
        return -1
    for i in range(depth):
        if draft[i] != new[i]:
            return -1
    return depth if used[depth] > 0 else -1


@inner
def _keep_voters(voters: Any, held: Any, row: int) -> int:
    """Move the voters of ``row`` to the spare row, where the next draft finds them."""
    spare = len(held) - 1
    for i in range(held.shape[1]):
        held[spare, i] = held[row, i]
    for level in range(MAX_LEVELS):
        for i in range(min(held[row, level], KEPT_VOTERS)):
            voters[spare, level, i] = voters[row, level, i]
    return spare


@inner
def _draft_row(
    row: Any,
    n: int,
    s: int,
    slots: Any,
    tasks: Any,
    end_tokens: Any,
    plan: Any,
    work: Any,
    many: bool,
) -> None:
    """Take in one row's new tokens, learn from its last draft, and draft anew."""
    shards, begins, appended, stages = tasks
    cells, weights, final, path, odds = stages
    limit, floor, length_limit = plan
    task = slots.task[s]
    recent = (
        appended[0][task],
        appended[1][task],
        appended[2][task],
        appended[3][task],
        appended[4],
    )
    mixer = (cells[task], weights[task], final[task], path[task], odds[task])
    out = (slots.draft[s], work[2], slots.survival[s], slots.kinds[s], slots.raw[s])
    memo = (slots.memo_tokens[s], slots.memo_shares[s], slots.memo_match[s], slots.memo_used[s])
    new = row[slots.known[s] : n]
    above = -1
    if slots.nodes[s] >= 0:
        if not many or slots.known[s] % 2 == 0:  # half of many teach enough
            update_calibration(new, slots.nodes[s], out, mixer, memo, work[3])
        above = _stands_at(new, slots.nodes[s], slots.draft[s], slots.memo_used[s])
    slots.nodes[s], slots.given[s] = -1, 0
    slots.known[s] = chain_extend(
        slots.tokens[s], slots.previous[s], slots.table[s], slots.known[s], new, HASH_BITS
    )
    room = min(limit, length_limit - n - 1)
    if room <= 0 or ends_answer(row[n - 1], end_tokens):
        return
    scratch = (*work[4][:7], slots.voters[s], slots.held[s])
    if above >= 0:
        above = _keep_voters(slots.voters[s], slots.held[s], above)
    context = (slots.tokens[s], slots.previous[s], slots.table[s], n, HASH_BITS)
    similar = (
        slots.example_tokens[s],
        slots.example_previous[s],
        slots.example_table[s],
        slots.example_length[s],
        HASH_BITS,
    )
    nodes = len(work[2])
    nc = _window(slots.tokens[s], slots.prompt[s], n, True, nodes, work[0])
    nx = _window(slots.tokens[s], 0, n, False, nodes, work[1])
    slots.nodes[s] = _grow_chain(
        room,
        floor,
        end_tokens,
        (shards[begins[task] : begins[task + 1]], recent, similar, context),
        (nc, nx),
        mixer,
        (out[0], out[2], out[3], out[4]),
        memo,
        (work[0], work[1], scratch),
        above,
    )


@lean
def draft_rows(
    ids: Any,
    lengths: Any,
    slot_of: Any,
    slots: Any,
    tasks: Any,
    end_tokens: Any,
    plan: Any,
    work: Any,
    counts: Any,
    sums: Any,
) -> None:
    """Take in each row's new tokens, learn from its last draft, and draft anew.

    ``ids``, ``lengths`` as in :func:`match_rows`; ``slot_of``: [B], each row's slot, below 0 for
    none. ``tasks``: (shard table of all tasks, where each task's shards begin [P + 1], hash chains
    of documents not yet in a shard and the calibrations' arrays, both stacked over tasks, the
    latter updated in place). ``plan``: (most nodes for a row, 0 for none; least survival; most
    tokens of a request). Nothing is drafted after an end token (``end_tokens``). Drafts are left in
    the slots; ``counts`` and ``sums`` [SURVIVAL_BINS] tell the nodes and their survival summed, the
    surest bin first.
    """
    counts[:] = 0
    sums[:] = 0.0
    many = len(slot_of) > _MANY
    for b in range(len(slot_of)):
        s = slot_of[b]
        if s < 0:
            continue
        _draft_row(ids[b], lengths[b], s, slots, tasks, end_tokens, plan, work, many)
        for i in range(slots.nodes[s]):
            counts[_bin(slots.survival[s, i])] += 1
            sums[_bin(slots.survival[s, i])] += slots.survival[s, i]


@inner
def _bin(survival: float) -> int:
    return min(int((1.0 - survival) * SURVIVAL_BINS), SURVIVAL_BINS - 1)


@lean
def best_rate(
    rows: int,
    counts: Any,
    sums: Any,
    trust: float,
    sizes: Any,
    seconds: Any,
    more: float,
) -> tuple[int, float]:
    """How many survival bins give the most tokens a second, and that rate.

    ``counts``, ``sums`` as in :func:`draft_rows`; ``trust``: share of the survival that comes true;
    ``sizes``, ``seconds``: [n], a step's cost by drafted tokens; ``more``: seconds besides.
    """
    best, top = 1, 0.0
    drafted, promised, at = 0, 0.0, 0
    for i in range(len(counts)):
        drafted += counts[i]
        promised += sums[i]
        while at + 2 < len(sizes) and sizes[at + 1] < drafted:
            at += 1
        share = min(1.0, (drafted - sizes[at]) / (sizes[at + 1] - sizes[at]))
        cost = seconds[at] + share * (seconds[at + 1] - seconds[at]) + more
        rate = (rows + trust * promised) / cost
        if rate > top:
            best, top = i + 1, rate
    return best, top


@lean
def cut_rows(slot_of: Any, slots: Any, bins: int, drafts: Any, ends: Any) -> int:
    """Keep each row's nodes in the ``bins`` surest bins.

    Their tokens go to ``drafts`` [N], one row's behind the other's, and where each row's end to
    ``ends`` [B]. Returns how many there are in all.
    """
    total = 0
    for b in range(len(slot_of)):
        s, n = slot_of[b], 0
        if s >= 0:
            while n < slots.nodes[s] and _bin(slots.survival[s, n]) < bins:
                drafts[total + n] = slots.draft[s, n]
                n += 1
            slots.given[s] = n
        total += n
        ends[b] = total
    return total

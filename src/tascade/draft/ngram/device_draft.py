"""Triton: drafts made on the device, a program for each request, nothing waits for the host.

What :func:`tascade.draft.ngram.batch_kernels.draft_rows` drafts for a request it has not seen
before, token for token and with the same odds. It learns nothing: the calibration is what it was
given.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tascade.draft.ngram import mixer
from tascade.draft.ngram.batch_kernels import LEAST, LEAST_SHARE, QUORUM
from tascade.draft.ngram.candidates import MAX_CANDIDATES, SOURCES, STRONG
from tascade.draft.ngram.device_votes import (
    _DEPTH,
    _KEPT,
    _LANES,
    _LEVELS,
    _at,
    _blended,
    _chain_votes,
    _following,
    _inherited,
    _search,
    _slot,
    constant,
)

_CANDIDATES = constant(MAX_CANDIDATES)
_QUORUM = constant(QUORUM)
_CLIP = constant(6.0)
_STEPS, _GRID = constant(mixer.FINAL_BUCKETS - 1.0), constant(mixer.FINAL_BUCKETS - 2)
_MATCHES, _SHARES = constant(mixer.MATCH_BUCKETS), constant(mixer.SHARE_BUCKETS)
WEIGHTS = SOURCES * mixer.MATCH_BUCKETS * mixer.SHARE_BUCKETS
FINAL = WEIGHTS + mixer.WEIGHT_SETS * (SOURCES + 1)
_WEIGHTS, _FINAL, _PATH = (
    constant(WEIGHTS),
    constant(FINAL),
    constant(FINAL + 2 * mixer.FINAL_BUCKETS),
)
_LEAST = constant(LEAST)
_LEAST_SHARE = constant(LEAST_SHARE)
_STRONG = constant(STRONG)


@triton.jit
def _merged(tokens, shares, used, pool, offered, found, least):
    """Add one source's tokens to the candidates, the strong ones first, as ``candidates.gather``.

    ``tokens`` [8] and what this source says of each, ``shares`` [8]; ``pool``, ``offered`` [64] its
    tokens and their shares.
    """
    place, lane = tl.arange(0, _CANDIDATES), tl.arange(0, _LANES)
    for weak in tl.static_range(2):
        bar = tl.maximum(least, _STRONG)
        if weak:
            bar = tl.where(least < _STRONG, least, 2.0)
        open_ = (lane < found) & (offered > bar)
        left = tl.sum(open_.to(tl.int32), 0)
        while left > 0:
            first = tl.min(tl.where(open_, lane, _LANES), 0)
            open_ = open_ & (lane > first)
            left -= 1
            token = _at(pool, lane, first)
            tokens, used, mine = _slot(tokens, place, used, token, _CANDIDATES)
            shares = tl.where(mine, _at(offered, lane, first), shares)
    # A token another source offers may sit lower here: its share still is evidence.
    same = (tokens[:, None] == pool[None, :]) & (lane < found)[None, :]
    lower = tl.sum(tl.where(same, offered[None, :], 0.0), 1)
    shares = tl.where((place < used) & (shares == 0.0), lower, shares)
    return tokens, shares, used


@triton.jit
def _finished(mixed, table):
    """The rate that a table [25, 2] of (hits, trials) has for log-odds, as ``mixer._finish``."""
    at = (mixed + _CLIP) * _STEPS / (2.0 * _CLIP)
    i = tl.minimum(at.to(tl.int32), _GRID)
    f = at - i.to(tl.float64)
    low = tl.load(table + 2 * i) / tl.load(table + 2 * i + 1)
    high = tl.load(table + 2 * i + 2) / tl.load(table + 2 * i + 3)
    return low * (1.0 - f) + high * f


@triton.jit
def _clipped(x):
    return tl.minimum(tl.maximum(x, -_CLIP), _CLIP)


@triton.jit
def _evidence(odds, shares, match, source: tl.constexpr):
    """A source's log-odds for each candidate [8]: by its match length and its share."""
    match = match.to(tl.int32)
    long = tl.where(match < 17, 12, tl.where(match < 24, 13, tl.where(match < 32, 14, 15)))
    row = tl.where(match <= 10, match, tl.where(match < 13, 11, long))
    share = tl.minimum(1 + (shares * 10.0).to(tl.int32), 10)
    sure = tl.where(shares > 0.97, 12, tl.where(shares > 0.93, 11, share))
    return tl.load(odds + (source * _MATCHES + row) * _SHARES + tl.where(shares <= 0.0, 0, sure))


@triton.jit
def _rated(used, shares0, shares1, shares2, match0, match1, match2, odds):
    """The calibrated probability of each candidate [8], as ``mixer.probability``; 0 for none."""
    mask = (match0 > 0).to(tl.int32) + 2 * (match1 > 0).to(tl.int32) + 4 * (match2 > 0).to(tl.int32)
    row = odds + _WEIGHTS + mask * 4
    x = tl.zeros([_CANDIDATES], tl.float64) + tl.load(row + 3)
    x += tl.where(match0 > 0, tl.load(row) * _evidence(odds, shares0, match0, 0), 0.0)
    x += tl.where(match1 > 0, tl.load(row + 1) * _evidence(odds, shares1, match1, 1), 0.0)
    x += tl.where(match2 > 0, tl.load(row + 2) * _evidence(odds, shares2, match2, 2), 0.0)
    return tl.where(tl.arange(0, _CANDIDATES) < used, _finished(_clipped(x), odds + _FINAL), 0.0)


@triton.jit
def _survival(raw, path):
    """Survival of a token whose path's probabilities multiply to ``raw``, as ``mixer.survive``."""
    p = tl.minimum(tl.maximum(raw, 0.0025), 0.9975)
    return _finished(_clipped(tl.log(p / (1.0 - p))), path)


@triton.jit
def _agreed(shards, voters, active, levels, token):
    """Whether all voters that go on say the same, as ``batch_kernels._agreed``.

    Returns (whether, what they say, its share, who is left of them).
    """
    rows = tl.arange(0, 4)
    goes_on, following = _following(shards, voters, active, token)
    most = tl.max(tl.max(tl.where(goes_on, following, -2), 1), 0)
    least = tl.min(tl.min(tl.where(goes_on, following, 2147483647), 1), 0)
    kept = tl.sum(goes_on.to(tl.int32), 1)
    first = tl.sum(tl.where(rows == 0, kept, 0), 0)
    before = tl.sum(((rows == 0)[:, None] & active).to(tl.int32))
    agreed = (levels > 0) & (most == least) & (least >= 0) & (tl.sum(kept, 0) >= _QUORUM)
    share = tl.zeros((), tl.float64)
    for i in tl.static_range(_LEVELS):
        n = tl.sum(tl.where(rows == _LEVELS - 1 - i, kept, 0), 0).to(tl.float64)
        share = tl.where(n > 0, (n + share) / (n + 1.0), share)
    return agreed & (first >= tl.minimum(before, _QUORUM)), most, share, goes_on


@triton.jit
def _shifted(window, token):
    """A reversed context [32] with one more token."""
    k = tl.arange(0, _DEPTH)
    return tl.where(k == 0, token, tl.gather(window, tl.maximum(k - 1, 0), 0))


@triton.jit
def _votes(shards, ns, rc, nc, voters, active, levels, reached):
    """The corpus's votes: of those who voted for the last token, or where too few did, by search.

    Returns pool, counts, totals and used, and for the token below: voters, who of them counts,
    levels and the longest match.
    """
    token = _at(rc, tl.arange(0, _DEPTH), 0)
    pool, counts, totals, used, places, left, enough = _inherited(shards, voters, active, token)
    if enough & (levels > 0):
        voters, active, reached = places, left, reached + 1
    else:
        pool, counts, totals, used, levels, reached, voters, held = _search(shards, ns, rc, nc)
        # What more than that many voted cannot be taken along.
        kept = tl.where(tl.max(held, 0) <= _KEPT, held, 0)
        levels = tl.where(tl.max(held, 0) <= _KEPT, levels, 0)
        active = tl.arange(0, _LANES)[None, :] < kept[:, None]
    return pool, counts, totals, used, voters, active, levels, reached


@triton.jit
def _offered(shards, ns, rc, nc, rx, nx, own, examples, voters, active, levels, reached, cut):
    """All sources' candidates for the next token, as ``candidates.gather``.

    ``own``, ``examples``: the request's tokens and its examples', each (pointer, length). Returns
    the tokens [8], each source's shares [8] and longest match, how many there are, and the voters
    as :func:`_votes`.
    """
    place = tl.arange(0, _CANDIDATES)
    tokens = tl.full([_CANDIDATES], -1, tl.int32)
    shares0 = tl.zeros([_CANDIDATES], tl.float64)
    shares1, shares2 = shares0, shares0
    match1, match2 = tl.zeros((), tl.int32), tl.zeros((), tl.int32)
    used = tl.zeros((), tl.int32)
    token = _at(rc, tl.arange(0, _DEPTH), 0)
    agreed, said, share, left = _agreed(shards, voters, active, levels, token)
    if agreed:
        voters, active, reached = voters + 1, left, reached + 1
        tokens = tl.where(place == 0, said, tokens)
        shares0 = tl.where(place == 0, share, shares0)
        used += 1
    else:
        pool, counts, totals, found, voters, active, levels, reached = _votes(
            shards, ns, rc, nc, voters, active, levels, reached
        )
        offered = _blended(counts, totals, found)
        tokens, shares0, used = _merged(tokens, shares0, used, pool, offered, found, cut)
        pool, offered, found, match1 = _chain_votes(examples[0], examples[1], rc, nc)
        tokens, shares1, used = _merged(tokens, shares1, used, pool, offered, found, cut)
        pool, offered, found, match2 = _chain_votes(own[0], own[1], rx, nx)
        tokens, shares2, used = _merged(tokens, shares2, used, pool, offered, found, cut)
    match0 = tl.minimum(reached, _DEPTH).to(tl.int32)
    shares, matches = (shares0, shares1, shares2), (match0, match1, match2)
    return tokens, shares, matches, used, voters, active, levels, reached


@triton.jit
def _likeliest(tokens, rates):
    """(the likeliest candidate, its share of the whole where that is above 1, its probability)."""
    place = tl.arange(0, _CANDIDATES)
    top = tl.max(rates, 0)
    best = tl.min(tl.where(rates == top, place, _CANDIDATES), 0)
    total = tl.zeros((), tl.float64)
    for i in tl.static_range(_CANDIDATES):  # in the order in which the numba kernel adds
        total += _at(rates, place, i)
    return _at(tokens, place, best), top / tl.maximum(total, 1.0), top


@triton.jit
def _among(token, ends):
    return tl.max((ends == token).to(tl.int32), 0) > 0


@triton.jit
def _contexts(row, n, output):
    """The request's last tokens and its output's, reversed [32], each with its length."""
    k = tl.arange(0, _DEPTH)
    rx = tl.load(row + n - 1 - k, mask=k < n, other=-2)
    rc = tl.where(k < output, rx, -1)
    return rx, tl.minimum(n, _DEPTH).to(tl.int32), rc, tl.minimum(output + 2, _DEPTH).to(tl.int32)


@triton.jit
def _counted(given, tallies, new, made):
    """Note how many tokens a request's draft has, and what became of the one before."""
    if new > 0:
        before = tl.load(given)
        tl.atomic_add(tallies, 1)
        tl.atomic_add(tallies + 1, before.to(tl.int64))
        tl.atomic_add(tallies + 2, tl.minimum(new - 1, before).to(tl.int64))
    tl.store(given, made)


@triton.jit
def draft_kernel(
    ids,
    ids_stride,
    states,
    lengths,
    prompts,
    fresh,
    shards,
    ns,
    examples,
    examples_stride,
    example_lengths,
    calibration,
    ends,
    drafts,
    odds,
    given,
    tallies,
    longest,
    vocabulary,
    K: tl.constexpr,
    ENDS: tl.constexpr,
):
    """Draft at most ``K`` tokens for each row [B].

    ids: [R, L] int32, the requests' tokens; states: [B] int64, each row's place in it; lengths,
    prompts: [R] int32, how many there are, and of them the prompt; fresh: [B] int32, nothing is
    drafted where it is 0. shards: [S, 6] int64, addresses and lengths. examples: [R, E] int32,
    example_lengths: [R] int32. calibration: odds, weights, final and path, float64. ends: [ENDS]
    int32, padded. drafts: [B, K] int64, a place without a draft gets the row's last token; odds:
    [B, K] float32, how likely each is right where all before it are, 0 without a draft; given: [R]
    int32, how many places of its row are drafts. tallies: [3] int64, to which rows, tokens drafted
    before, and accepted of them, are added. longest: most tokens of a request; vocabulary: a row
    whose last tokens are not below it is left alone.
    """
    b = tl.program_id(0)
    k = tl.arange(0, _DEPTH)
    state = tl.load(states + b)
    n = tl.load(lengths + state).to(tl.int64)
    row = ids + state * ids_stride
    rx, nx, rc, nc = _contexts(row, n, n - tl.load(prompts + state).to(tl.int64))
    last = _at(rx, k, 0)
    end_tokens = tl.load(ends + tl.arange(0, ENDS))
    strange = tl.max(((k < n) & ((rx < 0) | (rx >= vocabulary))).to(tl.int32), 0)
    room, new = tl.minimum(longest - n - 1, K), tl.load(fresh + b)
    alive = (new > 0) & (n > 0) & (strange == 0) & (room > 0) & (_among(last, end_tokens) == 0)
    own = (row, n.to(tl.int32))
    shown = (examples + state * examples_stride, tl.load(example_lengths + state))

    voters = tl.zeros([4, _LANES], tl.int64)
    active = voters > 0
    levels, made, reached = tl.zeros((), tl.int32), tl.zeros((), tl.int32), tl.zeros((), tl.int64)
    product, least = tl.full((), 1.0, tl.float64), tl.full((), 1.0, tl.float64)
    while alive:
        cut = tl.minimum(0.4, tl.maximum(_LEAST_SHARE, 0.4 * _LEAST / product))
        tokens, shares, matches, used, voters, active, levels, reached = _offered(
            shards, ns, rc, nc, rx, nx, own, shown, voters, active, levels, reached, cut
        )
        rates = _rated(used, *shares, *matches, calibration)
        chosen, share, top = _likeliest(tokens, rates)
        product = product * share
        before = least
        least = tl.minimum(least, _survival(product, calibration + _PATH))
        alive = (top > 0.0) & (least >= _LEAST)
        if alive:
            tl.store(drafts + b * K + made, chosen.to(tl.int64))
            tl.store(odds + b * K + made, (least / before).to(tl.float32))
            made += 1
            rc, nc = _shifted(rc, chosen), tl.minimum(nc + 1, _DEPTH)
            rx, nx = _shifted(rx, chosen), tl.minimum(nx + 1, _DEPTH)
            alive = (made < room) & (_among(chosen, end_tokens) == 0)
    _counted(given + state, tallies, new, made)
    for i in range(made, K):
        tl.store(drafts + b * K + i, tl.maximum(last, 0).to(tl.int64))  # who reads it embeds it
        tl.store(odds + b * K + i, 0.0)

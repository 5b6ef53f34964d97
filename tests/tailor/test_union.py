"""The union head: everybody's rows in one product, and each request sees its own alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tascade.errors import ConfigError
from tascade.tailor import head as union
from tascade.tailor.head import BatchHead
from tascade.tailor.offload.table import RowTable

V, D = 400, 8
STATIC = [*range(0, 90, 3), 399]


def table(dtype: torch.dtype = torch.float32, width: int = D) -> RowTable:
    rows = torch.randn(V, width, generator=torch.Generator().manual_seed(1))
    return RowTable.from_tensor(rows.to(dtype))


def states(n: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(n, D, generator=torch.Generator().manual_seed(2)).to(dtype)


def seen(head: BatchHead, request_id: int) -> set[int]:
    """The tokens that a request has, by what it can say."""
    wide = head.scatter(head(states(1)), [request_id])
    return set(torch.nonzero(wide[0] > -torch.inf)[:, 0].tolist())


def buffers(head: BatchHead) -> list[int]:
    rows = head._rows
    return [t.data_ptr() for t in (rows.matrix, rows.bias, rows.ids, head._hidden)]


# --- against a model of sets --------------------------------------------------------------------

TOKENS = st.one_of(
    st.lists(st.integers(0, V - 1), max_size=60),
    st.lists(st.integers(100, 115), max_size=12),  # tokens that come back
)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("join"), TOKENS),
        st.tuples(st.just("extend"), st.integers(0, 99), TOKENS),
        st.tuples(st.just("leave"), st.integers(0, 99)),
        st.tuples(st.just("fail"), st.integers(0, 99), st.sampled_from([-1, V, V + 9])),
    ),
    max_size=25,
)


class Model:
    """What the head should be: a set of tokens for each request."""

    def __init__(self, biased: bool) -> None:
        self.full = table()
        self.bias = torch.arange(V) / 100.0 if biased else None
        self.head = BatchHead(self.full, STATIC, bias=self.bias, spare=4)
        self.sets: dict[int, set[int]] = {}

    def step(self, kind: str, *given: object) -> None:
        head, sets = self.head, self.sets
        held = set(STATIC).union(*sets.values())
        before = self.full.rows_read
        if kind == "join":
            tokens: Sequence[int] = given[0]  # type: ignore[assignment]
            request_id = head.add_request(tokens)
            assert request_id not in sets
            sets[request_id] = {*STATIC, *tokens}
            assert self.full.rows_read - before <= len(set(tokens) - held)
            return
        if not sets:
            return
        request_id = sorted(sets)[int(given[0]) % len(sets)]  # type: ignore[call-overload]
        if kind == "leave":
            head.remove_request(request_id)
            del sets[request_id]
        elif kind == "fail":
            for call in (
                lambda bad: head.add_request(bad),
                lambda bad: head.extend(request_id, bad),
            ):
                with pytest.raises(ConfigError, match="not of this vocabulary"):
                    call([1, 2, given[1], 5])
        else:
            tokens = given[1]  # type: ignore[assignment]
            assert head.extend(request_id, tokens) == len(set(tokens) - sets[request_id])
            sets[request_id] |= set(tokens)
            assert self.full.rows_read - before <= len(set(tokens) - held)

    def check(self) -> None:
        head, request_ids = self.head, [*self.sets, *list(self.sets)[:1]]
        hidden = states(len(request_ids))
        logits = head(hidden)
        assert len(head.ids) == len(set(STATIC).union(*self.sets.values()))
        assert len(head.ids) <= logits.shape[1] == head.length
        wanted = torch.nn.functional.linear(hidden, self.full.rows, self.bias)
        for row, request_id in enumerate(request_ids):
            rest = np.setdiff1d(np.arange(V), sorted(self.sets[request_id]))
            wanted[row, rest] = -torch.inf
        found = head.scatter(logits, request_ids)
        torch.testing.assert_close(found, wanted)
        assert torch.equal(found == -torch.inf, wanted == -torch.inf)
        assert head.argmax(logits, request_ids) == found.argmax(-1).tolist()
        for request_id, tokens in self.sets.items():
            assert {t for t in range(V) if head.has(request_id, t)} == tokens


@settings(max_examples=60)
@given(STEPS, st.booleans())
def test_each_request_sees_what_a_set_of_its_own_would_hold(steps: list, biased: bool) -> None:
    model = Model(biased)
    for step in steps:
        model.step(*step)
        model.check()
    for request_id in list(model.sets):
        model.head.remove_request(request_id)
    assert len(model.head.ids) == model.head.length == model.head.static == len(STATIC)
    request_id = model.head.add_request([])
    assert seen(model.head, request_id) == set(STATIC)


# --- rows ---------------------------------------------------------------------------------------


def test_a_row_is_read_once_however_many_need_it() -> None:
    full = table()
    head = BatchHead(full, STATIC)
    assert full.rows_read == len(STATIC)
    a = head.add_request([200, 201, 201, 0])
    b = head.add_request([200, 201, 202])
    assert full.rows_read == len(STATIC) + 3
    head.remove_request(a)
    assert seen(head, b) == {*STATIC, 200, 201, 202}
    c = head.add_request([200])
    assert full.rows_read == len(STATIC) + 3
    head.remove_request(b)
    head.remove_request(c)
    assert head.length == head.static
    d = head.add_request([202, 201, 200, 199])  # nobody has put another in their places meanwhile
    assert full.rows_read == len(STATIC) + 4
    assert seen(head, d) == {*STATIC, 199, 200, 201, 202}
    torch.testing.assert_close(
        head.scatter(head(states(1)), [d])[:, 200:203], (states(1) @ full.rows.T)[:, 200:203]
    )


def test_the_place_of_a_token_that_nobody_has_is_used_again() -> None:
    full = table()
    head = BatchHead(full, STATIC, spare=0)
    room = head._rows.capacity - len(STATIC)
    first, second = np.arange(100, 100 + room), np.arange(250, 250 + room)
    head.remove_request(head.add_request(first))
    where = buffers(head)
    before = full.rows_read
    request_id = head.add_request(second)
    assert full.rows_read - before == room
    assert seen(head, request_id) == {*STATIC, *second.tolist()}
    head.remove_request(request_id)
    before = full.rows_read
    assert seen(head, head.add_request(first)) == {*STATIC, *first.tolist()}
    assert full.rows_read - before == room  # the second ones lay where they had been
    assert buffers(head) == where


def test_a_row_moves_down_rather_than_be_read_again_or_make_the_head_long() -> None:
    full = table()
    head = BatchHead(full, STATIC)
    long, short = head.add_request(range(100, 190)), head.add_request([300, 301, 302])
    head.remove_request(long)
    assert head.length == len(STATIC) + 93  # a request that is there keeps its places
    head.remove_request(short)
    before = full.rows_read
    again = head.add_request([302, 300])
    assert full.rows_read == before
    assert head.length == len(STATIC) + 2
    assert seen(head, again) == {*STATIC, 300, 302}
    wanted = (states(1) @ full.rows.T)[:, [300, 302]]
    torch.testing.assert_close(head.scatter(head(states(1)), [again])[:, [300, 302]], wanted)


def test_what_a_row_left_behind_when_it_moved_is_not_seen() -> None:
    full = table()
    head = BatchHead(full, STATIC)
    first, second, third = (
        head.add_request([200, 203]),
        head.add_request([250]),
        head.add_request([300]),
    )
    head.remove_request(first)
    head.remove_request(second)
    again = head.add_request([250])  # moves below a gap that it leaves; the third is still above
    assert head.length == len(STATIC) + 4
    wide = head.scatter(head(states(2)), [again, third])
    torch.testing.assert_close(wide[0, 250], (states(2) @ full.rows.T)[0, 250])
    assert seen(head, again) == {*STATIC, 250}
    assert seen(head, third) == {*STATIC, 300}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_is_allocated_while_what_requests_bring_fits(dtype: torch.dtype) -> None:
    head = BatchHead(table(), STATIC, bias=torch.zeros(V), dtype=dtype, spare=200)
    where = buffers(head)
    rng = np.random.default_rng(3)
    present: list[int] = []
    for _ in range(60):
        if len(present) == 8:
            head.remove_request(present.pop(0))
        present.append(head.add_request(rng.integers(0, V, 20)))
        head.extend(present[0], rng.integers(0, V, 2))
    assert buffers(head) == where


def test_more_rows_and_more_requests_than_there_was_room_for() -> None:
    full, bias = table(), torch.arange(V) / 10.0
    head = BatchHead(full, [1, 2], bias=bias, spare=8)
    with torch.inference_mode():
        request_ids = [head.add_request(range(at, at + 20)) for at in range(0, V - 20, 19)]
    assert len(request_ids) > 16
    assert len(head.ids) > 300
    for at, request_id in zip(range(0, V - 20, 19), request_ids, strict=True):
        assert seen(head, request_id) == {1, 2, *range(at, at + 20)}
        wanted = torch.nn.functional.linear(states(1), full.rows, bias)[:, at : at + 20]
        found = head.scatter(head(states(1)), [request_id])[:, at : at + 20]
        torch.testing.assert_close(found, wanted)
    for request_id in request_ids:
        head.remove_request(request_id)
    assert head.extend(head.add_request([7]), [7, 8]) == 1  # also outside the mode it grew in
    assert len(head.ids) == 4


def test_a_row_that_cannot_be_read_is_nobodys(monkeypatch: pytest.MonkeyPatch) -> None:
    full = table()
    head = BatchHead(full, STATIC)
    other = head.add_request([250])

    def fails(ids: object, out: object = None) -> torch.Tensor:
        raise OSError("the disk is gone")

    with monkeypatch.context() as patch:
        patch.setattr(full, "gather", fails)
        for take in (lambda: head.add_request([300, 301]), lambda: head.extend(other, [300])):
            with pytest.raises(OSError, match="disk"):
                take()
    assert len(head.ids) == len(STATIC) + 1
    assert seen(head, other) == {*STATIC, 250}
    assert seen(head, head.add_request([300])) == {*STATIC, 300}
    head.remove_request(other)


# --- choices ------------------------------------------------------------------------------------


def equal_rows(width: int = D) -> RowTable:
    """A table whose tokens come in groups of ten with the same row."""
    rows = table(width=width).rows[: V // 10].repeat_interleave(10, 0)
    return RowTable.from_tensor(rows.contiguous())


def test_of_equals_the_lowest_token_is_best_wherever_its_row_is() -> None:
    head = BatchHead(equal_rows(), [395, 203])
    a = head.add_request([207, 201, 15])
    b = head.add_request([204, 202, 11, 19])
    c = head.add_request([391, 390])
    request_ids = [a, b, c, b, a, c] * 4
    logits = head(states(len(request_ids)))
    wanted = head.scatter(logits, request_ids).argmax(-1)
    assert head.argmax(logits, request_ids) == wanted.tolist()
    shown = head._masked(logits, request_ids)
    found = union._argmax_on_device(shown, head._rows.ids[: head.length])
    assert torch.equal(found, wanted)
    assert {201, 202} <= set(wanted.tolist())


def test_best_of_odd_logits_is_what_argmax_makes_of_them() -> None:
    head = BatchHead(table(), [395, 203])
    a, b = head.add_request([207, 201]), head.add_request([12, 13])
    nan, inf = torch.nan, torch.inf
    rows = torch.tensor(
        [[1.0, 1.0, 2.0, 2.0, 9.0, 9.0], [nan] * 6, [-inf] * 6, [inf, 0, inf, 0, 0, 0]]
    )
    for row in (*rows, rows[0] * -1):
        for request_id in (a, b):
            wanted = int(head.scatter(row[None], [request_id]).argmax())
            assert head.argmax(row[None], [request_id]) == [wanted]
            shown = head._masked(row[None], [request_id])
            assert union._argmax_on_device(shown, head._rows.ids[:6]).tolist() == [wanted]
    both = head.scatter(rows[:2], [a, a]).argmax(-1).tolist()
    assert head.argmax(rows[:2], [a, a]) == both  # an equal pair and no number are two and none


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    full = table(dtype)
    head = BatchHead(full, STATIC)
    request_ids = [head.add_request([200, 201]), head.add_request([201, 390])]
    logits = head(states(2, dtype))
    assert logits.dtype == dtype
    wide = head.scatter(logits, request_ids)
    assert wide.dtype == torch.float32
    wanted = torch.nn.functional.linear(states(2, dtype), full.rows).float()
    torch.testing.assert_close(wide[1, [201, 390]], wanted[1, [201, 390]], rtol=1e-2, atol=1e-2)
    assert head.argmax(logits, request_ids) == wide.argmax(-1).tolist()


def test_a_head_without_static_rows_and_a_request_without_tokens() -> None:
    head = BatchHead(table(), [], spare=4)
    assert head.static == head.length == 0
    empty = head.add_request([])
    assert head.argmax(head(states(1)), [empty]) == [0]
    assert (head.scatter(head(states(1)), [empty]) == -torch.inf).all()
    other = head.add_request([9, 8])
    logits = head(states(2))
    assert head.argmax(logits, [empty, other])[0] == 0
    assert head.argmax(logits, [empty, other])[1] in (8, 9)


def test_states_of_any_shape() -> None:
    head = BatchHead(table(), STATIC)
    head.add_request([200])
    flat = head(states(6))
    assert flat.shape == (6, head.length)
    torch.testing.assert_close(head(states(6).view(2, 3, D)), flat.view(2, 3, -1))


def test_a_ticket_that_nobody_has_is_refused() -> None:
    head = BatchHead(table(), STATIC)
    gone, there = head.add_request([200]), head.add_request([201])
    head.remove_request(gone)
    logits = head(states(1))
    for use in (
        lambda: head.remove_request(gone),
        lambda: head.extend(gone, [5]),
        lambda: head.has(gone, 5),
        lambda: head.scatter(logits, [gone]),
        lambda: head.argmax(logits, [gone]),
    ):
        with pytest.raises(ConfigError, match="no request has this request_id"):
            use()
    with pytest.raises(ConfigError, match="each row of logits is somebody's"):
        head.argmax(logits, [there, there])
    assert not head.has(there, 200)
    assert not head.has(there, V)
    with pytest.raises(ConfigError, match="not of this vocabulary"):
        BatchHead(table(), [3, V])

"""The tailored head: rows come and go, and nothing of a request stays."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from tascade.decode.deferral import Deferral
from tascade.decode.lacking import Lacking
from tascade.errors import ConfigError
from tascade.vocab.head import TailoredHead
from tascade.vocab.table import RowTable

V, D = 5000, 24


def table(dtype: torch.dtype = torch.float32) -> RowTable:
    rows = torch.randn(V, D, generator=torch.Generator().manual_seed(1))
    return RowTable.from_tensor(rows.to(dtype))


def states(n: int = 3, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(n, D, generator=torch.Generator().manual_seed(2)).to(dtype)


def wide(head: TailoredHead, hidden: torch.Tensor) -> torch.Tensor:
    return head.spread(head(hidden))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("biased", [False, True])
def test_logits_by_token_id_are_the_full_heads(dtype: torch.dtype, biased: bool) -> None:
    full, kept = table(dtype), [4999, 7, 7, 0, 311]
    bias = torch.arange(V, dtype=dtype) / V if biased else None
    head = TailoredHead(full, kept, bias=bias)
    head.begin(np.asarray([12, 7, 4998], np.int32))
    wanted = torch.nn.functional.linear(states(dtype=dtype), full.rows, bias)
    found = wide(head, states(dtype=dtype))
    has = sorted({*kept, 12, 4998})
    assert sorted(head.ids.tolist()) == has
    torch.testing.assert_close(found[:, has], wanted[:, has].float(), rtol=1e-2, atol=1e-2)
    rest = np.setdiff1d(np.arange(V), has)
    assert (found[:, rest] == -torch.inf).all()


def test_a_request_costs_the_rows_it_adds_and_the_next_one_nothing() -> None:
    full = table()
    head = TailoredHead(full, range(3000), spare=512)
    assert full.rows_read == 3000
    buffers = head._rows.matrix.data_ptr(), head._rows.ids.data_ptr()
    for _ in range(5):
        before = full.rows_read
        head.begin(np.arange(2900, 3400, dtype=np.int32))
        assert full.rows_read - before == 400
        assert head.extend([3399, 3400, 3401, 5]) == 2
        assert full.rows_read - before == 402
        assert head.length == 3402
    head.begin(np.empty(0, np.int32))
    assert head.length == head.static == 3000
    assert full.rows_read == 3000 + 5 * 402
    found = head._rows.matrix.data_ptr(), head._rows.ids.data_ptr()
    assert found == buffers  # nothing was allocated
    assert 3400 not in head
    assert 2999 in head


def test_more_rows_than_there_was_room_for() -> None:
    full = table()
    head = TailoredHead(full, [1, 2], spare=8)
    head.begin(np.arange(0, V, dtype=np.int32))
    wanted = states() @ full.rows.T
    torch.testing.assert_close(wide(head, states()), wanted)
    head.begin(np.asarray([3], np.int32))
    assert sorted(head.ids.tolist()) == [1, 2, 3]


def test_room_grows_with_what_requests_bring_and_not_with_the_list() -> None:
    head = TailoredHead(table(), range(4000), spare=64)
    head.begin(np.arange(4000, 4200, dtype=np.int32))
    assert 4200 <= head._rows.capacity < 4600
    before = head._rows.matrix.data_ptr()
    head.begin(np.arange(4100, 4300, dtype=np.int32))
    assert head._rows.matrix.data_ptr() == before


@pytest.mark.parametrize("bad", [[-1], [V], [3, V + 7]])
def test_an_id_that_is_not_of_the_table_changes_nothing(bad: list[int]) -> None:
    head = TailoredHead(table(), [1, 2])
    with pytest.raises(ConfigError, match="not of this vocabulary"):
        head.extend(bad)
    assert head.ids.tolist() == [1, 2]
    assert 3 not in head
    with pytest.raises(ConfigError, match="not of this vocabulary"):
        TailoredHead(table(), bad)


def test_what_lies_in_the_room_is_not_seen() -> None:
    head = TailoredHead(table(), [1, 2])
    head.begin(np.asarray([70], np.int32))
    high = wide(head, states())[:, 70]
    head.begin(np.asarray([71], np.int32))
    assert (wide(head, states())[:, 70] == -torch.inf).all()
    assert (high > -torch.inf).all()


def test_room_made_while_checking_serves_later_requests_too() -> None:
    # A check runs in inference mode, whose tensors nobody outside may write to.
    head = TailoredHead(table(), [1, 2], spare=8)
    with torch.inference_mode():
        head.extend(np.arange(2000))
    head.begin(np.asarray([3, 4], np.int32))
    assert sorted(head.ids.tolist()) == [1, 2, 3, 4]
    torch.testing.assert_close(wide(head, states())[:, 1:5], (states() @ table().rows.T)[:, 1:5])


def test_a_bias_that_is_a_parameter_is_not_recorded_for_a_backward_pass() -> None:
    bias = torch.nn.Parameter(torch.arange(V, dtype=torch.float32))
    head = TailoredHead(table(), [1, 2], bias=bias)
    for _ in range(3):
        head.begin(np.arange(50, dtype=np.int32))
    assert not head(states()).requires_grad


# --- how many guesses ---------------------------------------------------------------------------


def play(
    deferral: Deferral,
    rounds: int,
    full: float,
    *,
    small: float = 1.0,
    missing: float = 0.0,
    check: Callable[[int], float] | None = None,
    seed: int = 0,
) -> list[int]:
    """Decode with steps and checks that cost this, and a share of tokens missing: its plans."""
    rng, plans = np.random.default_rng(seed), []
    for _ in range(rounds):
        plans.append(deferral.plan())
        if not plans[-1]:
            deferral.stepped(1, full, int(rng.random() < missing))
            continue
        for _ in range(plans[-1]):
            deferral.guessed(1, small)
        wrong = np.flatnonzero(rng.random(plans[-1]) < missing)
        right = int(wrong[0]) if len(wrong) else plans[-1]
        spent = (check or deferral.check)(plans[-1])
        deferral.checked(right, bool(len(wrong)), plans[-1], spent)
    return plans


def usual(plans: list[int]) -> int:
    """What it plans in most rounds of the last hundred."""
    return int(np.median(plans[-100:]))


def flat(rows: int) -> float:
    """A check that costs as much as three steps, and hardly more for many states."""
    return 3.0 + 0.01 * rows


def test_the_rarer_the_misses_the_more_is_guessed() -> None:
    shares = (0.0, 0.02, 0.1, 0.3, 1.0)
    plans = [usual(play(Deferral(flat, most=64), 2000, 4.0, missing=m)) for m in shares]
    assert plans[0] == 64
    assert plans == sorted(plans, reverse=True)
    assert plans[1] > plans[3]
    assert plans[-1] <= 1


def test_nothing_is_guessed_where_the_full_head_costs_next_to_nothing() -> None:
    for each in (0.001, 1.0):
        cost = lambda rows, each=each: each * rows  # noqa: E731
        plans = play(Deferral(cost, most=64), 2000, 1.0 + each, missing=0.05)
        assert plans[:6] == [0] * 6  # what a step with the full head costs is found out first
        assert sum(plan > 0 for plan in plans) < 25
        assert usual(plans) == 0


def test_it_guesses_again_when_misses_have_become_rare() -> None:
    deferral = Deferral(flat, most=32)
    plans = play(deferral, 2000, 4.0, missing=0.95)
    assert plans[-1000:] == [0] * 1000
    assert usual(play(deferral, 4000, 4.0)) > 4
    assert deferral.again().rate == 0.01


def test_one_slow_step_is_not_what_steps_cost() -> None:
    deferral = Deferral(flat, most=32)
    plan = usual(play(deferral, 500, 4.0, missing=0.01))
    deferral.guessed(1, 500.0)
    assert deferral.plan() == plan > 0


def test_a_machine_that_slows_down_slows_both_ways() -> None:
    deferral = Deferral(flat, most=32)
    for times in (1.0, 1.5, 0.7, 2.0):
        slow = lambda rows, times=times: times * flat(rows)  # noqa: E731
        plans = play(deferral, 300, 1.4 * times, small=times, check=slow)
        assert plans.count(0) < 40


def test_the_full_head_is_timed_again_now_and_then() -> None:
    deferral = Deferral(flat, most=32)
    assert usual(play(deferral, 500, 4.0)) > 8
    plans = play(deferral, 3000, 1.02)  # the full head has become cheap
    assert 3 < plans[:100].count(0) < 10
    assert plans[-300:].count(0) > 290


def test_guessing_is_tried_again_where_it_once_seemed_slow() -> None:
    deferral = Deferral(flat, most=32)
    play(deferral, 6, 2.0)
    plans = play(deferral, 1, 2.0, small=6.0)  # something else had the machine
    assert plans == [8]
    plans = play(deferral, 3000, 2.0)
    assert plans[:20] == [0] * 20
    assert plans[-100:].count(0) < 10


def test_checks_that_cost_more_than_foretold_are_done_less_often() -> None:
    plans = []
    for times in (1.0, 6.0):
        deferral = Deferral(flat, most=64)
        cost = lambda rows, times=times: times * flat(rows)  # noqa: E731
        plans.append(usual(play(deferral, 1500, 8.0, missing=0.03, check=cost)))
    assert 0 < plans[0] < plans[1]


@pytest.mark.parametrize(("missing", "guesses"), [(0.03, False), (0.001, True)])
def test_drafts_give_a_step_as_many_tokens_with_either_head(missing: float, guesses: bool) -> None:
    """A step's tokens vary far more than what the heads save: they are not to decide by chance."""
    rng = np.random.default_rng(3)
    deferral = Deferral(lambda states: 0.3 + 0.02 * states, most=32, rate=missing)
    plans = []
    for _ in range(2000):
        plans.append(deferral.plan())
        made = int(rng.integers(1, 12))
        if not plans[-1]:
            deferral.stepped(made, 5.5, int((rng.random(made) < missing).sum()))
            continue
        deferral.guessed(made, 5.0)
        while made < plans[-1]:
            step = int(rng.integers(1, 12))
            made += step
            deferral.guessed(step, 5.0)
        right = int(min(rng.geometric(missing) - 1, made))
        deferral.checked(right, right < made, made, 0.3 + 0.02 * made)
    assert (np.mean(np.asarray(plans[200:]) > 0) > 0.8) == guesses
    assert (np.mean(np.asarray(plans[200:]) == 0) > 0.8) == (not guesses)


def test_what_was_lacking_longest_ago_goes_first() -> None:
    lacking = Lacking(most=3)
    lacking.add([1, 2, 3])
    lacking.saw([1, 7])
    lacking.add([4])
    assert lacking.tokens == [3, 1, 4]
    lacking.add([3, 5])
    assert lacking.tokens == [4, 3, 5]


def test_no_guesses_where_none_are_allowed() -> None:
    assert Deferral(flat, most=0).plan() == 0

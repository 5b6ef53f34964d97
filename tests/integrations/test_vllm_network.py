"""What decides between the network's drafts and the outputs' in vLLM; needs no vLLM."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tascade.draft.neural.export import DEPTH
from tascade.draft.neural.network import DraftNetwork, DraftShape
from tascade.draft.neural.stored import DrafterInfo, StoredDrafter
from tascade.errors import ConfigError
from tascade.integrations.vllm_network import NetworkAccount, check_loaded, join
from tascade.testing import tiny_model

STEP = 10e-3


def account(share: float, seconds: float) -> NetworkAccount:
    made = NetworkAccount([share] * DEPTH)
    for _ in range(50):
        made.took(seconds * (DEPTH + 1), DEPTH)
    return made


def depths(made: NetworkAccount, promises: list[float], steps: int) -> list[int]:
    return [made.depth([(p, 8 if p else 0) for p in promises], step) for _ in range(steps)]


def step(tokens: int) -> float:
    return STEP + 0.1e-3 * tokens


def test_a_good_network_drafts_deep_where_the_outputs_promise_nothing() -> None:
    made = account(0.9, 0.2e-3)
    assert set(depths(made, [0.0], 20)) == {DEPTH}
    assert set(depths(made, [8.0], 20)) == {0}
    # Of many requests some that have no draft are reason enough, where a pass costs little.
    assert depths(made, [8.0, 0.0, 0.0, 0.0], 1) == [DEPTH]


def test_a_network_that_takes_longer_than_it_saves_is_hardly_ever_asked() -> None:
    dear = account(0.5, 8e-3)
    asked = depths(dear, [0.0], 300)
    assert 0 < sum(depth > 0 for depth in asked) <= 5
    assert sum(depth > 0 for depth in depths(account(0.5, 0.1e-3), [0.0], 300)) == 300


def test_it_learns_from_what_became_of_its_drafts() -> None:
    made = account(0.9, 2e-3)
    before = made.worth
    for _ in range(600):
        made.judge([5, 6, 7, 8], [9])
    assert made.worth[DEPTH] < 0.2 < before[DEPTH]
    assert sum(depth > 0 for depth in depths(made, [0.0], 300)) <= 5
    for _ in range(2000):
        made.judge([5, 6, 7, 8], [5, 6, 7, 8, 9])
    assert made.worth[DEPTH] > 3.5
    assert set(depths(made, [0.0], 10)) == {DEPTH}
    assert (made.drafted, made.accepted) == (4 * 2600, 4 * 2000)


@pytest.fixture
def stored() -> StoredDrafter:
    ids = torch.arange(3, 43)
    shape = DraftShape.of(tiny_model("llama", 0).config, len(ids))
    tensors = DraftNetwork(shape).state_dict()
    return StoredDrafter(shape, DrafterInfo("", "", 1, 1, 1, 1, 1, (0.5,), 1.0), ids, tensors)


def loaded(stored: StoredDrafter, **changes: Any) -> Any:
    norm = SimpleNamespace(weight=changes.get("norm", stored.tensors["norm.weight"]))
    offsets = changes.get("offsets", stored.ids - torch.arange(len(stored.ids)))
    return SimpleNamespace(draft_id_to_target_id=offsets, model=SimpleNamespace(norm=norm))


def test_what_vllm_loaded_is_compared_with_the_pack(stored: StoredDrafter) -> None:
    taps = list(stored.shape.taps)
    check_loaded(loaded(stored), taps, stored)
    half = stored.tensors["norm.weight"].to(torch.bfloat16)
    check_loaded(loaded(stored, norm=half), taps, stored)
    planted: list[tuple[dict[str, Any], list[int], str]] = [
        ({}, [tap + 1 for tap in taps], "other states"),
        ({"offsets": None}, taps, "other tokens"),
        ({"offsets": torch.zeros(40, dtype=torch.long)}, taps, "other tokens"),
        ({"norm": stored.tensors["norm.weight"] + 1}, taps, "other weights"),
    ]
    for changes, where, named in planted:
        with pytest.raises(ConfigError, match=named):
            check_loaded(loaded(stored, **changes), where, stored)


@pytest.mark.parametrize(
    ("padded", "workers", "named"),
    [(True, 1, "disable_padded_drafter_batch"), (False, 2, "one worker only")],
)
def test_what_cannot_draft_together_is_refused(padded: bool, workers: int, named: str) -> None:
    runner = SimpleNamespace(
        speculative_config=SimpleNamespace(disable_padded_drafter_batch=not padded),
        parallel_config=SimpleNamespace(world_size=workers),
    )
    with pytest.raises(ConfigError, match=named):
        join(runner, None)

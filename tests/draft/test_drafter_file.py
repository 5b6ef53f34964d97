"""A drafter's file: what was written is read, and what is no drafter of this model is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tascade.draft.neural.network import DraftNetwork, DraftShape
from tascade.draft.neural.stored import DrafterInfo, load_drafter, save_drafter, weights_mark
from tascade.errors import FingerprintError, PackError, TascadeError
from tascade.testing import tiny_model

IDS = torch.arange(3, 43)
MARK = "a tokenizer"


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("llama", 0)


@pytest.fixture
def file(model: Any, tmp_path: Path) -> Path:
    network = DraftNetwork(DraftShape.of(model.config, len(IDS)))
    info = DrafterInfo(weights_mark(model), MARK, 10, 1000, 10, 6, 5, (0.5, 0.25), 0.99)
    path = tmp_path / "drafter.safetensors"
    save_drafter(path, network, IDS, info, torch.float32)
    return path


def test_what_was_written_is_read(model: Any, file: Path) -> None:
    network, ids, info = load_drafter(file, model, MARK)
    assert torch.equal(ids, IDS)
    assert (info.acceptance, info.coverage, info.rows) == ((0.5, 0.25), 0.99, 10)
    again = file.with_name("again.safetensors")
    save_drafter(again, network, ids, info, torch.float32)
    for name, weight in load_file(file).items():
        assert torch.equal(weight, load_file(again)[name]), name
    taps = torch.randn(1, 3, len(network.shape.taps) * network.shape.hidden)
    assert torch.isfinite(network.fuse(taps)).all()
    assert network.turns.device.type == "cpu"  # no weight of the file


def test_another_model_is_refused_by_what_is_other(model: Any, file: Path) -> None:
    with pytest.raises(FingerprintError, match="another tokenizer"):
        load_drafter(file, model, "another")
    trained = tiny_model("llama", 0)
    with torch.no_grad():
        trained.model.layers[1].mlp.up_proj.weight[0, 3] += 0.5
    with pytest.raises(FingerprintError, match="other weights"):
        load_drafter(file, trained, MARK)
    assert weights_mark(tiny_model("llama", 0).to(torch.bfloat16)) == weights_mark(
        tiny_model("llama", 0).to(torch.bfloat16).float()
    )


def change(file: Path, **changes: Any) -> None:
    """Write the file anew with other header fields, shape fields or tensors."""
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        about = dict(opened.metadata())
    tensors = load_file(file)
    for name, value in changes.items():
        kind, _, part = name.partition("__")
        if kind in ("shape", "info"):
            body = json.loads(about[kind])
            body[part] = value
            about[kind] = json.dumps(body)
        elif kind == "about":
            about[part] = value
        elif value is None:
            del tensors[part.replace("__", ".")]
        else:
            tensors[part.replace("__", ".")] = value
    save_file(tensors, file, about)


@pytest.mark.parametrize(
    "changes",
    [
        {"about__format": "other"},
        {"about__version": "2"},
        {"about__shape": "[" * 50_000},
        {"about__info": "3"},
        {"shape__hidden": 2**40},
        {"shape__hidden": 48},
        {"shape__vocabulary": 41},
        {"shape__vocabulary": -1},
        {"shape__heads": 3},
        {"shape__taps": [0, 0, 1]},
        {"shape__taps": "all"},
        {"shape__theta": float("nan")},
        {"shape__epsilon": -1.0},
        {"shape__extra": 1},
        {"info__rows": "many"},
        {"info__acceptance": [0.1, None]},
        {"info__canary": 5},
        {"info__canary": {"rows": [], "right": 0.5}},
        {"info__canary": {"rows": [[1, [1, 2, 3]]] * 9, "right": 0.5}},
        {"info__canary": {"rows": [[1, [1, 2, 3]]]}},
        {"info__canary": {"rows": [[2, [1, 2, 3]]], "right": 0.5}},
        {"info__canary": {"rows": [[0, [1, 2, 3]]], "right": 0.5}},
        {"info__canary": {"rows": [[1, [1, 2, -3]]], "right": 0.5}},
        {"info__canary": {"rows": [[1, [1, 2, 10**9]]], "right": 0.5}},
        {"info__canary": {"rows": [[1, [1, 2, "3"]]], "right": 0.5}},
        {"info__canary": {"rows": [[1, [1, 2, 3], 4]], "right": 0.5}},
        {"info__canary": {"rows": [[1, [1] * 10_000]], "right": 0.5}},
        {"info__canary": {"rows": [[1, [1, 2, 3]]], "right": float("nan")}},
        {"tensor__ids": IDS.flip(0)},
        {"tensor__ids": IDS + 1_000_000},
        {"tensor__ids": IDS - 10},
        {"tensor__ids": IDS.float()},
        {"tensor__ids": IDS[:-1]},
        {"tensor__ids": None},
        {"tensor__fc__weight": None},
        {"tensor__fc__weight": torch.zeros(3, 3)},
        {"tensor__fc__weight": torch.zeros(64, 192, dtype=torch.int64)},
        {"tensor__odd": torch.zeros(1)},
    ],
    ids=str,
)
def test_what_is_no_drafter_is_refused(model: Any, file: Path, changes: dict[str, Any]) -> None:
    change(file, **changes)
    with pytest.raises(PackError, match="cannot read the trained drafter"):
        load_drafter(file, model, MARK)


def test_layers_that_the_model_has_not_are_refused(model: Any, file: Path) -> None:
    change(file, shape__taps=[0, 99])
    with pytest.raises(PackError, match="states that this model has not"):
        load_drafter(file, model, MARK)


@settings(
    deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_damaged_bytes_never_do_more_than_raise(
    model: Any, file: Path, data: st.DataObject
) -> None:
    whole = file.read_bytes()
    place = data.draw(st.integers(0, min(len(whole) - 1, 3000)))
    what = data.draw(st.sampled_from(["cut", "flip", "nothing"]))
    part = file.with_name("damaged.safetensors")
    if what == "cut":
        part.write_bytes(whole[:place])
    elif what == "flip":
        part.write_bytes(whole[:place] + bytes([whole[place] ^ 0x5A]) + whole[place + 1 :])
    else:
        part.write_bytes(b"")
    try:
        network, ids, info = load_drafter(part, model, MARK)
    except TascadeError:
        return
    assert ids.shape == (network.shape.vocabulary,)
    assert replace(info, rows=0).rows == 0

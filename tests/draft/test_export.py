"""A drafter as other engines read it: what was written fits, and what is wrong is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from tascade import bundled
from tascade.cli import verbs as cli
from tascade.draft.neural.export import CONFIG, WEIGHTS, export_drafter
from tascade.draft.neural.network import DraftNetwork, DraftShape
from tascade.draft.neural.stored import DrafterInfo, save_drafter, weights_mark
from tascade.errors import ConfigError, FingerprintError, PackError
from tascade.load import load_model
from tascade.pack import Pack

IDS = torch.arange(40, 240, 2)


@pytest.fixture(scope="module")
def model() -> Any:
    return load_model(bundled.model_path())


@pytest.fixture(scope="module")
def pack(model: Any, ticket_pack: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("export") / "tickets"
    Pack.open(ticket_pack).copy_to(out)
    opened, torch_model = Pack.open(out), model[0]
    torch.manual_seed(0)
    network = DraftNetwork(DraftShape.of(torch_model.config, len(IDS)))
    mark = weights_mark(torch_model)
    info = DrafterInfo(mark, opened.info.fingerprint, 10, 99, 10, 6, 5, (0.5, 0.25), 0.99)
    save_drafter(opened.drafter, network, IDS, info, torch_model.dtype)
    return out


@pytest.fixture
def exported(pack: Path, model: Any, tmp_path: Path) -> Path:
    folder = tmp_path / "eagle3"
    made = export_drafter(pack, folder, model=model[:2])
    assert made.acceptance == (0.5, 0.25)
    export_drafter(pack, folder, model=model[:2], check=True)
    return folder


def test_the_verb_writes_what_it_checks(pack: Path, tmp_path: Path) -> None:
    folder = tmp_path / "by-verb"
    run = CliRunner()
    for more in ([], ["--check"], ["--num-speculative-tokens", "3"]):
        result = run.invoke(cli.app, ["export", str(pack), "-o", str(folder), "--json", *more])
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)["acceptance"] == [0.5, 0.25]
    config = json.loads((folder / CONFIG).read_text())
    method = config["speculators_config"]["proposal_methods"][0]
    assert method["speculative_tokens"] == 3
    places = load_file(folder / WEIGHTS)["d2t"] + torch.arange(len(IDS))
    assert torch.equal(places, IDS)


def tensors(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        held = load_file(folder / WEIGHTS)
        change(held)
        save_file(held, folder / WEIGHTS, {"format": "pt"})

    return edit


def entries(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        held = json.loads((folder / CONFIG).read_text())
        change(held)
        (folder / CONFIG).write_text(json.dumps(held))

    return edit


PLANTED: dict[str, tuple[Callable[[Path], None], str]] = {
    "taps one layer later": (
        entries(
            lambda held: held.update(
                eagle_aux_hidden_state_layer_ids=[
                    tap + 1 for tap in held["eagle_aux_hidden_state_layer_ids"]
                ]
            )
        ),
        "eagle_aux_hidden_state_layer_ids",
    ),
    "no taps": (
        entries(lambda held: held.pop("eagle_aux_hidden_state_layer_ids")),
        "eagle_aux_hidden_state_layer_ids",
    ),
    "the other order of norms": (
        entries(lambda held: held.update(norm_before_residual=True)),
        "norm_before_residual",
    ),
    "another base of turns": (
        entries(
            lambda held: held["transformer_layer_config"]["rope_parameters"].update(rope_theta=5.0)
        ),
        "rope_theta",
    ),
    "no list of tokens": (tensors(lambda held: held.pop("d2t")), "d2t"),
    "tokens in another order": (
        tensors(lambda held: held.update(d2t=held["d2t"].flip(0).contiguous())),
        "d2t",
    ),
    "another token": (tensors(lambda held: held["d2t"].add_(1)), "d2t"),
    "a tensor too many": (tensors(lambda held: held.update(more=held["d2t"].clone())), "more"),
    "another width": (
        tensors(lambda held: held.update({"lm_head.weight": torch.zeros(3, 4)})),
        "lm_head",
    ),
    "no config": (lambda folder: (folder / CONFIG).unlink(), "cannot read"),
    "half the weights": (
        lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:9000]),
        "cannot read",
    ),
    "a list for a config": (lambda folder: (folder / CONFIG).write_text("[1]"), "architectures"),
}


@pytest.mark.parametrize("planted", PLANTED)
def test_a_folder_that_is_not_the_packs_is_refused_by_what_is_wrong(
    pack: Path, model: Any, exported: Path, planted: str
) -> None:
    edit, named = PLANTED[planted]
    edit(exported)
    with pytest.raises(PackError, match=named):
        export_drafter(pack, exported, model=model[:2], check=True)


def test_weights_of_another_drafter_are_refused(pack: Path, model: Any, exported: Path) -> None:
    tensors(lambda held: held["fc.weight"].add_(1.0))(exported)
    with pytest.raises(FingerprintError, match="another drafter"):
        export_drafter(pack, exported, model=model[:2], check=True)


def test_another_models_weights_are_refused(pack: Path, tmp_path: Path) -> None:
    other, tokenizer, _ = load_model(bundled.model_path())
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight[0, 3] += 0.5
    with pytest.raises(FingerprintError, match="other weights"):
        export_drafter(pack, tmp_path / "no", model=(other, tokenizer))
    assert not (tmp_path / "no").exists()


def test_nothing_else_is_replaced(
    pack: Path, ticket_pack: Path, model: Any, tmp_path: Path
) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years")
    with pytest.raises(ConfigError, match="something else"):
        export_drafter(pack, mine, model=model[:2])
    assert [path.name for path in mine.iterdir()] == ["thesis.txt"]
    with pytest.raises(PackError, match="no trained drafter"):
        export_drafter(ticket_pack, tmp_path / "none", model=model[:2])
    with pytest.raises(ConfigError, match="depth"):
        export_drafter(pack, tmp_path / "none", model=model[:2], depth=0)
    with pytest.raises(PackError, match="cannot read"):
        export_drafter(pack, tmp_path / "none", model=model[:2], check=True)

"""A pack's trained drafter in the real vLLM: by itself, and beside the task's outputs."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm_engine import engine, said

from tascade import bundled
from tascade.data.load import load_examples
from tascade.draft.neural.export import export_drafter
from tascade.pack import Pack
from tascade.train_drafter import TrainedPack, train_drafter
from vllm import SamplingParams

Prompts = list[dict[str, list[int]]]
NOTES = bundled.data_path("notes", "train")
DEPTH = 4


@pytest.fixture(scope="module")
def trained(ticket_pack: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainedPack:
    out = tmp_path_factory.mktemp("network") / "tickets"
    Pack.open(ticket_pack).copy_to(out)
    # Trained on another task than the pack's outputs are of, so that each has its requests.
    rows = list(load_examples(NOTES))
    with pytest.MonkeyPatch.context() as patch:
        worth = SimpleNamespace(pays=True)  # whether it would pay is no matter here
        patch.setattr("tascade.train_drafter.forecast_drafter", lambda *_: worth)
        made = train_drafter(out, rows[:160], held_out=rows[160:170], own=False, rounds=2)
    export_drafter(out, out.with_name("eagle3"))
    return made


def network_engine(made: TrainedPack, *, most: int, joined: bool, **options: Any) -> Any:
    folder = str(Path(made.pack).with_name("eagle3"))
    config = {"method": "eagle3", "model": folder, "num_speculative_tokens": most}
    # Nothing is compiled: two more models would take a minute each.
    given: dict[str, Any] = {"speculative_config": config, "enforce_eager": True}
    given["disable_log_stats"] = False
    if joined:
        config["disable_padded_drafter_batch"] = True  # type: ignore[assignment]
        # Whether it pays is not asked: the more is drafted, the more there is to go wrong.
        given["additional_config"] = {"tascade": {"pack": made.pack, "budget": False}}
        given["worker_extension_cls"] = "tascade.integrations.vllm.WorkerExtension"
    return engine(None, **given | options)


def accepted_by_depth(llm: Any) -> list[float]:
    """Share of vLLM's drafts that were accepted up to each depth."""
    found = {
        metric.name.removeprefix("vllm:spec_decode_num_"): metric for metric in llm.get_metrics()
    }
    drafts = found["drafts"].value
    return [count / drafts for count in found["accepted_tokens_per_pos"].values]


def test_vllm_drafts_with_the_exported_network(
    trained: TrainedPack, prompts: Prompts, plain_answers: list[list[int]]
) -> None:
    llm = network_engine(trained, most=DEPTH, joined=False)
    assert said(llm, prompts) == plain_answers
    shares = accepted_by_depth(llm)
    assert shares[0] > 0.05  # a third of the requests are of the task that it learned


def test_the_network_and_the_outputs_draft_together(
    trained: TrainedPack, prompts: Prompts, plain_answers: list[list[int]]
) -> None:
    llm = network_engine(trained, most=12, joined=True, enable_prefix_caching=True)
    for _ in range(2):
        assert said(llm, prompts) == plain_answers
    found = llm.collective_rpc("tascade_stats")[0]
    assert found["failures"] == 0
    assert found["accepted"] > 200
    assert found["network_accepted"] > 50
    drawn = SamplingParams(temperature=1.0, seed=3, max_tokens=20)
    assert all(said(llm, prompts[:12], drawn))
    assert llm.collective_rpc("tascade_stats")[0]["failures"] == 0

"""What every test shares: one thread, reproducible hypothesis runs, a pack, ../shared.

``TASCADE_TEST_DEVICE=cuda`` puts the tiny models on a GPU, for tests/equality.
"""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
_REPO = Path(__file__).resolve().parents[1]

torch.set_num_threads(1)

if _DEVICE := os.environ.get("TASCADE_TEST_DEVICE"):
    from tascade import testing

    _made_on_cpu = testing.tiny_model
    testing.tiny_model = lambda *args, **fields: _made_on_cpu(*args, **fields).to(_DEVICE)

settings.register_profile(
    "local", deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
settings.register_profile("ci", settings.get_profile("local"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")

_SHARED = _REPO.parent / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of large files beside the repository, where there is one."""
    if not _SHARED.is_dir():
        pytest.skip(f"{_SHARED} is not there")
    return _SHARED


@pytest.fixture(scope="session")
def ticket_pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float32 pack of the bundled model and the first rows of a bundled task."""
    import dataclasses

    import tascade
    from tascade import bundled

    recipe = tascade.Recipe(dtype="float32", max_new_tokens=64)
    recipe = dataclasses.replace(recipe, spec=tascade.SpecConfig(calibration_rows=12))
    out = tmp_path_factory.mktemp("packs") / "tickets"
    tascade.adapt(
        bundled.model_path(),
        bundled.data_path("tickets", "train"),
        validation=bundled.data_path("tickets", "validation"),
        out=out,
        recipe=recipe,
    )
    return out

"""What every test shares: one thread, reproducible hypothesis runs, the path of ../shared."""

import hashlib
import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
_REPO = Path(__file__).resolve().parents[1]

# Numba's cache notices a change of the file a kernel stands in, not of the files whose kernels it
# calls: after such a change it runs the old machine code, which writes past the new arrays' ends.
_sources = [p.read_bytes() for p in sorted((_REPO / "src/tascade").rglob("*.py"))]
_kernels = b"".join(text for text in _sources if b"njit" in text)
_stamp = hashlib.sha256(_kernels).hexdigest()[:12]
os.environ.setdefault("NUMBA_CACHE_DIR", str(_REPO / ".pytest_cache" / "numba" / _stamp))
torch.set_num_threads(1)

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

"""What a benchmark ran on."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from typing import Any

import tascade
from tascade.load import cpu_name


def machine_info() -> dict[str, Any]:
    """The ``machine`` object of a bench result. Loads torch only to ask for its threads."""
    import torch

    info: dict[str, Any] = {
        "cpu": cpu_name(),
        "cores": _cores(),
        "threads": torch.get_num_threads(),
        "memory_gb": _memory_gb(),
        "os": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "numpy": version("numpy"),
        "numba": version("numba"),
        "tascade": tascade.__version__,
        "load_average": _load(),
    }
    if torch.cuda.is_available():
        info["accelerator"] = torch.cuda.get_device_name()
    return info


def version(package: str) -> str | None:
    """Version of an installed distribution; None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory_gb() -> float:
    try:
        size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0.0
    return round(size / 2**30, 1)


def _load() -> list[float] | None:
    try:
        return [round(value, 2) for value in os.getloadavg()]
    except (AttributeError, OSError):
        return None

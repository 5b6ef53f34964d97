"""tascade makes a small language model fast at the one task it is used for.

Public names are loaded on first use: importing tascade imports neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_NAMES = {
    "adapt": "tascade.pipeline",
    "inspect": "tascade.forecast.inspection",
    "TaskModel": "tascade.model",
    "Recipe": "tascade.config",
    "DataConfig": "tascade.config",
    "SpecConfig": "tascade.config",
    "SamplingParams": "tascade.decode.sampling",
    "Drafter": "tascade.core",
    "DraftTree": "tascade.core",
    "Generation": "tascade.core",
    "CorpusIndex": "tascade.index.corpus",
    "TascadeError": "tascade.errors",
}

__all__ = [
    "CorpusIndex",
    "DataConfig",
    "DraftTree",
    "Drafter",
    "Generation",
    "Recipe",
    "SamplingParams",
    "SpecConfig",
    "TaskModel",
    "TascadeError",
    "__version__",
    "adapt",
    "inspect",
]

if TYPE_CHECKING:
    from tascade.config import DataConfig, Recipe, SpecConfig
    from tascade.core import Drafter, DraftTree, Generation
    from tascade.decode.sampling import SamplingParams
    from tascade.errors import TascadeError
    from tascade.forecast.inspection import inspect
    from tascade.index.corpus import CorpusIndex
    from tascade.model import TaskModel
    from tascade.pipeline import adapt


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module 'tascade' has no attribute {name!r}")
    return getattr(import_module(_NAMES[name]), name)


def __dir__() -> list[str]:
    return __all__

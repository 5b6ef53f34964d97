"""Compiling kernels: numba with a cache on disk that knows when any kernel's source changed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from numba import njit
from numba.core import caching

F = TypeVar("F", bound=Callable[..., Any])


def _stamp() -> str:
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


_STAMP = _stamp()


class _StampedCache(caching.FunctionCache):  # type: ignore[misc]
    """Keys compiled code by the sources of the whole folder.

    Numba looks at a function's own file alone, while constants and callees from other files are
    compiled into it: after a change in one of those, its cache would hand out code that writes past
    the end of arrays whose size has changed.
    """

    def _index_key(self, sig: Any, codegen: Any) -> Any:
        return (*super()._index_key(sig, codegen), _STAMP)


def kernel(function: F) -> F:
    """Compile ``function`` without Python objects, outside the GIL, cached on disk."""
    compiled: Any = njit(nogil=True)(function)
    compiled._cache = _StampedCache(function)
    return compiled  # type: ignore[no-any-return]

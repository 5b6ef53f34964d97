"""Compiling kernels: numba with a cache on disk that knows when any kernel's source changed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from numba import njit
from numba.core import caching

F = TypeVar("F", bound=Callable[..., Any])


@cache
def _stamp(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


class _StampedFiles(caching.CompileResultCacheImpl):  # type: ignore[misc]
    """Names the cache's files by the sources of the function's whole folder.

    Numba looks at a function's own file alone, while constants and callees from other files are
    compiled into it: after a change in one of those, its cache would hand out code that writes past
    the end of arrays whose size has changed. And an index left by another version is not even to be
    read: it may name classes that are gone.
    """

    def __init__(self, function: Any) -> None:
        self._folder_stamp = _stamp(Path(function.__code__.co_filename).parent)[:16]
        super().__init__(function)

    def get_filename_base(self, fullname: str, abiflags: str) -> str:
        """The beginning of the files' names."""
        return f"{super().get_filename_base(fullname, abiflags)}.{self._folder_stamp}"


class _StampedCache(caching.FunctionCache):  # type: ignore[misc]
    _impl_class = _StampedFiles


def kernel(function: F) -> F:
    """Compile ``function`` without Python objects, outside the GIL, cached on disk."""
    compiled: Any = njit(nogil=True)(function)
    compiled._cache = _StampedCache(function)
    return compiled  # type: ignore[no-any-return]

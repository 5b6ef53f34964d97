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


_PACKAGE = Path(__file__).resolve().parents[1]
_MARK = b"from tascade.util.jit import"


@cache
def _stamp(folder: Path) -> str:
    """Digest of the files in a folder that hold kernels; outside the library, of all its files."""
    inside = folder == _PACKAGE
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py") if inside else folder.glob("*.py")):
        source = path.read_bytes()
        if not inside or _MARK in source or path.name == "core.py":
            digest.update(source)
    return digest.hexdigest()


class _StampedFiles(caching.CompileResultCacheImpl):  # type: ignore[misc]
    """Names the cache's files by the sources of all kernels.

    Numba looks at a function's own file alone, while constants and callees from other files are
    compiled into it: after a change in one of those, its cache would hand out code that writes past
    the end of arrays whose size has changed. And an index left by another version is not even to be
    read: it may name classes that are gone. Files with kernels take names from such files and from
    ``core`` only (tests/test_house.py), so that no other change compiles them anew.
    """

    def __init__(self, function: Any) -> None:
        folder = Path(function.__code__.co_filename).resolve().parent
        # The library's folders share one stamp, so that its files are read once.
        self._kernel_stamp = _stamp(_PACKAGE if folder.is_relative_to(_PACKAGE) else folder)[:16]
        super().__init__(function)

    def get_filename_base(self, fullname: str, abiflags: str) -> str:
        """The beginning of the files' names."""
        return f"{super().get_filename_base(fullname, abiflags)}.{self._kernel_stamp}"


class _StampedCache(caching.FunctionCache):  # type: ignore[misc]
    _impl_class = _StampedFiles


def kernel(function: F) -> F:
    """Compile ``function`` without Python objects, outside the GIL, cached on disk."""
    compiled: Any = njit(nogil=True)(function)
    compiled._cache = _StampedCache(function)
    return compiled  # type: ignore[no-any-return]

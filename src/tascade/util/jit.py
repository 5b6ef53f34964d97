"""Compiling kernels: numba with a cache on disk that knows when any kernel's source changed.

All that `tascade warm-up` compiles takes 26 s of a CPU (64 s before, measured beside it), about
half of it LLVM's, half numba's own. What brought it down: one signature a kernel, no entry from
Python or C that nobody uses, references counted only where arrays are made. What is left: numba
links a callee into each caller, where LLVM optimises it once more, and makes machine code of it
alone, which nobody calls; neither can be turned off without numba's private classes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from numba import njit, types
from numba.core import caching
from numba.core.ccallback import CFunc
from numba.core.registry import CPUDispatcher

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


def _widened(given: Any) -> Any:
    """An argument's type without what would only make one more kernel: literals, widths of ints."""
    kind = types.unliteral(given)
    if isinstance(kind, types.BaseAnonymousTuple):
        return types.BaseTuple.from_types([_widened(part) for part in kind])
    return types.int64 if isinstance(kind, types.Integer) and kind != types.uint64 else kind


def _compiled(function: Any, **options: Any) -> Any:
    made: Any = njit(nogil=True, no_cfunc_wrapper=True, **options)(function)
    made._cache = _StampedCache(function)
    compile_for = made.compile
    made.compile = lambda given: compile_for(tuple(map(_widened, given)))
    return made


def kernel(function: F) -> F:
    """Compile ``function`` without Python objects, outside the GIL, cached on disk."""
    return _compiled(function, _nrt=True)  # type: ignore[no-any-return]


def lean(function: F) -> F:
    """As :func:`kernel`, for what makes and returns no array.

    Numba then counts no references to arrays, which are the caller's: less to compile. What makes
    an array all the same does not compile.
    """
    return _compiled(function, _nrt=False)  # type: ignore[no-any-return]


def is_compiled(function: Any) -> bool:
    """Whether a kernel's machine code, for this version of all kernels, is in the cache."""
    return Path(function._cache._cache_file._index_path).is_file()


class _Inner(CPUDispatcher):  # type: ignore[misc]
    def __call__(self, *given: Any) -> Any:
        raise TypeError(f"{self.py_func.__name__} is for kernels alone")


def inner(function: F, **options: Any) -> F:
    """As :func:`lean`, for what kernels alone call: it has no way in from Python."""
    made = _compiled(function, _nrt=False, no_cpython_wrapper=True, **options)
    made.__class__ = _Inner
    return made  # type: ignore[no-any-return]


def c_function(function: Callable[..., None], *given: Any) -> Any:
    """Compile ``function`` for callers in C, with arguments of these types, cached on disk.

    Its ``address`` is good for as long as what is returned lives.
    """
    made = CFunc(function, (given, types.void), {}, {})
    made._cache = _StampedCache(function)
    made.compile()
    return made

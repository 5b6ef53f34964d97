"""The ``.npy`` files of an index, which nobody vouches for: checked, then read or mapped."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tascade.errors import PackError

IN_MEMORY_BYTES = 64 << 20
"""An index up to this size is read when it is opened; a larger one is mapped. Where a file is cut
short under a map, the system ends the process at the next read (SIGBUS), and nothing can be caught;
64 MB a process is little beside a model, and holds the outputs of most tasks."""


def read_array(
    path: Path, dtype: np.dtype[Any], shape: tuple[int, ...], *, mapped: bool
) -> npt.NDArray[Any]:
    """One ``.npy`` file, after comparing its header and length with what is wanted; read-only.

    Args:
        path: the file.
        dtype: what its values must be.
        shape: of the array; the file must be as long as that, so that no header can ask for memory
            that the file does not take on disk.
        mapped: leave the values in the file instead of reading them.

    Raises:
        PackError: missing, of another type, shape or length.
    """
    wanted = f"a .npy file of {dtype} {list(shape)}"
    try:
        with path.open("rb") as file:
            major, minor = np.lib.format.read_magic(file)
            if (major, minor) != (1, 0):
                raise ValueError(f".npy format {major}.{minor}")
            found_shape, fortran, found_dtype = np.lib.format.read_array_header_1_0(file)
            begin, size = file.tell(), os.fstat(file.fileno()).st_size
            if found_dtype != dtype or found_shape != shape or fortran:
                raise ValueError(f"{found_dtype} {list(found_shape)}")
            length = dtype.itemsize * int(np.prod(shape, dtype=object))
            if size != begin + length or begin % 64:
                raise ValueError(f"{size} bytes, not {begin + length} aligned to 64")
            if mapped:  # as a plain array: numba reads its type faster than a memmap's
                return np.asarray(np.memmap(file, dtype, "r", begin, shape))
            values = np.fromfile(file, dtype, length // dtype.itemsize).reshape(shape)
    except Exception as error:  # numpy's header parser raises nearly anything on odd bytes
        raise PackError(
            "a file of the index is damaged",
            got=f"{type(error).__name__}: {error}"[:300],
            wanted=wanted,
            where=str(path),
            fix="rebuild the index from the task data, or restore the folder from a copy",
        ) from error
    values.flags.writeable = False
    return values

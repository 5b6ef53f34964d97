"""Files and folders: written so that nothing half-written is ever seen under the final name, and
read warily.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any

_HERE, _SWAP = -100, 2  # AT_FDCWD; RENAME_EXCHANGE, which macOS calls RENAME_SWAP


def write_atomic(path: Path, content: bytes) -> None:
    """Write to a temporary sibling, flush it to disk, then rename over ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def read_json(path: Path, most: int) -> Any:
    """Parse a JSON file that nobody vouches for.

    Args:
        path: the file.
        most: bytes that it may have, so that none can fill the memory.

    Raises:
        OSError: it cannot be read.
        ValueError: larger, nested too deeply, or not JSON.
    """
    with path.open("rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"more than {most} bytes")
    try:
        return json.loads(content)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


@contextmanager
def folder_beside(target: Path) -> Iterator[Path]:
    """An empty folder to fill, which :func:`install_folder` then gives the name ``target``.

    It is removed when the block ends, however that comes about, and so is what was replaced. Only a
    killed process leaves one, as ``.NAME.XXXXXXXX.part``: nothing reads it, no later run takes its
    name, and none deletes it, since it may be that of a process that lives. It can go by hand.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
    part.mkdir()
    try:
        yield part
    finally:
        shutil.rmtree(part, ignore_errors=True)


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder that stays where nothing fails; then it is for the caller to remove."""
    folder = Path(tempfile.mkdtemp(prefix="tascade-"))
    try:
        yield folder
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def install_folder(part: Path, target: Path) -> None:
    """Give a finished folder its final name; a folder that had it before is ``part`` afterwards.

    Whatever may be replaced is for the caller to decide. All of ``part`` is on disk before. Linux
    and macOS exchange two names in one step, so that whoever looks, also after a crash at any
    point, finds the old folder or the new one, whole. Where the system or the file system cannot
    (Windows, some network drives), the old folder is called ``<part>.old`` between two renames: a
    crash just there leaves no folder of the final name, and both of them whole beside it.

    Raises:
        OSError: the system refuses; both folders are where they were.
    """
    for folder, _, names in os.walk(part, topdown=False):
        for name in names:
            sync_folder(Path(folder, name))
        sync_folder(Path(folder))
    if not os.path.lexists(target):
        os.rename(part, target)
    elif not _exchange(part, target):
        old = part.with_name(f"{part.name}.old")
        os.rename(target, old)
        try:
            os.rename(part, target)
        except BaseException:
            os.rename(old, target)
            raise
        os.rename(old, part)
    sync_folder(target.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step; whether that was done."""
    names = os.fsencode(one), os.fsencode(other)
    try:
        if sys.platform == "linux":
            failed = ctypes.CDLL(None).renameat2(_HERE, names[0], _HERE, names[1], _SWAP)
        elif sys.platform == "darwin":
            failed = ctypes.CDLL(None).renamex_np(*names, _SWAP)
        else:
            return False
    except (OSError, AttributeError):  # a C library without it
        return False
    return int(failed) == 0


def sync_folder(path: Path) -> None:
    """Make a rename inside ``path`` durable, or what a file holds, where the platform can."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)


def remove_folder(path: Path, process: int) -> None:
    """Remove a folder that ``process`` made, and no fork of it: for ``weakref.finalize``."""
    if os.getpid() == process:
        shutil.rmtree(path, ignore_errors=True)


def without_folders(name: str) -> str:
    """The last part of a path that begins at the root, at home or above; others as they are."""
    outside = os.path.isabs(name) or name.startswith((".", "~"))
    return PurePath(name).name if outside else name


def checksum(body: dict[str, Any]) -> str:
    """sha256 of a manifest's fields, however they are ordered and spaced."""
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()

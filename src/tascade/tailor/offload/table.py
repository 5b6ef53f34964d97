"""The rows of a vocabulary table, where they lie: in the checkpoint, or in a loaded model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tascade.errors import ConfigError
from tascade.tailor.offload.checkpoint import Checkpoint

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

Ids = Sequence[int] | npt.NDArray[np.integer[Any]] | torch.Tensor


class RowTable:
    """The rows of a 2-D tensor [V, d] in host memory, or mapped from a safetensors checkpoint.

    A mapped table costs no memory of its own: pages come from the file when a row is asked for,
    and the system may drop them again. The file must stay as it is while the table is in use.

    Attributes:
        rows: all of it [V, d], as one tensor over that memory; not to be written to.
        rows_read: how many rows :meth:`gather` has read.

    Use :meth:`from_checkpoint` or :meth:`from_tensor`.
    """

    def __init__(self, rows: torch.Tensor, *, where: str) -> None:
        self.rows, self.where = rows, where
        # Rows are moved as bytes: NumPy knows no bfloat16, and need not know how they are aligned.
        self._bytes: npt.NDArray[np.uint8] = rows.view(torch.uint8).numpy()
        self.rows_read = 0

    @classmethod
    def from_checkpoint(cls, folder: str | Path | Checkpoint, name: str) -> RowTable:
        """Map a tensor of a checkpoint; nothing is copied or converted.

        Args:
            folder: of ``model.safetensors`` or of its shards and their index.
            name: of the tensor, as the file has it.

        Raises:
            ConfigError: a damaged checkpoint, no tensor of that name, one that is not 2-D, or of a
                type other than float32, float16 and bfloat16.
        """
        checkpoint = folder if isinstance(folder, Checkpoint) else Checkpoint(folder)
        where = f"{checkpoint.folder}: {name}"
        return cls(_table(checkpoint.tensor(name), where), where=where)

    @classmethod
    def from_tensor(cls, tensor: torch.Tensor) -> RowTable:
        """The rows of a tensor in host memory, which is not copied.

        Raises:
            ConfigError: as :meth:`from_checkpoint`; a tensor on a device, or not contiguous.
        """
        rows, where = tensor.detach(), "a tensor in memory"
        if rows.device.type != "cpu" or not rows.is_contiguous():
            raise _unusable(f"{tuple(rows.shape)} on {rows.device}, strides {rows.stride()}", where)
        return cls(_table(rows, where), where=where)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and width: (V, d)."""
        return self.rows.shape[0], self.rows.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """What the rows are stored in."""
        return self.rows.dtype

    @property
    def nbytes(self) -> int:
        """Size of the whole table in bytes."""
        return self.rows.nbytes

    def gather(self, ids: Ids, out: torch.Tensor | None = None) -> torch.Tensor:
        """Copy the rows of ``ids`` [n] into a tensor [n, d] on the CPU, in the stored type.

        No bit changes, no other row is read, and one thread does it: for a few thousand rows,
        waking a second costs more than it saves.

        Args:
            ids: row numbers; any may repeat. Ids on a device are brought to the host first.
            out: where to copy to: contiguous [n, d] on the CPU (pinned or not), same type.

        Raises:
            ConfigError: an id below 0 or not below V, ids that are not a list of whole numbers, or
                an ``out`` that does not fit.
        """
        numbers = self._checked(ids)
        shape = (len(numbers), self.shape[1])
        if out is None:
            out = torch.empty(shape, dtype=self.dtype)
        elif (
            out.shape != shape
            or out.dtype != self.dtype
            or out.device.type != "cpu"
            or not out.is_contiguous()
        ):
            raise ConfigError(
                "the rows do not fit into `out`",
                got=f"{list(out.shape)} of {out.dtype} on {out.device}",
                wanted=f"contiguous {list(shape)} of {self.dtype} on cpu",
            )
        target = out.view(torch.uint8).numpy()
        # "clip" never applies, the ids are checked; the default mode would copy everything twice.
        np.take(self._bytes, numbers, axis=0, out=target, mode="clip")
        self.rows_read += len(numbers)
        return out

    def blocks(self, rows: int) -> Iterator[tuple[int, torch.Tensor]]:
        """All rows in order, as views of at most ``rows`` of them: ``(first row, [n, d])``.

        Raises:
            ConfigError: ``rows`` below 1.
        """
        if rows < 1:
            raise ConfigError("a block must have rows", got=rows, wanted="1 or more")
        for start in range(0, self.shape[0], rows):
            yield start, self.rows[start : start + rows]

    def __deepcopy__(self, memo: dict[int, Any]) -> RowTable:
        """The table itself: it never changes, and is not to be in memory twice."""
        return self

    def _checked(self, ids: Ids) -> npt.NDArray[np.intp]:
        if isinstance(ids, torch.Tensor):
            ids = ids.detach().cpu().numpy()
        try:
            numbers = np.asarray(ids)
        except (ValueError, OverflowError) as error:
            raise self._bad_ids(str(error)) from error
        if numbers.ndim == 1 and not numbers.size:
            return np.empty(0, np.intp)
        if numbers.ndim != 1 or numbers.dtype.kind not in "iu":
            raise self._bad_ids(f"{numbers.ndim} dimensions of {numbers.dtype}")
        low, high = int(numbers.min()), int(numbers.max())
        if low < 0 or high >= self.shape[0]:
            raise self._bad_ids(str(low if low < 0 else high))
        return numbers.astype(np.intp, copy=False)

    def _bad_ids(self, got: str) -> ConfigError:
        return ConfigError(
            "no such row in the vocabulary table",
            got=got,
            wanted=f"a list of token ids from 0 to {self.shape[0] - 1}",
            where=self.where,
            fix="use the tokenizer that belongs to the model",
        )


def _table(rows: torch.Tensor, where: str) -> torch.Tensor:
    if rows.dim() != 2 or not rows.numel() or rows.dtype not in _DTYPES:
        raise _unusable(f"{list(rows.shape)} of {rows.dtype}", where)
    return rows


def _unusable(got: str, where: str) -> ConfigError:
    return ConfigError(
        "this tensor cannot be used as a vocabulary table",
        got=got,
        wanted="a contiguous 2-D tensor of float32, float16 or bfloat16 in host memory",
        where=where,
        fix="save the model unquantised, with save_pretrained",
    )

"""A task's index and calibration in device memory, and the kernel that drafts from them there."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from tascade.draft.ngram.batch import examples_of
from tascade.draft.ngram.device_draft import draft_kernel
from tascade.draft.ngram.request_states import EXAMPLE_TOKENS
from tascade.draft.ngram.sources import Task
from tascade.index.view import shard_table

_NO_TOKEN = -5


class DeviceDrafter:
    """Drafts for the rows of a batch on the device, from one task, without waiting for the host.

    Args:
        task: its index, calibration and examples; copied once.
        end_tokens: ids that end an answer: nothing is drafted after one.
        requests: most requests at a time.
        length: most tokens of a request.
        most: tokens drafted for a request.
        device: where the index is held and drafts are made.

    Raises:
        ConfigError: the task has more shards than one draft searches, or a shard of another layout.

    Attributes:
        bytes: what it holds on the device; ``index_bytes``: of these the task's index.
        drafts, odds: the last ones, see :meth:`draft`; for as many rows as there are requests.
    """

    def __init__(
        self,
        task: Task,
        *,
        end_tokens: Sequence[int],
        requests: int,
        length: int,
        most: int,
        device: torch.device,
    ) -> None:
        _, shards = shard_table(task.corpus)
        self._task, self._length, self._most = task, length, most
        arrays = [(shard.tokens, shard.order.view(np.int32), shard.head.view(np.int32))
                  for shard in shards]  # fmt: skip
        self._arrays = [[_copied(part, device) for part in parts] for parts in arrays]
        addresses = [[n for part in parts for n in (part.data_ptr(), len(part))]
                     for parts in self._arrays]  # fmt: skip
        table = torch.tensor(addresses or [[0] * 6], dtype=torch.int64)
        self._shards, self._count = table.to(device), len(shards)
        heads = [len(shard.head) for shard in shards]
        self._vocabulary = min(heads, default=2**31) - 2
        _, weights, final, path, odds = task.calibration.arrays()
        stages = [stage.ravel() for stage in (odds, weights, final, path)]
        self._calibration = _copied(np.concatenate(stages), device)
        ends = [*end_tokens, _NO_TOKEN]
        ends += [_NO_TOKEN] * ((1 << (len(ends) - 1).bit_length()) - len(ends))
        self._ends = torch.tensor(ends, dtype=torch.int32, device=device)
        size = EXAMPLE_TOKENS if task.similar is not None else 1
        self._examples = torch.zeros((requests, size), dtype=torch.int32, device=device)
        self._example_lengths = torch.zeros(requests, dtype=torch.int32, device=device)
        self.drafts = torch.zeros((requests, most), dtype=torch.int64, device=device)
        self.odds = torch.zeros((requests, most), dtype=torch.float32, device=device)
        self._given = torch.zeros(requests, dtype=torch.int32, device=device)
        self._totals = torch.zeros(3, dtype=torch.int64, device=device)
        self.index_bytes = sum(part.nbytes for parts in self._arrays for part in parts)
        held = (self._calibration, self._examples, self.drafts, self.odds, table)
        self.bytes = self.index_bytes + sum(tensor.nbytes for tensor in held)

    def admit(self, state: int, prompt: torch.Tensor) -> None:
        """Give a place of the request states to a new request, whose prompt [T] is on the device.

        Its examples go there; to look them up waits for the device.
        """
        self._given[state] = 0
        if self._task.similar is not None:
            ids = prompt.to(torch.int32).cpu().numpy()
            found = examples_of(self._task, ids)[-EXAMPLE_TOKENS:]
            self._examples[state, : len(found)] = torch.from_numpy(np.ascontiguousarray(found))
            self._example_lengths[state] = len(found)

    def draft(
        self,
        ids: torch.Tensor,
        states: torch.Tensor,
        lengths: torch.Tensor,
        prompts: torch.Tensor,
        fresh: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Drafts for a batch of ``B`` rows.

        Args:
            ids: [R, L] int32, the tokens of all request states.
            states: [B] int64, which of them each row is.
            lengths: [R] int32, how many tokens each state has.
            prompts: [R] int32, how many of them are its prompt.
            fresh: [B] int32, tokens just sampled for each row; 0 while its prompt is being read.

        Returns:
            Drafts [B, K] int64, filled up with the row's last token; how likely each is right where
            all before it are, :attr:`odds` [B, K] float32, 0 where it fills up. Both on the device,
            written over by the next call.
        """
        rows = len(states)
        draft_kernel[(rows,)](
            ids,
            ids.stride(0),
            states,
            lengths,
            prompts,
            fresh,
            self._shards,
            self._count,
            self._examples,
            self._examples.stride(0),
            self._example_lengths,
            self._calibration,
            self._ends,
            self.drafts,
            self.odds,
            self._given,
            self._totals,
            self._length,
            self._vocabulary,
            K=self._most,
            ENDS=len(self._ends),
            num_warps=1,
            enable_fp_fusion=False,  # the numba kernels round each product, too
        )
        return self.drafts[:rows], self.odds[:rows]

    def counted(self) -> dict[str, int]:
        """Rows drafted for, tokens drafted and verified, and accepted of them, so far."""
        rows, drafted, accepted = self._totals.tolist()
        return {"rows": rows, "drafted": drafted, "accepted": accepted}


def _copied(array: np.ndarray, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.array(array)).to(device)

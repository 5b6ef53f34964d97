"""A pack's drafts in vLLM's second model runner (``vllm.v1.worker.gpu``).

That runner has speculators in place of proposers, and refuses ``custom_class``. The worker
extension replaces the function that makes speculators (:func:`install`), one symbol, in the workers
of engines that name a pack and the method ``ngram_gpu``, and nowhere else. Two of ours:

:class:`HostSpeculator`, where vLLM schedules step by step. The rows go to the host, where the same
proposer drafts as in the first runner, and the scheduler is told how many tokens each request's
draft has (:class:`CutDrafts`), down to none where drafts do not pay.

:class:`DeviceSpeculator`, with async scheduling, where the next step is scheduled before this one's
tokens are known: the drafts are made where the tokens are, and nothing waits for the host. As many
tokens are verified as the config says, whether there is a draft or not.
"""

from __future__ import annotations

import importlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from tascade.core import IntArray
from tascade.errors import ConfigError

_log = logging.getLogger(__name__)
CARRIER = "ngram_gpu"
"""The method to name: of those that vLLM schedules ahead with the one that needs no weights."""


def uses_second_runner(config: Any) -> bool:
    """Whether an engine of this ``VllmConfig`` runs in the second model runner."""
    return bool(getattr(config, "use_v2_model_runner", False))


def check_second_runner(config: Any, packs: Sequence[str]) -> None:
    """Refuse what works in the first runner only.

    Raises:
        ConfigError: several packs, a network beside the outputs; and where vLLM schedules step by
            step, several workers, or adaptive verification.
    """
    if not uses_second_runner(config):
        return
    fix = "set VLLM_USE_V2_MODEL_RUNNER=0, or "
    if len(packs) > 1:
        raise ConfigError(
            "vLLM's second model runner does not show whose pack a request names",
            got=f"{len(packs)} packs",
            wanted="one pack",
            where="additional_config.tascade.packs",
            fix=fix + "serve each pack by an engine of its own",
        )
    if config.speculative_config.method != CARRIER:
        raise ConfigError(
            "in vLLM's second model runner a network does not draft beside a pack's outputs yet",
            got=f"method {config.speculative_config.method!r}",
            wanted=CARRIER,
            where="speculative_config",
            fix=fix + "serve the pack without --drafter",
        )
    if config.scheduler_config.async_scheduling:
        return
    if config.parallel_config.world_size > 1:
        # There drafts stay in each worker, and each would decide by its own clock.
        raise ConfigError(
            "in vLLM's second model runner several workers would draft each something else",
            got=f"{config.parallel_config.world_size} workers, no async scheduling",
            wanted="async scheduling, with which all draft the same, or one worker",
            where="parallel_config",
            fix=fix + "leave --no-async-scheduling out",
        )
    if getattr(config.speculative_config, "enable_adaptive_verification", False):
        raise ConfigError(
            "adaptive verification is for drafts made on the device",
            got="no async scheduling",
            wanted="async scheduling; without it tascade itself leaves out what does not pay",
            where="speculative_config.enable_adaptive_verification",
            fix="leave one of the two out",
        )


def install(config: Any) -> None:
    """Have this process's second runner make tascade's speculator where its proposer is named.

    Called by the worker extension as soon as the worker knows its config. Safe to call again.

    Raises:
        ConfigError: the first runner is to draft by the method that carries tascade in the second
            one, or this vLLM's second runner makes its speculators otherwise.
    """
    if config.speculative_config is None:
        return
    if not uses_second_runner(config):
        if config.speculative_config.method == CARRIER and _named(config):
            raise ConfigError(
                "vLLM's first model runner would draft by n-grams of the request, not by the pack",
                got="method ngram_gpu",
                wanted="custom_class, or vLLM's second runner",
                where="speculative_config",
                fix="set VLLM_USE_V2_MODEL_RUNNER=1, or name the proposer as `tascade serve PACK "
                "--print` does",
            )
        return
    runner: Any = importlib.import_module("vllm.v1.worker.gpu.model_runner")
    theirs = getattr(runner, "init_speculator", None)
    if theirs is None:
        raise ConfigError(
            "this vLLM's second model runner makes its speculators otherwise",
            got="no vllm.v1.worker.gpu.model_runner.init_speculator",
            wanted="the second runner of vllm 0.32 or 0.33",
            fix="set VLLM_USE_V2_MODEL_RUNNER=0",
        )
    if getattr(theirs, "__module__", "") != __name__:
        runner.init_speculator = _with_ours(theirs)


def _with_ours(theirs: Callable[..., Any]) -> Callable[..., Any]:
    def init_speculator(vllm_config: Any, device: torch.device, req_states: Any) -> Any:
        from tascade.integrations.vllm import TascadeProposer

        if vllm_config.speculative_config.method != CARRIER or not _named(vllm_config):
            return theirs(vllm_config, device, req_states)
        ahead = vllm_config.scheduler_config.async_scheduling
        kind = DeviceSpeculator if ahead else HostSpeculator
        return kind(TascadeProposer(vllm_config), vllm_config, device, req_states)

    return init_speculator


def _named(config: Any) -> bool:
    """Whether the engine is told of a pack."""
    additional = config.additional_config
    return isinstance(additional, dict) and "tascade" in additional


class _Speculator(ABC):
    """What the runner asks of a speculator (``vllm.v1.worker.gpu.spec_decode.speculator``).

    Attributes:
        tascade: the pack's proposer.
    """

    _places: torch.Tensor
    """Drafts [requests, K] on the device."""
    supports_mm_inputs = False
    draft_logits = None
    num_query_per_req, num_extra_query_per_req = 1, 0

    def __init__(self, tascade: Any, config: Any, states: Any) -> None:
        self.tascade, self._states = tascade, states
        self._most = config.speculative_config.num_speculative_tokens
        self._requests = config.scheduler_config.max_num_seqs

    def init_cudagraph_manager(self, cudagraph_mode: Any) -> None:  # noqa: B027
        """Nothing of a draft is captured. vLLM calls this."""

    def capture(self) -> None:  # noqa: B027
        """Nothing to capture. vLLM calls this."""

    @torch.inference_mode()
    def propose(
        self,
        input_batch: Any,
        attn_metadata: Any,
        slot_mappings: Any,
        last_hidden_states: Any,
        aux_hidden_states: Any,
        num_sampled: torch.Tensor,
        *others: Any,
        dummy_run: bool = False,
        **more: Any,
    ) -> torch.Tensor:
        """Drafts for a batch, as the runner asks for them.

        Of what it gives these are used: ``input_batch``, which names the rows and each one's place
        in the request states; ``num_sampled`` [B], how many tokens each row has just been given, 0
        while its prompt is being read; ``dummy_run``, whether it only warms up.

        Returns:
            [B, K] int64 on the device. A place without a draft holds the row's last token: the
            runner embeds what it finds there.
        """
        rows = input_batch.num_reqs
        if not dummy_run:
            self._draft(input_batch, num_sampled[:rows])
        return self._places[:rows]

    @abstractmethod
    def _draft(self, batch: Any, num_sampled: torch.Tensor) -> None:
        """Write a batch's drafts to the places; see :meth:`propose`."""


class HostSpeculator(_Speculator):
    """Drafts on the host: the rows go there, the drafts back.

    Attributes:
        counts: [B] how many tokens each row's last draft has; the places behind are filled.
    """

    def __init__(self, tascade: Any, config: Any, device: torch.device, states: Any) -> None:
        super().__init__(tascade, config, states)
        self.counts = list[int]()
        self._places = torch.zeros((self._requests, self._most), dtype=torch.int64, device=device)
        self._prompts = np.zeros(0, np.int64)
        tascade.bind(lambda: self._prompts)

    def _draft(self, batch: Any, num_sampled: torch.Tensor) -> None:
        rows = batch.num_reqs
        lengths, fresh, ids = self._on_host(batch, num_sampled)
        self._prompts = self._states.prompt_len.np[batch.idx_mapping_np[:rows]]
        sampled = [
            ids[row, end - new : end].tolist()
            for row, (end, new) in enumerate(zip(lengths.tolist(), fresh.tolist(), strict=True))
        ]
        drafts = self.tascade.propose(sampled, lengths, ids)
        last = ids[np.arange(rows), np.clip(lengths - 1, 0, ids.shape[1] - 1)]
        filled = np.repeat(last.astype(np.int64)[:, None], self._most, axis=1)
        for row, draft in enumerate(drafts):
            filled[row, : len(draft)] = draft
        self.counts = [len(draft) for draft in drafts]
        self._places[:rows].copy_(torch.from_numpy(filled))

    def _on_host(
        self, batch: Any, num_sampled: torch.Tensor
    ) -> tuple[IntArray, IntArray, IntArray]:
        """(tokens of each row [B], of them new [B], the rows [B, L]), int32, by one copy."""
        rows, held = batch.num_reqs, self._states.all_token_ids.gpu
        at = batch.idx_mapping[:rows].long()
        # The longest a row may be by now: what was computed in this step, and one sampled behind.
        longest = min(int(batch.seq_lens_cpu_upper_bound[:rows].max()) + 1, held.shape[1])
        parts = (self._states.total_len.gpu[at], num_sampled, held[at, :longest].flatten())
        flat = torch.cat([part.to(torch.int32) for part in parts]).cpu().numpy()
        return flat[:rows], flat[rows : 2 * rows], flat[2 * rows :].reshape(rows, longest)


class DeviceSpeculator(_Speculator):
    """Drafts on the device (:class:`tascade.draft.ngram.device.DeviceDrafter`).

    The calibration is the pack's and is not learned from; a request's examples are looked up once,
    which waits for the device once a request.

    Raises:
        ConfigError: answers are to be learned, which the host would have to see.
    """

    def __init__(self, tascade: Any, config: Any, device: torch.device, states: Any) -> None:
        super().__init__(tascade, config, states)
        if tascade.learns:
            raise ConfigError(
                "with async scheduling finished answers are not seen on the host",
                got="learn",
                wanted="no async scheduling, or no learning",
                where="additional_config.tascade.learn",
                fix="add --no-async-scheduling, or leave learn out",
            )
        from tascade.draft.ngram.device import DeviceDrafter

        self._drafter = DeviceDrafter(
            tascade.drafter.tasks[0],
            end_tokens=tascade.drafter.end_tokens.tolist(),
            requests=self._requests,
            length=config.model_config.max_model_len,
            most=self._most,
            device=device,
        )
        self._places, self._held = self._drafter.drafts, dict[int, str]()
        # The runner then leaves out, over the whole batch, the places that do not pay.
        self.enable_adaptive_verification = config.speculative_config.enable_adaptive_verification
        self.draft_token_confidence_probs = self._drafter.odds
        _log.info(
            "drafts are made on the device: %.1f MB of index and requests, %d tokens verified for "
            "every request and step",
            self._drafter.bytes / 1e6,
            self._most,
        )

    def _draft(self, batch: Any, num_sampled: torch.Tensor) -> None:
        states = self._states
        for name, at in zip(batch.req_ids, batch.idx_mapping_np.tolist(), strict=False):
            if self._held.get(at) != name:
                self._held[at] = name
                prompt = int(states.prompt_len.np[at])
                self._drafter.admit(at, states.all_token_ids.gpu[at, :prompt])
        self._drafter.draft(
            states.all_token_ids.gpu,
            batch.idx_mapping[: batch.num_reqs].long(),
            states.total_len.gpu,
            states.prompt_len.gpu,
            num_sampled,
        )

    def own_stats(self) -> dict[str, int]:
        """What was drafted and accepted so far; waits for the device."""
        return {**self._drafter.counted(), "device_bytes": self._drafter.bytes}


class CutDrafts:
    """The runner's ``draft_tokens_handler``, telling the scheduler of true drafts alone.

    Args:
        theirs: vLLM's own, which tells of as many as the config says.
        speculator: whose last drafts they are.
    """

    def __init__(self, theirs: Any, speculator: HostSpeculator) -> None:
        self._theirs, self._speculator = theirs, speculator

    def set_draft_tokens(self, input_batch: Any, draft_tokens: torch.Tensor) -> None:
        """Take a batch's drafts [B, K]. vLLM calls this."""
        self._theirs.set_draft_tokens(input_batch, draft_tokens)

    def get_draft_tokens(self) -> Any:
        """The drafts that the scheduler is to have verified next, each row's of its own length."""
        found = self._theirs.get_draft_tokens()
        if found is None:
            return None
        counts = self._speculator.counts
        cut = [ids[:count] for ids, count in zip(found.draft_token_ids, counts, strict=True)]
        return replace(found, draft_token_ids=cut)


def bind_second_runner(runner: Any) -> bool:
    """Have the scheduler told of true drafts alone; says whether tascade drafts in this runner."""
    speculator = getattr(runner, "speculator", None)
    handler = getattr(runner, "draft_tokens_handler", None)
    if isinstance(speculator, HostSpeculator) and not isinstance(handler, CutDrafts):
        runner.draft_tokens_handler = CutDrafts(handler, speculator)
    return isinstance(speculator, _Speculator)

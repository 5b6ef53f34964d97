"""A pack's trained drafter inside vLLM, beside the task's outputs.

    vllm serve MODEL \
      --speculative-config '{"method": "eagle3", "model": FOLDER, "num_speculative_tokens": 16,
                             "disable_padded_drafter_batch": true}' \
      --additional-config '{"tascade": {"pack": "PACK"}}' \
      --worker-extension-cls tascade.integrations.vllm.WorkerExtension

vLLM loads the network from FOLDER (``tascade export``) and keeps its KV cache in step with the
requests. The worker extension makes its proposer one that has both (:func:`join`): for each request
of a batch that of the two drafts is verified which promises more, and the network's passes beyond
the first, which its cache needs, are run where what they promise is worth their time.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from tascade.draft.costs import Curve, Trust
from tascade.draft.neural.export import DEPTH
from tascade.draft.neural.stored import StoredDrafter, read_drafter
from tascade.errors import ConfigError

_TRY_EVERY = 64
"""Steps without the network's drafts after which they are tried again."""


class NetworkAccount:
    """What the network's drafts are worth: by how often they are right, and what they take.

    Args:
        expected: how often its tokens at each depth were right when it was trained, if all before
            them were. At first they are believed; where drafts are asked for, they are right less
            often, since that is behind what the outputs missed.

    Attributes:
        right: of its tokens at each depth, how many were accepted if all before them were.
        drafted, accepted: tokens of its drafts that were verified, and of these accepted.
    """

    def __init__(self, expected: Sequence[float]) -> None:
        shares = [*expected[:DEPTH], *([expected[-1] if expected else 0.5] * DEPTH)][:DEPTH]
        self.right = [Trust(1.0, share, weight=1 / 64) for share in shares]
        self.drafted = self.accepted = 0
        self._seconds, self._since = 0.0, 0

    @property
    def worth(self) -> list[float]:
        """Tokens that a draft of 0, 1, ... tokens is expected to have accepted."""
        found, survival = [0.0], 1.0
        for trust in self.right:
            survival *= min(1.0, trust.ratio)
            found.append(found[-1] + survival)
        return found

    def depth(self, drafts: Sequence[tuple[float, int]], cost: Callable[[int], float]) -> int:
        """How deep it should draft for rows that have these drafts already.

        Args:
            drafts: of each row the tokens that its draft promises, and those that it has.
            cost: seconds of a step that verifies so many drafted tokens.
        """
        self._since += 1
        best = DEPTH
        if self._seconds and self._since < _TRY_EVERY:
            best = max(range(DEPTH + 1), key=lambda depth: self._rate(depth, drafts, cost))
        self._since = 0 if best else self._since
        return best

    def _rate(
        self, depth: int, drafts: Sequence[tuple[float, int]], cost: Callable[[int], float]
    ) -> float:
        """Tokens a second, if it drafts so deep where that promises more."""
        worth, tokens, verified = self.worth[depth], float(len(drafts)), 0
        for promise, length in drafts:
            tokens += max(worth, promise)
            verified += depth if worth > promise else length
        return tokens / (cost(verified) + depth * self._seconds)

    def took(self, seconds: float, depth: int) -> None:
        """Note what drafting so deep took, the pass that is run at any rate included."""
        each = seconds / (depth + 1)
        self._seconds = self._seconds or each
        self._seconds += 0.1 * (min(each, 4 * self._seconds) - self._seconds)

    def judge(self, draft: Sequence[int], said: Sequence[int]) -> None:
        """Learn from what became of a draft: ``said`` are the tokens that were sampled then."""
        for depth, token in enumerate(draft):
            hit = depth < len(said) and said[depth] == token
            self.right[depth].record(1.0, hit)
            if not hit:
                break
        self.drafted += len(draft)
        self.accepted += len(said) - 1 if len(said) else 0


def _seconds_of(curve: Curve, tokens: int) -> float:
    return float(np.interp(tokens, *curve))


def check_loaded(network: Any, taps: Sequence[int], stored: StoredDrafter) -> None:
    """See that what vLLM loaded is the pack's drafter, and reads the layers it was trained on.

    Args:
        network: vLLM's model of the drafter.
        taps: the layers whose entering states vLLM gives it.
        stored: the pack's.

    Raises:
        ConfigError: it is not; it names what is wrong.
    """
    offsets = network.draft_id_to_target_id
    said = (
        torch.arange(len(stored.ids))
        if offsets is None
        else offsets.cpu() + torch.arange(len(offsets))
    )
    norm = network.model.norm.weight.detach().cpu()  # matrices may be packed for the CPU by now
    wrong = {
        "states": (tuple(taps), stored.shape.taps),
        "tokens": (said.tolist(), stored.ids.tolist()),
        "weights": (norm.tolist(), stored.tensors["norm.weight"].to(norm.dtype).tolist()),
    }
    for what, (got, wanted) in wrong.items():
        if got != wanted:
            raise ConfigError(
                f"the drafter that vLLM loaded is not the pack's: it has other {what}",
                got=str(got)[:80],
                wanted=str(wanted)[:80],
                where="speculative_config.model",
                fix="run `tascade export` again, and name its folder",
            )


def join(runner: Any, tascade: Any) -> None:
    """Make the runner's EAGLE proposer one that drafts from the task's outputs too.

    Args:
        runner: vLLM's, before it has loaded its models.
        tascade: the proposer of the pack whose drafter vLLM is to load
            (:class:`tascade.integrations.vllm.TascadeProposer`).

    Raises:
        ConfigError: the speculative config is one that hands no tokens over, or there are several
            workers.
        PackError: the pack has no drafter, or a damaged one.
    """
    config, workers = runner.speculative_config, runner.parallel_config.world_size
    if workers > 1:
        # Each decides by its own clock how deep the network drafts, and would wait for the others.
        raise ConfigError(
            "network and outputs draft together in one worker only",
            got=f"{workers} workers",
            wanted="no tensor or pipeline parallelism",
            where="parallel_config",
            fix="serve the exported drafter by itself (method eagle3, without the worker "
            "extension), or the pack alone",
        )
    if not config.disable_padded_drafter_batch:
        raise ConfigError(
            "vLLM hands the tokens over on the device only",
            got=json.dumps({"disable_padded_drafter_batch": False}),
            wanted="true",
            where="speculative_config",
            fix="tascade serve PACK --drafter FOLDER writes it",
        )
    drafter = runner.drafter
    drafter.tascade, drafter.stored = tascade, read_drafter(tascade.packs[0].drafter)
    drafter.account = NetworkAccount(drafter.stored.info.acceptance)
    drafter.given = {}
    drafter.__class__ = _joined(type(drafter))


def _joined(theirs: type) -> type:
    """A proposer class of vLLM's, with the task's outputs beside it."""

    class JoinedProposer(theirs):  # type: ignore[misc]  # known when vLLM runs
        """See :func:`join`."""

        tascade: Any
        stored: StoredDrafter
        account: NetworkAccount
        given: dict[str, list[int]]
        """What was drafted by the network for each request in the step before."""

        def load_model(self, target_model: Any) -> None:
            super().load_model(target_model)
            hf_config = self.draft_model_config.hf_config
            check_loaded(self.model, hf_config.eagle_aux_hidden_state_layer_ids, self.stored)

        def prepare_next_token_ids_cpu(
            self, sampled_token_ids: Any, requests: Any, gpu_input_batch: Any, scheduled: Any
        ) -> Any:
            self._sampled, self._batch = sampled_token_ids, gpu_input_batch
            return super().prepare_next_token_ids_cpu(
                sampled_token_ids, requests, gpu_input_batch, scheduled
            )

        def propose(self, num_speculative_tokens: int, **given: Any) -> list[list[int]]:
            sampled, batch, account = self._sampled, self._batch, self.account
            names = list(batch.req_ids[: len(sampled)])
            for name, said in zip(names, sampled, strict=True):
                if name in self.given and said:
                    account.judge(self.given[name], said)
            drafts = self.tascade.propose(sampled, batch.num_tokens_no_spec, batch.token_ids_cpu)
            own = self.tascade.drafter
            promises = own.promises(drafts)
            asked = [row for row, said in enumerate(sampled) if said]
            offers = [(promises[row], len(drafts[row])) for row in asked]
            depth = min(num_speculative_tokens, self._depth(offers))
            started = time.perf_counter()
            network = super().propose(depth, **given).tolist()
            if asked and len(given["target_token_ids"]) <= len(sampled) * (DEPTH + 1):
                account.took(time.perf_counter() - started, depth)
            worth = account.worth[depth]
            rows = [row for row in asked if worth > promises[row]] if depth else []
            own.replaced([row for row in rows if drafts[row]], depth * len(rows))
            for row in rows:
                drafts[row] = network[row]
            self.given = {names[row]: network[row] for row in rows}
            return [draft[:num_speculative_tokens] for draft in drafts]

        def _depth(self, offers: list[tuple[float, int]]) -> int:
            budget = self.tascade.drafter.budget
            if not offers or budget is None:
                return DEPTH if offers else 0
            curve = None if budget.wants_plain else budget.costs.curve(len(offers))
            # Until a step without drafts was seen, there is nothing to compare with.
            return 0 if curve is None else self.account.depth(offers, partial(_seconds_of, curve))

        def own_stats(self) -> dict[str, Any]:
            """What the network drafted so far, and how often it was right at each depth."""
            account = self.account
            return {
                "network_drafted": account.drafted,
                "network_accepted": account.accepted,
                "network_right": [round(trust.ratio, 4) for trust in account.right],
            }

    return JoinedProposer

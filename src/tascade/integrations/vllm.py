"""tascade inside vLLM: a pack drafts for every request of the engine, through its official seam.

    vllm serve MODEL \
      --speculative-config '{"method": "custom_class", "num_speculative_tokens": 16,
                             "model": "tascade.integrations.vllm.TascadeProposer"}' \
      --additional-config '{"tascade": {"pack": "PACK"}}'

Nothing of vLLM is patched but two functions that its CPU build verifies drafts with, where a check
at the start finds them wrong (:func:`mend_expansion`, :func:`mend_empty_top_k`). Its rejection
sampler verifies the drafts, so that greedy output is the same and sampled output follows the same
distribution; its grammars cut drafts at the first token they forbid. The pack may also be named by
``TASCADE_PACK`` in the environment.
"""

from __future__ import annotations

import importlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tascade.core import IntArray, LongArray
from tascade.data.encode import end_tokens, fingerprint
from tascade.draft.ngram.batch import BatchDrafter
from tascade.draft.ngram.batch_budget import BatchBudget
from tascade.draft.ngram.sources import Task, open_task
from tascade.errors import ConfigError
from tascade.index.learned import AppendedWatch
from tascade.index.traffic import TrafficLearner
from tascade.integrations.vllm_network import join
from tascade.integrations.vllm_options import (
    Options,
    check_parallel,
    check_version,
    read_options,
)
from tascade.integrations.vllm_v2 import (
    bind_second_runner,
    check_second_runner,
    install,
    uses_second_runner,
)
from tascade.pack import Pack

_log = logging.getLogger(__name__)


def check_requests(options: Options, parallel: Any, model: Any) -> None:
    """Refuse what needs to know more of the requests than the engine shows.

    Raises:
        ConfigError: several packs without the worker extension, or prompts of embeddings.
    """
    if getattr(model, "enable_prompt_embeds", False):
        raise ConfigError(
            "prompts of embeddings have no tokens to draft from",
            got="enable_prompt_embeds",
            wanted="prompts of text or token ids",
            fix="leave --enable-prompt-embeds out, or the speculative config",
        )
    name = getattr(parallel, "worker_extension_cls", "")
    if len(options.packs) > 1 and not _is_extension(name):
        raise ConfigError(
            "several packs, but the proposer cannot see which request is whose",
            got=f"worker extension {name!r}",
            wanted="tascade's, or a class that inherits from it",
            where="worker_extension_cls",
            fix="add --worker-extension-cls tascade.integrations.vllm.WorkerExtension, or serve "
            "one pack",
        )


def _is_extension(name: str) -> bool:
    module, _, attribute = name.rpartition(".")
    found = getattr(importlib.import_module(module), attribute, None) if module else None
    return isinstance(found, type) and issubclass(found, WorkerExtension)


def mend_expansion() -> None:
    """See that vLLM tells each drafted token its request's temperature, top_k and top_p.

    On a CPU 0.32 fills a copy and drops it (vllm-project/vllm#55005): where a request of the batch
    is sampled, these are memory as it was found, greedy answers come out wrong, and top_k may end
    the engine, whatever the drafter. To draft nothing beside sampled requests would not do: one may
    join greedy ones just drafted for, and near the longest length vLLM drafts zeros of its own.

    Raises:
        ConfigError: it is wrong and stays wrong.
    """
    from vllm.v1.sample import rejection_sampler

    if _expands(rejection_sampler):
        return
    _log.warning(
        "this vLLM's expand_batch_to_tokens is wrong on a CPU (vllm-project/vllm#55005) and would "
        "spoil greedy answers beside sampled ones: tascade replaces it in this process"
    )
    rejection_sampler.expand_batch_to_tokens = _expand
    if not _expands(rejection_sampler):
        raise ConfigError(
            "this vLLM spoils greedy answers beside sampled ones, whatever the drafter",
            got="a wrong rejection_sampler.expand_batch_to_tokens",
            wanted="a vLLM in which vllm-project/vllm#55005 is mended",
            fix="upgrade vLLM, or leave the speculative config out",
        )


def mend_empty_top_k() -> None:
    """See that vLLM bears a step in which requests have a top_k and nobody has a draft.

    On a CPU 0.32 takes the largest top_k of the drafted tokens, of none too, and the engine ends.
    Every step goes through the rejection sampler there, drafts or not, so that one request with
    a top_k and no top_p is enough.
    """
    import torch
    from vllm.v1.sample import rejection_sampler

    theirs = rejection_sampler.apply_top_k_top_p
    try:
        theirs(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int32), None)
    except (RuntimeError, IndexError):
        _log.warning(
            "this vLLM's top_k ends the engine in a step without drafts: tascade leaves it out of "
            "such steps in this process"
        )
        rejection_sampler.apply_top_k_top_p = lambda logits, k, p: (
            theirs(logits, k, p) if len(logits) else logits
        )


def _expands(sampler: Any) -> bool:
    import torch

    ends = torch.tensor([2, 5, 6], dtype=torch.int32)
    for dtype in (torch.float32, torch.int32):
        given = torch.tensor([50, 0, 7], dtype=dtype)
        try:
            found = sampler.expand_batch_to_tokens(given, ends, 6, 0, 1).tolist()
        except (RuntimeError, TypeError):
            return False
        if found != [50, 50, 1, 1, 1, 7]:
            return False
    return True


def _expand(
    x: Any, cu_num_tokens: Any, num_tokens: int, replace_from: int = 0, replace_to: int = 0
) -> Any:
    """``x`` [B] repeated to [T], each up to its end; one value of it replaced. Names as in vLLM."""
    counts = cu_num_tokens.diff(prepend=cu_num_tokens.new_zeros(1))
    values = x.masked_fill(x == replace_from, replace_to)
    return values.repeat_interleave(counts, output_size=num_tokens)


class TascadeProposer:
    """vLLM's ``custom_class`` proposer. See the module's page for how to name it.

    Attributes:
        drafter: the batch's drafter; its ``stats`` count what happened.
        failures: calls that raised, and so drafted nothing; the first is in the log.
        unknown_packs: rows that named a pack which is not served, and so were left alone.
    """

    def __init__(self, vllm_config: Any) -> None:
        self.failures = self.unknown_packs = 0
        self._prompts: Callable[[], LongArray] | None = None
        self._request: Callable[[int], Any] | None = None
        try:
            self._start(vllm_config)
        except Exception as error:
            # vLLM goes on to say that the constructor must accept a VllmConfig.
            _log.error("tascade cannot draft in this engine: %s", error)
            raise

    def _start(self, vllm_config: Any) -> None:
        from vllm.platforms import current_platform

        import vllm

        check_version(vllm.__version__)
        parallel, model = vllm_config.parallel_config, vllm_config.model_config
        check_parallel(vllm.__version__, parallel.pipeline_parallel_size)
        options = read_options(vllm_config.additional_config)
        check_requests(options, parallel, model)
        check_second_runner(vllm_config, list(options.packs))
        if current_platform.is_cpu() and not uses_second_runner(vllm_config):
            mend_expansion()
            mend_empty_top_k()
        self._names = list(options.packs)
        self._adapters = options.adapters
        self.packs = packs = [Pack.open(path) for path in options.packs.values()]
        tokenizer = _tokenizer(model)
        found = fingerprint(tokenizer)
        for pack in packs:
            pack.check_tokenizer(found, str(model.model))
        rows = model.get_vocab_size()
        opened = [open_task(pack, found, rows) for pack in packs]
        for name, pack in zip(self._names, packs, strict=True):
            if pack.chat:
                _log.warning(
                    "pack %r: its prompts took along %s; requests encoded otherwise draft poorly. "
                    "`tascade serve` has vLLM add it to chat requests",
                    name,
                    json.dumps(asdict(pack.chat)),
                )
        self._appended = AppendedWatch([task.corpus for task in opened])
        tasks: list[Task] = [*opened]
        self._learner = None
        if options.learn:
            corpus = opened[0].corpus
            self._learner = _learner(options, found, corpus.vocab_size, vllm_config)
            tasks[0] = replace(tasks[0], corpus=self._learner.view(corpus))
        most = vllm_config.speculative_config.num_speculative_tokens
        self.drafter = BatchDrafter(
            tasks,
            end_tokens=_ends(model, tokenizer),
            requests=vllm_config.scheduler_config.max_num_seqs,
            length=model.max_model_len,
            most=most,
            budget=BatchBudget(most) if options.budget else None,
            on_end=self._offer if self._learner is not None else None,
        )

    def _offer(self, prompt: IntArray, output: IntArray) -> None:
        if self._learner is not None:
            self._learner.offer(prompt.tolist(), output.tolist())

    @property
    def learns(self) -> bool:
        """Whether finished answers become drafts."""
        return self._learner is not None

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to load: there is no draft model. vLLM calls this."""

    def propose(
        self,
        sampled_token_ids: Sequence[Sequence[int]],
        num_tokens_no_spec: IntArray,
        token_ids_cpu: IntArray,
        slot_mappings: Any = None,
    ) -> list[list[int]]:
        """Drafts for the batch (see :meth:`tascade.draft.ngram.batch.BatchDrafter.propose`).

        Nothing that is raised here reaches the engine, which would die of it with all its requests.
        """
        try:
            return self._propose(sampled_token_ids, num_tokens_no_spec, token_ids_cpu)
        except Exception:
            if not self.failures:
                _log.exception("nothing is drafted in this step; further failures are only counted")
            self.failures += 1
            return [[] for _ in sampled_token_ids]

    def _propose(
        self, sampled: Sequence[Sequence[int]], lengths: IntArray, ids: IntArray
    ) -> list[list[int]]:
        learned = self._learner is not None and self._learner.refresh_due()
        if self._appended.refresh_due() or learned:
            self.drafter.refresh()
        task_of = self._task_of if len(self._names) > 1 else None
        prompts = self._prompts() if self._prompts is not None else None
        return self.drafter.propose(sampled, lengths, ids, task_of, prompts)

    def bind(
        self, prompts: Callable[[], LongArray], request: Callable[[int], Any] | None = None
    ) -> None:
        """Let the proposer see how long each row's prompt is, and which request a row holds."""
        self._prompts, self._request = prompts, request

    def _task_of(self, row: int) -> int:
        if self._request is None:
            raise ConfigError(
                "several packs, but the proposer cannot see which request is whose",
                got=self._names,
                wanted="the worker extension, bound",
                fix="add --worker-extension-cls tascade.integrations.vllm.WorkerExtension, or "
                "serve one pack",
            )
        name = self._pack_of(self._request(row))
        if name in self._names:
            return self._names.index(name)
        if not self.unknown_packs:
            _log.warning("no pack %.80r is served: nothing is drafted for who names it", name)
        self.unknown_packs += 1
        return -1

    def _pack_of(self, request: Any) -> Any:
        params = getattr(request, "sampling_params", None)
        wanted = (getattr(params, "extra_args", None) or {}).get("tascade_pack")
        if wanted is not None:
            return wanted
        lora = getattr(getattr(request, "lora_request", None), "lora_name", None)
        return self._adapters.get(lora, self._names[0]) if lora else self._names[0]


class WorkerExtension:
    """``--worker-extension-cls``: shows the proposer its requests, the user its counts.

    Needed to serve several packs at once; learning then goes by what vLLM calls a prompt. It binds
    the proposer by itself as soon as the worker has its runner. vLLM's second runner drafts only
    with it (:mod:`tascade.integrations.vllm_v2`).
    """

    model_runner: Any

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "vllm_config":
            install(value)
        elif name == "model_runner":
            self.tascade_bind()

    def init_worker_extension(self) -> None:
        """Called by vLLM from 0.33 when the device is ready."""
        self.tascade_bind()

    def tascade_bind(self) -> bool:
        """Bind the proposer to its worker; says whether there was one to bind."""
        runner = self.model_runner
        if bind_second_runner(runner):
            return True
        drafter = getattr(runner, "drafter", None)
        config = getattr(runner, "speculative_config", None)
        if getattr(config, "method", None) == "eagle3" and not hasattr(drafter, "tascade"):
            join(runner, TascadeProposer(runner.vllm_config))
        proposer = self._tascade_proposer()
        if proposer is None:
            return False
        proposer.bind(
            lambda: runner.input_batch.num_prompt_tokens,
            lambda row: runner.requests[runner.input_batch.req_ids[row]],
        )
        return True

    def _tascade_proposer(self) -> TascadeProposer | None:
        """The pack's proposer: vLLM's drafter, or beside the network that vLLM drafts with."""
        drafter = _drafter_of(self.model_runner)
        found = getattr(drafter, "tascade", drafter)
        return found if isinstance(found, TascadeProposer) else None

    def tascade_stats(self) -> dict[str, Any]:
        """What was drafted, accepted and spent so far, and the step costs learned."""
        proposer = self._tascade_proposer()
        if proposer is None:
            return {}
        drafter = proposer.drafter
        beside = getattr(_drafter_of(self.model_runner), "own_stats", dict)
        costs = drafter.budget.costs.observed() if drafter.budget else []
        return {
            **asdict(drafter.stats),
            "costs": costs,
            "failures": proposer.failures,
            "unknown_packs": proposer.unknown_packs,
            **beside(),
        }


def _drafter_of(runner: Any) -> Any:
    """What a runner of either kind drafts with."""
    return getattr(runner, "speculator", None) or getattr(runner, "drafter", None)


def _learner(options: Options, found: str, vocab_size: int, config: Any) -> TrafficLearner:
    if config.parallel_config.world_size > 1:
        raise ConfigError(
            "learning works in one worker only: a learned folder has one owner",
            got=f"{config.parallel_config.world_size} workers",
            wanted="no tensor or pipeline parallelism",
            where="additional_config.tascade.learn",
            fix="leave learn out",
        )
    folder = Path(options.learn).expanduser()
    return TrafficLearner.open(folder, fingerprint=found, vocab_size=vocab_size)


def _tokenizer(config: Any) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(
        config.tokenizer,
        revision=config.tokenizer_revision,
        trust_remote_code=config.trust_remote_code,
    )


def _ends(config: Any, tokenizer: Any) -> tuple[int, ...]:
    generation = SimpleNamespace(**config.try_get_generation_config())
    model = SimpleNamespace(generation_config=generation, config=config.hf_config)
    return end_tokens(model, tokenizer)

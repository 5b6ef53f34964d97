"""tascade inside vLLM: a pack drafts for every request of the engine, through its official seam.

    vllm serve MODEL \
      --speculative-config '{"method": "custom_class", "num_speculative_tokens": 16,
                             "model": "tascade.integrations.vllm.TascadeProposer"}' \
      --additional-config '{"tascade": {"pack": "PACK"}}'

Nothing of vLLM is patched. Its rejection sampler verifies the drafts, so that greedy output is the
same and sampled output follows the same distribution; its grammars cut drafts at the first token
they forbid. The pack may also be named by ``TASCADE_PACK`` in the environment.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tascade.core import IntArray
from tascade.draft.appended import AppendedWatch
from tascade.draft.batch import BatchDrafter
from tascade.draft.batch_budget import BatchBudget
from tascade.draft.task import Task, open_task
from tascade.encode import end_tokens, fingerprint
from tascade.errors import ConfigError
from tascade.learning import TrafficLearner
from tascade.pack import Pack

OLDEST, NEWEST = (0, 32), (0, 33)
"""vLLM minor versions this proposer was made for, both included."""
PACK_VARIABLE = "TASCADE_PACK"
_DEFAULT = "default"
_log = logging.getLogger(__name__)
_KEYS = {"pack", "packs", "adapters", "budget", "learn"}


@dataclass(frozen=True, slots=True)
class Options:
    """What ``additional_config["tascade"]`` says.

    ``packs``: folders by name, the first one the default; ``adapters``: which pack the requests of
    a LoRA adapter use; ``budget``: whether step times decide how much is drafted (else all is);
    ``learn``: a folder in which finished answers become drafts.
    """

    packs: dict[str, Path]
    adapters: dict[str, str] = field(default_factory=dict)
    budget: bool = True
    learn: str = ""


def read_options(additional: Any, environment: Any = os.environ) -> Options:
    """Options from vLLM's ``additional_config`` and the environment.

    Raises:
        ConfigError: an unknown key, a value of the wrong type, no pack named, or an adapter that
            names a pack which is not there.
    """
    where = "additional_config.tascade"
    raw = additional.get("tascade", {}) if isinstance(additional, dict) else {}
    if not isinstance(raw, dict) or set(raw) - _KEYS:
        raise ConfigError(
            "unknown tascade options", got=raw, wanted=f"a mapping of {sorted(_KEYS)}", where=where
        )
    packs = raw.get("packs", {})
    adapters = raw.get("adapters", {})
    for name, value in (("packs", packs), ("adapters", adapters)):
        strings = isinstance(value, dict) and all(
            isinstance(part, str) for item in value.items() for part in item
        )
        if not strings:
            raise ConfigError(
                f"{name} must map names to names", got=value, wanted="strings", where=where
            )
    single = raw.get("pack", environment.get(PACK_VARIABLE) if not packs else None)
    if single is not None:
        packs = {_DEFAULT: single, **packs}
    if not packs or not all(isinstance(path, str) for path in packs.values()):
        raise ConfigError(
            "no pack is named",
            got=raw,
            wanted="the folder of a pack",
            where=where,
            fix=f'add --additional-config \'{{"tascade": {{"pack": "FOLDER"}}}}\', '
            f"or set {PACK_VARIABLE}",
        )
    unknown = set(adapters.values()) - set(packs)
    if unknown:
        raise ConfigError(
            "an adapter names a pack that is not there",
            got=sorted(unknown),
            wanted=str(sorted(packs)),
            where=f"{where}.adapters",
        )
    folders = {name: Path(path).expanduser() for name, path in packs.items()}
    learn = raw.get("learn", "")
    if not isinstance(learn, str) or (learn and len(folders) > 1):
        raise ConfigError(
            "learn takes one folder, and one pack", got=raw, wanted="a folder", where=where
        )
    return Options(folders, adapters, bool(raw.get("budget", True)), learn)


def check_version(found: str) -> None:
    """Refuse a vLLM whose proposer interface was not tried.

    Raises:
        ConfigError: outside the range, with the range.
    """
    try:
        minor = tuple(int(part) for part in found.split(".")[:2])
    except ValueError:
        minor = (0, 0)
    if not OLDEST <= minor <= NEWEST:
        newest, oldest = (".".join(map(str, v)) for v in (NEWEST, OLDEST))
        raise ConfigError(
            "this vLLM was not tried with tascade",
            got=f"vllm {found}",
            wanted=f"{oldest} to {newest}",
            fix=f'pip install "vllm>={oldest},<{NEWEST[0]}.{NEWEST[1] + 1}"',
        )


def check_parallel(found: str, pipeline: int) -> None:
    """Refuse pipeline parallelism where vLLM fails with any drafter, less clearly.

    Raises:
        ConfigError: a vLLM whose first stages look for a drafter that only the last one has.
    """
    if pipeline > 1 and found.startswith("0.32."):
        raise ConfigError(
            "this vLLM cannot draft with pipeline parallelism, whatever the drafter",
            got=f"vllm {found}, {pipeline} stages",
            wanted="one stage; tensor parallelism works",
            where="pipeline_parallel_size",
            fix="use --tensor-parallel-size, or leave the speculative config out",
        )


class TascadeProposer:
    """vLLM's ``custom_class`` proposer. See the module's page for how to name it.

    Attributes:
        drafter: the batch's drafter; its ``stats`` count what happened.
    """

    def __init__(self, vllm_config: Any) -> None:
        import vllm

        check_version(vllm.__version__)
        check_parallel(vllm.__version__, vllm_config.parallel_config.pipeline_parallel_size)
        options = read_options(vllm_config.additional_config)
        self._names = list(options.packs)
        self._adapters = options.adapters
        self._input_batch: Callable[[], Any] | None = None
        self._requests: Callable[[], Any] | None = None
        packs = [Pack.open(path) for path in options.packs.values()]
        tokenizer = _tokenizer(vllm_config.model_config)
        found = fingerprint(tokenizer)
        for pack in packs:
            pack.check_tokenizer(found, str(vllm_config.model_config.model))
        rows = vllm_config.model_config.get_vocab_size()
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
            end_tokens=_ends(vllm_config.model_config, tokenizer),
            requests=vllm_config.scheduler_config.max_num_seqs,
            length=vllm_config.model_config.max_model_len,
            most=most,
            budget=BatchBudget(most) if options.budget else None,
            on_end=self._offer if self._learner is not None else None,
        )

    def _offer(self, prompt: IntArray, output: IntArray) -> None:
        if self._learner is not None:
            self._learner.offer(prompt.tolist(), output.tolist())

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to load: there is no draft model. vLLM calls this."""

    def propose(
        self,
        sampled_token_ids: Sequence[Sequence[int]],
        num_tokens_no_spec: IntArray,
        token_ids_cpu: IntArray,
        slot_mappings: Any = None,
    ) -> list[list[int]]:
        """Drafts for the batch (see :meth:`tascade.draft.batch.BatchDrafter.propose`)."""
        learned = self._learner is not None and self._learner.refresh_due()
        if self._appended.refresh_due() or learned:
            self.drafter.refresh()
        task_of = self._task_of if len(self._names) > 1 else None
        return self.drafter.propose(sampled_token_ids, num_tokens_no_spec, token_ids_cpu, task_of)

    def bind(self, input_batch: Callable[[], Any], requests: Callable[[], Any]) -> None:
        """Let the proposer see which request a row holds (done by :class:`WorkerExtension`)."""
        self._input_batch, self._requests = input_batch, requests

    def _task_of(self, row: int) -> int:
        if self._input_batch is None or self._requests is None:
            raise ConfigError(
                "several packs, but the proposer cannot see which request is whose",
                got=self._names,
                wanted="the worker extension, bound",
                fix="add --worker-extension-cls tascade.integrations.vllm.WorkerExtension, and on "
                'vLLM 0.32 call llm.collective_rpc("tascade_bind"); or serve one pack',
            )
        batch = self._input_batch()
        request = self._requests()[batch.req_ids[row]]
        return self._names.index(self._pack_of(request))

    def _pack_of(self, request: Any) -> str:
        params = getattr(request, "sampling_params", None)
        wanted = (getattr(params, "extra_args", None) or {}).get("tascade_pack")
        if wanted in self._names:
            return str(wanted)
        lora = getattr(getattr(request, "lora_request", None), "lora_name", None)
        return self._adapters.get(lora, self._names[0]) if lora else self._names[0]


class WorkerExtension:
    """Optional ``--worker-extension-cls``: shows the proposer its requests, the user its counts.

    Needed only to serve several packs at once. vLLM from 0.33 binds by itself; on 0.32 call
    ``llm.collective_rpc("tascade_bind")`` once.
    """

    model_runner: Any

    def init_worker_extension(self) -> None:
        """Called by vLLM from 0.33 when the device is ready."""
        self.tascade_bind()

    def tascade_bind(self) -> bool:
        """Bind the proposer to its worker; says whether there was one to bind."""
        runner = self.model_runner
        proposer = getattr(runner, "drafter", None)
        if not isinstance(proposer, TascadeProposer):
            return False
        proposer.bind(lambda: runner.input_batch, lambda: runner.requests)
        return True

    def tascade_stats(self) -> dict[str, Any]:
        """What was drafted, accepted and spent so far, and the step costs learned."""
        proposer = getattr(self.model_runner, "drafter", None)
        if not isinstance(proposer, TascadeProposer):
            return {}
        drafter = proposer.drafter
        costs = drafter.budget.costs.to_json() if drafter.budget else []
        return {**asdict(drafter.stats), "costs": costs}


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

"""A model with a tailored head, ready to decode: VocabTailor's pieces put together."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch

from tascade.config import VocabConfig
from tascade.core import Drafter, IntArray
from tascade.decode.batch import BatchDecoder
from tascade.decode.batch_target import BatchTarget
from tascade.decode.exclusive import exclusive
from tascade.decode.lm_head import HeadLike, finisher, head_override
from tascade.decode.loop import Decoder, NodeBudget
from tascade.decode.sampling import argmax_rows
from tascade.decode.target import Target
from tascade.draft.costs import CostTable
from tascade.errors import ConfigError, PackError
from tascade.pack import Pack, PackInfo
from tascade.tailor.exact import ExactHeadDecoder, Full
from tascade.tailor.exact_batch import ExactBatchDecoder
from tascade.tailor.head import BatchHead, RequestHead
from tascade.tailor.offload.full_head import FullHead
from tascade.tailor.offload.load import OffloadedModel
from tascade.tailor.offload.table import RowTable
from tascade.tailor.profile import Profile
from tascade.tailor.schedule import CheckSchedule
from tascade.util.places import VOCABULARIES

STAGE = "vocab-tailor"
_FIRST_RATE = 0.01
_STATES = (1, 2, 4, 8, 16, 32, 64)
GUARANTEES = {
    "full": "lossless",
    "masked": "approximate",
    "exact": "lossless",
    "draft-only": "lossless",
}
"""What each head promises."""


@dataclass(slots=True)
class Tailored:
    """A target with a small head, and the full one behind it.

    Attributes:
        target: the model with its small head.
        head: that head.
        full: the full head, [K, d] final states to the model's logits [K, V].
        config: which guarantee, and how many guesses.
        rate: misses a token to expect.
        bias: [V] the full head's, where it has one.
    """

    target: Target
    head: RequestHead
    full: Full
    config: VocabConfig
    rate: float = _FIRST_RATE
    bias: torch.Tensor | None = None
    _costs: tuple[CostTable, CostTable] | None = None

    def schedule(self) -> CheckSchedule:
        """When the full head checks, by what both heads cost on this machine."""
        if self._costs is None:
            dtype = self.target.model.dtype
            self._costs = (
                measure_head(self.full, self.head, dtype),
                measure_head(self.head, self.head, dtype),
            )
        full, small = (partial(_seconds, table) for table in self._costs)
        return CheckSchedule(full, small, self.config.deferred, self.rate)

    def decoder(
        self, drafter: Drafter, budget: NodeBudget | None = None, tokenizer: Any = None
    ) -> Decoder:
        """The loop over this head, with a drafter or the one that proposes nothing."""
        if self.config.head == "masked":
            return Decoder(self.target, drafter, budget, tokenizer)
        return ExactHeadDecoder(self.target, drafter, self.full, self.schedule(), budget, tokenizer)

    def batches(self, size: int, tokenizer: Any = None) -> BatchDecoder:
        """The loop for several requests at once, over one head of all that they need."""
        own, target = self.head.union, BatchTarget(*self.target.parts)
        ids, kind = own.ids[: own.static].cpu().numpy(), target.model.dtype
        head = BatchHead(own.table, ids, bias=self.bias, device=target.device, dtype=kind)
        if self.config.head == "masked":
            return BatchDecoder(target, head, tokenizer=tokenizer, size=size)
        return ExactBatchDecoder(
            target, head, self.full, self.schedule(), tokenizer=tokenizer, size=size
        )


def vocab_config(pack: Pack, head: str = "") -> VocabConfig:
    """How a pack's vocabulary is used, with another ``head`` if one is given.

    Raises:
        ConfigError: there is no such head, or the pack holds no vocabulary to make one from.
    """
    stored = dict(pack.info.recipe.get("vocab") or {})
    try:
        config = VocabConfig(**{**stored, **({"head": head} if head else {})})
    except TypeError as error:
        raise PackError("pack.json has an unknown vocab setting", got=error) from error
    if config.head != "full" and not pack.vocabulary.is_file():
        raise ConfigError(
            "this pack holds no tailored vocabulary",
            got=f"head {config.head!r}",
            wanted=pack.vocabulary.name,
            where=str(pack.path),
            fix="run `tascade tailor PACK --data TRAIN`, or leave the head full",
        )
    return config


def tailor_pack(
    pack: Pack, model: Any, head: str = "", tables: OffloadedModel | None = None
) -> Tailored | None:
    """The tailored head that a pack and ``head`` ask for; ``None`` for the full one.

    A head for drafts alone is not the model's but its assistant's: the model keeps the full one.

    Raises:
        ConfigError: as :func:`vocab_config`.
        PackError: the vocabulary's file is damaged.
        FingerprintError: it was made for another tokenizer.
    """
    config = vocab_config(pack, head)
    if config.head in ("full", "draft-only"):
        return None
    profile = Profile.load(
        pack.vocabulary, vocab_size=pack.info.vocab_size, fingerprint=pack.info.fingerprint
    )
    given: dict[str, Any] = {}
    if tables is not None:
        given = {"table": tables.head, "bias": tables.head_bias}
    rate = _FIRST_RATE if profile.held_out is None else 1 - profile.held_out.share
    return tailor_model(model, profile.ids, config, rate=rate, **given)


def check_assistant(head: str, assistant: object) -> None:
    """Refuse a head for drafts alone where there is nothing that drafts with it.

    Raises:
        ConfigError: ``assistant`` is ``None``.
    """
    if head == "draft-only" and assistant is None:
        raise ConfigError(
            "a head for drafts alone needs a model that drafts",
            got=f"head {head!r} and no assistant",
            wanted="a smaller model with the same tokenizer",
            where="assistant",
            fix="name one (assistant=..., --assistant), or choose a head: full, exact or masked",
        )


def with_vocabulary(info: PackInfo, config: VocabConfig) -> PackInfo:
    """What ``pack.json`` says once its pack has a list of tokens, used as ``config`` says."""
    stages = [*(stage for stage in info.stages if stage != STAGE), STAGE]
    return replace(info, recipe={**info.recipe, "vocab": asdict(config)}, stages=stages)


def keep_vocabulary(pack: Pack, tokenizer: Any, profile: Profile, config: VocabConfig) -> None:
    """Put a list of tokens into its pack, which uses a head of them from now on.

    ``pack.json`` says which file has the list, so that replacing it takes list and head together:
    a crash at any point leaves those of before or these.
    """
    first, other = VOCABULARIES
    replaced = pack.vocabulary.is_file() and pack.info.vocabulary == first
    for name in (other, first) if replaced else (first,):
        profile.save(pack.path / name, tokenizer)
        pack.info = replace(with_vocabulary(pack.info, config), vocabulary=name)
        pack.save()
    (pack.path / other).unlink(missing_ok=True)


def tailor_model(
    model: Any,
    ids: IntArray,
    config: VocabConfig,
    *,
    table: RowTable | None = None,
    bias: torch.Tensor | None = None,
    rate: float = _FIRST_RATE,
) -> Tailored:
    """Give a model a head of the tokens ``ids`` [n], beside its own.

    Args:
        model: loaded whole, or without its tables (see :mod:`tascade.tailor.offload.load`).
        ids: the task's tokens.
        config: which guarantee.
        table: the full head's rows; the model's own weights by default.
        bias: [V] the full head's, with a ``table``.
        rate: misses a token to expect.

    Raises:
        UnsupportedModelError: the model has no LM head, or changes its logits behind it in a way
            that is not known.
    """
    full: Any = head_override(model).full
    if table is None:
        table, bias = RowTable.from_tensor(full.weight.detach().cpu()), getattr(full, "bias", None)
    head = RequestHead(table, ids, bias=bias, device=model.device, dtype=model.dtype)
    finish = finisher(model)
    own = None if bias is None else bias.detach()
    whole = FullHead(table, own).check if model.device.type == "cpu" else full
    target = Target(model, head, whole)

    def logits(states: torch.Tensor) -> torch.Tensor:
        with exclusive(model):
            return finish(whole(states))

    return Tailored(target, head, logits, config, rate, bias)


def _seconds(table: CostTable, states: int) -> float:
    known = min(states, table.limit)
    return float(table.upto(known)[-1]) * states / known


@torch.inference_mode()
def measure_head(logits: HeadLike, head: RequestHead, dtype: torch.dtype) -> CostTable:
    """Measure what a head costs by its number of states, the choice of tokens included.

    Args:
        logits: the full head, or ``head`` itself.
        head: the small one.
        dtype: of the model's states; its tables may be stored in another.
    """
    # Not random ones: the draws are the user's. Not zeros either, which some CPUs add up faster.
    own = head.union
    numbers = torch.arange(1, _STATES[-1] * own.width + 1, device=own.ids.device)
    states = numbers.sin().view(-1, own.width).to(dtype)

    def once(rows: int) -> float:
        start = time.perf_counter()
        found = logits(states[:rows])
        head.argmax(found) if logits is head else argmax_rows(found)
        return time.perf_counter() - start

    # Thrice, since the first may have to make a kernel for its shape or to read the file.
    return CostTable(_STATES, [min(once(rows) for _ in range(3)) for rows in _STATES])

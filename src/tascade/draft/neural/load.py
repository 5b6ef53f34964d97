"""Loading an assistant for a pack's model."""

from __future__ import annotations

from typing import Any

from tascade.data.encode import end_tokens, fingerprint
from tascade.decode.lm_head import install_slot
from tascade.decode.target import Target
from tascade.draft.neural.draft_model import AssistantDrafter
from tascade.errors import ConfigError
from tascade.load import ModelRef, load_model
from tascade.pack import Pack
from tascade.tailor.head import RequestHead
from tascade.tailor.offload.full_head import FullHead
from tascade.tailor.offload.load import load_slim
from tascade.tailor.offload.table import RowTable
from tascade.tailor.profile import Profile


def open_assistant(
    ref: ModelRef, pack: Pack, head: str = "full", *, dtype: str = "auto", device: str = "auto"
) -> AssistantDrafter:
    """Load an assistant for a pack's model.

    Args:
        ref: a causal model with the tokenizer that the pack was made for.
        pack: its list of tokens makes the assistant's head, if ``head`` is ``draft-only``.
        head: with any other, the assistant has its own.
        dtype: of the assistant.
        device: of the assistant; with a small head its tables stay in their file.

    Raises:
        ConfigError: nothing loadable, or a model of another tokenizer.
        UnsupportedModelError: its state cannot be rewound, or it has no LM head to make smaller.
        PackError: the pack's list is damaged.
    """
    if head == "draft-only" and not isinstance(ref, tuple):
        slim = load_slim(ref, dtype=dtype, device=device)
        model, tokenizer, name = slim.model, slim.tokenizer, slim.name
    else:
        model, tokenizer, name = load_model(ref, dtype=dtype, device=device)
    if (mark := fingerprint(tokenizer)) != pack.info.fingerprint:
        raise ConfigError(
            "the assistant has another tokenizer than the pack's model",
            got=f"{name}: tokenizer {mark}",
            wanted=f"tokenizer {pack.info.fingerprint}",
            where="assistant",
            fix="choose a smaller model of the same family",
        )
    target = Target(model, _small_head(model, pack) if head == "draft-only" else None)
    ends = end_tokens(model, tokenizer)
    return AssistantDrafter(target, vocab_size=pack.info.vocab_size, end_tokens=ends)


def _small_head(model: Any, pack: Pack) -> RequestHead:
    size, mark = pack.info.vocab_size, pack.info.fingerprint
    ids = Profile.load(pack.vocabulary, vocab_size=size, fingerprint=mark).ids
    full: Any = install_slot(model).full
    slim = isinstance(full, FullHead)
    table = full.table if slim else RowTable.from_tensor(full.weight.detach().cpu())
    ids, bias = ids[ids < table.shape[0]], getattr(full, "bias", None)
    return RequestHead(table, ids, bias=bias, device=model.device, dtype=model.dtype)

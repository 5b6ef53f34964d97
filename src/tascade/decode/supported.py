"""Which models can be decoded here, and what of their tables and positions must be known for it."""

from __future__ import annotations

import inspect
import logging
import sys
import warnings
from typing import Any

from tascade.core import IntArray
from tascade.errors import ConfigError, UnsupportedModelError

_log = logging.getLogger("tascade.data")


def check_rewindable(model: Any) -> None:
    """Refuse a model whose state is not plain attention keys and values, placed by position ids.

    Raises:
        UnsupportedModelError: recurrent, hybrid or encoder-decoder models; models that place
            tokens by their slot in the cache, where a tree's branches lie side by side.
    """
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or [])
    odd = kinds - {"full_attention", "sliding_attention"}
    stateful = bool(getattr(model, "_is_stateful", False))
    if stateful or odd or getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            "this model's state cannot be rewound, so drafts cannot be verified",
            got=f"{type(model).__name__} ({', '.join(sorted(odd)) or 'recurrent state'})",
            wanted="a decoder-only model whose layers are full or sliding-window attention",
            fix="decode it with its own generate(); tascade would give wrong words here",
        )
    trait = _slot_bound(model, config)
    if trait:
        raise UnsupportedModelError(
            "this model does not place tokens by position ids, so drafts cannot be verified",
            got=f"{type(model).__name__} ({trait})",
            wanted="causal attention whose forward takes position_ids and a mask",
            fix="decode it with its own generate(); tascade would give wrong words here",
        )


def _slot_bound(model: Any, config: Any) -> str:
    """What ties the model's attention to cache slots or to both directions; "" for nothing."""
    taken = inspect.signature(model.forward).parameters
    missing = {"attention_mask", "position_ids", "past_key_values"} - set(taken)
    if missing:
        return "forward() does not take " + ", ".join(sorted(missing))
    if getattr(config, "alibi", False):
        return "ALiBi"
    if "local" in (getattr(config, "attention_layers", None) or []):
        return "local attention inside the layer"  # GPT-Neo
    place = type(model).__module__
    windowed = getattr(config, "sliding_window", None) and place.startswith("transformers.")
    if windowed and "create_sliding_window_causal_mask" not in vars(sys.modules[place]):
        return "a sliding window in its cache that its mask does not have"  # Moshi
    if getattr(config, "is_decoder", True) is False and hasattr(config, "type_vocab_size"):
        return "an encoder: is_decoder is false"
    return ""


def table_rows(model: Any) -> int:
    """How many token ids a model can read and say: rows of its embedding, or of its LM head.

    Either may be padded beyond the tokenizer's tokens, or lack some that were added to it. Where
    they differ, the smaller counts.
    """
    sizes = []
    for end in (model.get_input_embeddings(), model.get_output_embeddings()):
        rows = getattr(end, "num_embeddings", None) or getattr(end, "out_features", None)
        sizes += [int(rows)] if rows else []
    return min(sizes or [int(model.config.get_text_config().vocab_size)])


def check_ids(ids: IntArray, rows: int, where: str = "prompt") -> None:
    """Refuse token ids [T] that a model has no row for.

    Raises:
        ConfigError: naming the first.
    """
    wrong = ids[(ids < 0) | (ids >= rows)]
    if len(wrong):
        raise ConfigError(
            "the model has no row for a token",
            got=f"token id {int(wrong[0])}",
            wanted=f"0 to {rows - 1}",
            where=where,
            fix="use the model's own tokenizer, or model.resize_token_embeddings(len(tokenizer))",
        )


def table_of_positions(config: Any) -> int | None:
    """Rows of a model's table of positions; ``None`` for positions of another kind."""
    most, rope = (getattr(config, n, None) for n in ("max_position_embeddings", "rope_parameters"))
    return int(most) if most and rope is None and not getattr(config, "alibi", False) else None


def warn_of_length(tokens: int, context: int | None) -> None:
    """Say where a prompt is longer than its model was made for."""
    if context is not None and tokens > context:
        _log.warning(
            "a prompt of %d tokens, and the model was made for %d, answers included: what it says "
            "may make no sense",
            tokens,
            context,
        )


def warn_of_tokens(tokenizer: Any, rows: int) -> None:
    """Say which of the tokenizer's added tokens a model of so many rows has none for."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    lacking = [i for i in sorted(added) if i >= rows]
    if lacking:
        names = ", ".join(f"{str(added[i])!r} ({i})" for i in lacking[:5])
        warnings.warn(
            f"the model has {rows} rows and none for these tokens of its tokenizer: {names}; "
            "prompts with them are refused",
            stacklevel=4,
        )

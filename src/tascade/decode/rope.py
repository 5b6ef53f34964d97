"""Rotary position embeddings whose frequencies depend on the length of the text.

Two kinds of them are in use: dynamic NTK scaling, where every token beyond the trained length
changes the frequencies, and LongRoPE (arXiv 2402.13753), which has two sets of factors and changes
from one to the other at the length that the model was first trained for.
"""

from __future__ import annotations

from typing import Any


class Rope:
    """What a model's rotary frequencies ask of whoever keeps its cache.

    Attributes:
        edge: last length of text with the usual frequencies, or of the table of positions; ``None``
            where positions never change.
        by_longest: frequencies depend on the longest text of a batch.
        rereads: when the text passes ``edge``, the model's own ``generate`` computes all keys anew
            with the other factors, instead of keeping those that are cached (the Phi-3 family).
    """

    def __init__(self, model: Any) -> None:
        config = model.config.get_text_config()
        kinds = _rope_types(config)
        self.edge = _edge(config, kinds)
        self.by_longest = bool(kinds & {"dynamic", "longrope"})
        own = type(model).prepare_inputs_for_generation is not _usual_preparation()
        marked = getattr(config, "original_max_position_embeddings", None) is not None
        self.rereads = own and marked and "longrope" in kinds
        self._steady_beyond = "longrope" in kinds and "dynamic" not in kinds
        self._dynamic = [
            module
            for module in (model.modules() if "dynamic" in kinds else ())
            if hasattr(module, "max_seq_len_cached")
        ]

    @property
    def changes(self) -> bool:
        """Whether keys depend on how long the text is that they were computed in."""
        return self.by_longest or self.rereads

    def room(self, base: int) -> int | None:
        """How deep a draft may be behind ``base`` tokens; ``None`` for any depth.

        A pass that reaches beyond the edge computes all its tokens with other frequencies: a draft
        may not look further than plain decoding.
        """
        if self.edge is None or (self._steady_beyond and base > self.edge):
            return None
        return max(0, self.edge - base)

    def reset(self) -> None:
        """Before a forward: have its frequencies depend on its own length alone.

        Transformers keeps those of the longest text so far in the module, and takes them back for
        a text shorter than the trained length alone: what a request got depended on those before.
        """
        for module in self._dynamic:
            for name, original in list(module.named_buffers(recurse=False)):
                kind, found, _ = name.partition("original_inv_freq")  # "", or a kind of layer
                if not found:
                    continue
                used = f"{kind}inv_freq"
                device = getattr(module, used).device
                module.register_buffer(used, original.to(device), persistent=False)
                setattr(module, f"{kind}max_seq_len_cached", module.original_max_seq_len)

    def is_stale(self, long: bool, length: int) -> bool:
        """Whether cached keys must be computed anew for a text of ``length`` tokens.

        ``long``: they were computed in a text that had passed the edge.
        """
        return self.rereads and long != self.is_long(length)

    def is_long(self, length: int) -> bool:
        """Whether a text of so many tokens has passed the edge."""
        return self.edge is not None and length > self.edge


def _rope_types(config: Any) -> set[str | None]:
    rope = getattr(config, "rope_parameters", None) or {}
    groups = [rope, *(v for v in rope.values() if isinstance(v, dict))]
    return {group.get("rope_type") for group in groups}


def _edge(config: Any, kinds: set[str | None]) -> int | None:
    rope = getattr(config, "rope_parameters", None)
    most = getattr(config, "max_position_embeddings", None)
    if rope is None:
        return most  # a table of positions: nothing lies beyond it
    groups = [rope, *(v for v in rope.values() if isinstance(v, dict))]
    starts = [group.get("original_max_position_embeddings") for group in groups]
    start = next(
        (s for s in starts if s), getattr(config, "original_max_position_embeddings", most)
    )
    if "dynamic" in kinds:
        return min((n for n in (start, most) if n), default=1)
    return (start or most) if "longrope" in kinds else None


def _usual_preparation() -> Any:
    from transformers.generation import GenerationMixin

    return GenerationMixin.prepare_inputs_for_generation

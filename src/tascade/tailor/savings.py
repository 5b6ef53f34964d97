"""What a list of tokens is worth for a model: what it lacks, and the memory it saves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tascade.core import IntArray, Row
from tascade.tailor.head import BatchHead
from tascade.tailor.offload.table import RowTable
from tascade.tailor.profile import Profile

_MOST_PROMPTS = 0.95


@dataclass(frozen=True, slots=True)
class HeadSavings:
    """A task's tokens, and what leaving out the others saves on the device.

    profile: the list, with what held-out answers lack of it.
    prompt_mean: distinct tokens that a held-out prompt brings on top, on average; ``None`` where
        there are no prompts. prompt_most: as many at most, in 95 % of them.
    full_bytes: of embedding and LM head, once if they are one table.
    tailored_bytes: of the small head, with its room for a request's own tokens; the embedding is
        off the device then.
    model_bytes: of all weights, with the full tables.
    """

    profile: Profile
    prompt_mean: float | None
    prompt_most: int
    full_bytes: int
    tailored_bytes: int
    model_bytes: int

    @property
    def saved(self) -> float:
        """Share of the vocabulary's bytes that is saved."""
        return 1 - self.tailored_bytes / self.full_bytes

    @property
    def model_saved(self) -> float:
        """Share of the whole model's bytes that is saved."""
        return (self.full_bytes - self.tailored_bytes) / self.model_bytes

    def to_json(self) -> dict[str, Any]:
        """As plain numbers and text."""
        p, held_out = self.profile, self.profile.held_out
        return {
            "tokens": len(p.ids),
            "of_tokens": p.vocab_size,
            "documents": p.documents,
            "counted": p.counted,
            "tolerance": p.tolerance,
            "missing_per_answer": p.missing,
            "prompt_tokens": None
            if self.prompt_mean is None
            else {"mean": self.prompt_mean, "p95": self.prompt_most},
            "held_out_documents": 0 if held_out is None else held_out.documents,
            "held_out_missing_per_answer": None if held_out is None else held_out.per_document,
            "held_out_low": None if held_out is None else held_out.low,
            "held_out_high": None if held_out is None else held_out.high,
            "held_out_covered": None if held_out is None else held_out.share,
            "vocabulary_bytes": {
                "full": self.full_bytes,
                "tailored": self.tailored_bytes,
                "saved": self.saved,
            },
            "model_saved": self.model_saved,
        }

    def describe(self) -> str:
        """A few lines for people."""
        p, held_out = self.profile, self.profile.held_out
        whose = "the model's own" if p.counted == "own" else "the data's"
        lines = [
            f"{len(p.ids):,} of {p.vocab_size:,} tokens, counted on {p.documents:,} answers "
            f"({whose}); {p.missing:.4f} missing in an answer"
        ]
        if self.prompt_mean is not None:
            lines.append(
                f"a held-out prompt adds {self.prompt_mean:.1f} more on average, "
                f"{self.prompt_most:,} or fewer in 95% of them"
            )
        if held_out is not None and held_out.documents:
            lines.append(
                f"held out ({held_out.documents:,} answers): {held_out.share:.2%} of tokens "
                "covered by the list, the prompt and the answer so far; "
                f"{held_out.per_document:.3f} missing in an answer "
                f"[95%: {held_out.low:.3f} to {held_out.high:.3f}]"
            )
        lines.append(
            f"vocabulary on the device: {self.tailored_bytes / 1e6:.2f} MB of "
            f"{self.full_bytes / 1e6:.1f}, with room for a request's own tokens "
            f"({self.saved:.1%} less; the whole model {self.model_saved:.1%} less)"
        )
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class Tailoring:
    """A pack's list of tokens, the head it uses now, where the tables are, and what that saves.

    With ``tables`` on the ``device`` it saves time alone: ``gain`` is what it would be without.
    ``left_out``: of the model's own answers, where they were counted, how many prompts of each part
    there was no time for.
    """

    pack: str
    head: str
    gain: HeadSavings
    tables: str = "file"
    left_out: dict[str, int] | None = None

    def to_json(self) -> dict[str, Any]:
        """As plain numbers and text."""
        told: dict[str, Any] = {"pack": self.pack, "head": self.head, "tables": self.tables}
        if self.left_out is not None:
            told["left_out"] = self.left_out
        return {**told, **self.gain.to_json()}

    def describe(self) -> str:
        """A few lines for people."""
        whole = "; the tables stay on the device, no memory is saved"
        late = sum((self.left_out or {}).values())
        note = f"\n{late} prompts left out: no time was left to answer them" if late else ""
        head = f"head: {self.head}{whole * (self.tables == 'device')}"
        return f"{self.gain.describe()}{note}\n{head}"


def head_savings(model: Any, profile: Profile, held_out: Sequence[Row]) -> HeadSavings:
    """What a profile gives for a model.

    Args:
        model: a Transformers causal LM, loaded with its tables.
        profile: for that model.
        held_out: rows whose prompts are looked at; those without one are left out.
    """
    brought = [
        len(np.setdiff1d(prompt, profile.ids)) for prompt, _ in held_out if prompt is not None
    ]
    most = 0
    if brought:
        most = int(np.quantile(brought, _MOST_PROMPTS, method="inverted_cdf"))
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    tables = {id(table): table for table in (embedding, head.weight)}
    return HeadSavings(
        profile=profile,
        prompt_mean=float(np.mean(brought)) if brought else None,
        prompt_most=most,
        full_bytes=sum(table.nbytes for table in tables.values()),
        tailored_bytes=head_bytes(head, profile.ids, most, dtype=model.dtype),
        model_bytes=sum(part.nbytes for part in model.parameters()),
    )


def head_bytes(head: Any, ids: IntArray, own: int, *, dtype: Any) -> int:
    """Bytes of a tailored head once a request has brought tokens of its own.

    Args:
        head: the full LM head, whose rows it would have.
        ids: [n] its static tokens.
        own: how many a request brings.
        dtype: of its rows.
    """
    table = RowTable.from_tensor(head.weight.detach().cpu())
    others = np.setdiff1d(np.arange(table.shape[0]), ids)
    # The head itself says what it takes; on this device there is nothing to take it from.
    small = BatchHead(table, ids, bias=getattr(head, "bias", None), device="meta", dtype=dtype)
    small.add_request(others[:own])
    return small.nbytes

"""What a list of tokens is worth for a model: what it lacks, and the memory it saves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from tascade.core import IntArray, Row
from tascade.tailor.head import BatchHead, RequestHead
from tascade.tailor.offload.table import RowTable
from tascade.tailor.profile import Profile
from tascade.tailor.tailored import measure_head

_MOST_PROMPTS = 0.95


PAYS = 1.05
"""A speed-up at best below which a small head is worth its while for memory alone."""
_TOO_MANY = 10
"""Times the tolerance; held-out answers that lack more say that the list does not fit them."""


@dataclass(frozen=True, slots=True)
class HeadTime:
    """Seconds on this machine: of a plain step, and of the LM head's product in it, with all tokens
    and with the task's.
    """

    step: float
    full: float
    small: float

    @property
    def best(self) -> float:
        """Speed-up of a step if nothing were lost to checks."""
        return self.step / max(self.step - self.full + self.small, 1e-9)

    def describe(self) -> str:
        """A line for people."""
        share = f"the full LM head takes {self.full / self.step:.0%} of a step, the small one "
        share += f"{self.small / self.step:.0%}"
        if self.best < PAYS:
            return f"in time it does not pay: {share}; at best {self.best:.2f}x. It saves memory"
        return f"in time: {share}; at best {self.best:.2f}x, less what checks cost an exact head"


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
    time: of a step and its heads, where it was measured.
    """

    profile: Profile
    prompt_mean: float | None
    prompt_most: int
    full_bytes: int
    tailored_bytes: int
    model_bytes: int
    time: HeadTime | None = None

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
            "time": None if self.time is None else {**asdict(self.time), "best": self.time.best},
        }

    def brief(self) -> str:
        """One line: what the list saves, and whether it fits."""
        p, held_out = self.profile, self.profile.held_out
        text = f"{len(p.ids):,} of {p.vocab_size:,} tokens, {self.saved:.1%} of their bytes less"
        if self.time is not None:
            text += f", at best {self.time.best:.2f}x in time"
        if held_out is not None and held_out.documents:
            text += f"; held-out answers lack {_lacked(held_out.per_document)}"
            text += ", too many" * self._too_many
        return text

    @property
    def _too_many(self) -> bool:
        p, held_out = self.profile, self.profile.held_out
        return held_out is not None and held_out.low > _TOO_MANY * p.tolerance

    def describe(self) -> str:
        """A few lines for people."""
        p, held_out = self.profile, self.profile.held_out
        whose = "the model's own" if p.counted == "own" else "the data's"
        lines = [
            f"{len(p.ids):,} of {p.vocab_size:,} tokens, counted on {p.documents:,} answers "
            f"({whose}), which lack {_lacked(p.missing)}"
        ]
        if self.prompt_mean is not None:
            lines.append(
                f"a held-out prompt adds {self.prompt_mean:.1f} tokens of its own on average, "
                f"{self.prompt_most:,} or fewer in 95% of them"
            )
        if held_out is not None and held_out.documents:
            lines.append(
                f"{held_out.documents:,} held-out answers: {held_out.share:.2%} of their tokens "
                f"are on the list, in the prompt or in the answer so far; they lack "
                f"{_lacked(held_out.per_document)} "
                f"[95%: {held_out.low:.3f} to {held_out.high:.3f} tokens]"
            )
            if self._too_many:
                lines.append(
                    f"that is {held_out.per_document / p.tolerance:.0f} times the tolerance of "
                    f"{p.tolerance:g}: the list does not fit answers like these; give more "
                    "training rows, or the model's own answers (--self), or leave it unused "
                    "(--head full)"
                )
        lines.append(
            f"vocabulary on the device: {self.tailored_bytes / 1e6:.2f} MB of "
            f"{self.full_bytes / 1e6:.1f}, with room for a request's own tokens "
            f"({self.saved:.1%} less; the whole model {self.model_saved:.1%} less)"
        )
        if self.time is not None:
            lines.append(self.time.describe())
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


def _lacked(per_answer: float) -> str:
    """A mean number of tokens in words that cannot be taken for a share."""
    if not per_answer:
        return "no token of it"
    if per_answer < 0.5:
        return f"one token of it in {1 / per_answer:,.0f} answers on average"
    return f"{per_answer:.1f} tokens of it an answer on average"


def head_savings(
    model: Any, profile: Profile, held_out: Sequence[Row], step: float | None = None
) -> HeadSavings:
    """What a profile gives for a model.

    Args:
        model: a Transformers causal LM, loaded with its tables.
        profile: for that model.
        held_out: rows whose prompts are looked at; those without one are left out.
        step: seconds of one of the model's steps here; with it the heads are timed.
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
        time=None if step is None else _head_time(head, profile.ids, step),
    )


def _head_time(head: Any, ids: IntArray, step: float) -> HeadTime:
    """Time a head for one state, with all of its rows and with some of them."""
    weight, bias = head.weight, getattr(head, "bias", None)
    table = RowTable.from_tensor(weight.detach().cpu())
    small = RequestHead(table, ids, bias=bias, device=weight.device, dtype=weight.dtype)
    full, part = (
        float(measure_head(one, small, weight.dtype).upto(1)[-1]) for one in (head, small)
    )
    full = min(full, step)
    return HeadTime(step, full, min(part, full))


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

"""`tascade tailor`: the tokens a task needs, listed in a pack that is there already."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tascade.config import Recipe, VocabConfig
from tascade.model import TaskModel
from tascade.own import own_answers
from tascade.pack import Pack
from tascade.pipeline import Progress, prepare, silent
from tascade.tailored import keep_vocabulary
from tascade.vocab.counts import count_documents
from tascade.vocab.profile import Profile, build_profile


@dataclass(frozen=True, slots=True)
class Tailoring:
    """A task's tokens, and what leaving out the others saves.

    ``row_bytes``: of one token in the head; ``body_bytes``: of all weights that are not vocabulary;
    ``tables``: 1 where embedding and head are one table, else 2.
    """

    pack: str
    profile: Profile
    head: str
    row_bytes: int
    body_bytes: int
    tables: int

    def to_json(self) -> dict[str, Any]:
        """As plain numbers and text."""
        p, full = self.profile, self.tables * self.profile.vocab_size * self.row_bytes
        kept = len(p.ids) * self.row_bytes
        held_out = p.held_out
        return {
            "pack": self.pack,
            "head": self.head,
            "tokens": len(p.ids),
            "of_tokens": p.vocab_size,
            "documents": p.documents,
            "counted": p.counted,
            "missing_per_answer": p.missing,
            "held_out_missing_per_answer": None if held_out is None else held_out.per_document,
            "held_out_low": None if held_out is None else held_out.low,
            "held_out_high": None if held_out is None else held_out.high,
            "held_out_covered": None if held_out is None else held_out.share,
            "vocabulary_bytes": {"full": full, "tailored": kept, "saved": 1 - kept / full},
            "model_saved": (full - kept) / (full + self.body_bytes),
        }

    def describe(self) -> str:
        """A few lines for people."""
        found = self.to_json()
        lines = [
            f"{found['tokens']:,} of {found['of_tokens']:,} tokens, counted on "
            f"{found['documents']:,} answers ({found['counted']}); "
            f"{found['missing_per_answer']:.4f} missing an answer",
        ]
        if self.profile.held_out is not None:
            lines.append(
                f"held out: {found['held_out_covered']:.2%} of tokens covered by the list, the "
                f"prompt and the answer so far; {found['held_out_missing_per_answer']:.3f} missing "
                f"an answer [95%: {found['held_out_low']:.3f} to {found['held_out_high']:.3f}]"
            )
        sizes = found["vocabulary_bytes"]
        lines.append(
            f"vocabulary on the device: {sizes['tailored'] / 1e6:.2f} MB of "
            f"{sizes['full'] / 1e6:.1f} ({sizes['saved']:.1%} less; the whole model "
            f"{found['model_saved']:.1%} less); head: {self.head}"
        )
        return "\n".join(lines)


def tailor(
    pack: str | Path,
    data: Any,
    *,
    held_out: Any = None,
    config: VocabConfig | None = None,
    own: bool = False,
    on_error: str = "raise",
    progress: Progress | None = None,
) -> Tailoring:
    """List the tokens that a task's answers need, and have its pack use a head of those.

    Args:
        pack: an adapted task.
        data: the training examples.
        held_out: examples to measure coverage on; a share of ``data`` if absent.
        config: tolerance and head; ``exact`` by default.
        own: count the model's own answers, not the references.
        on_error: raise, or skip rows that cannot be used.
        progress: called with (stage, done, total).

    Raises:
        PackError: no pack there.
        DataError: a row cannot be used, or there are none.
        ConfigError: a setting is out of range.
    """
    config, tell = config or VocabConfig(head="exact"), progress or silent
    task_model = TaskModel.from_pretrained(pack, head="full")
    recipe = Recipe(max_new_tokens=task_model.pack.info.max_new_tokens)
    recipe = replace(recipe, data=replace(recipe.data, on_error=on_error))
    ends, tokenizer = task_model.ends, task_model.tokenizer
    prepared = prepare(tokenizer, ends, data, held_out, recipe, tell)
    rows, checked = prepared.train, prepared.validation
    if own:
        params, decoder = task_model.params(), task_model.decoder
        seconds = recipe.spec.own_seconds
        rows, _ = own_answers(decoder, rows, params, seconds=seconds, tell=tell)
        checked, _ = own_answers(decoder, checked, params, seconds=seconds, tell=tell)
    profile = build_profile(
        count_documents(rows),
        tokenizer,
        ends,
        vocab_size=task_model.pack.info.vocab_size,
        tolerance=config.tolerance,
        counted="own" if own else "gold",
        held_out=checked,
    )
    keep_vocabulary(task_model.pack, tokenizer, profile, config)
    return measured(task_model.pack, task_model.model, profile, config)


def measured(pack: Pack, model: Any, profile: Profile, config: VocabConfig) -> Tailoring:
    """What a profile saves of a model."""
    table = model.get_input_embeddings().weight
    tied = model.get_output_embeddings().weight is table
    tables = 1 if tied else 2
    whole = sum(p.numel() * p.element_size() for p in model.parameters())
    vocabulary = tables * table.numel() * table.element_size()
    row_bytes = table.shape[1] * table.element_size()
    return Tailoring(str(pack.path), profile, config.head, row_bytes, whole - vocabulary, tables)

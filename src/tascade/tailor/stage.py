"""`tascade tailor`: the tokens a task needs, listed in a pack that is there already."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tascade.answers import count_prompts, enough_own, own_answers
from tascade.config import Recipe, VocabConfig
from tascade.core import Progress
from tascade.enrich.tokens.stored import read_tokens
from tascade.model import TaskModel
from tascade.pipeline import own_held_out, prepare, silent
from tascade.tailor.counts import count_documents
from tascade.tailor.profile import build_profile
from tascade.tailor.savings import HeadSavings, head_savings
from tascade.tailor.tailored import keep_vocabulary


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
        config: tolerance, scripts and head; ``exact`` by default.
        own: count the model's own answers, not the references.
        on_error: raise, or skip rows that cannot be used.
        progress: called with (stage, done, total).

    Raises:
        PackError: no pack there.
        DataError: a row cannot be used, or there are none.
        ConfigError: a setting is out of range, or there was no time for enough own answers.
    """
    config, tell = config or VocabConfig(head="exact"), progress or silent
    task_model = TaskModel.from_pretrained(pack, head="full")
    tokens = task_model.pack.info.max_new_tokens
    recipe = Recipe(max_new_tokens=tokens, chat=task_model.chat)
    recipe = replace(recipe, data=replace(recipe.data, on_error=on_error))
    ends, tokenizer = task_model.ends, task_model.tokenizer
    merger = read_tokens(task_model.pack.model)
    prepared = prepare(tokenizer, ends, data, held_out, recipe, tell, merger)
    rows, checked, left_out = prepared.train, prepared.validation, None
    if own:
        params, seconds = task_model.params(), recipe.spec.own_seconds
        rows, _ = own_answers(task_model.decoder, rows, params, seconds=seconds, tell=tell)
        enough_own(len(rows), prepared.train, "training prompts", seconds)
        checked, late = own_held_out(task_model, checked, recipe, tell)
        left_out = {"train": count_prompts(prepared.train) - len(rows), "held_out": late}
    profile = build_profile(
        count_documents(rows),
        tokenizer,
        ends,
        vocab_size=task_model.pack.info.vocab_size,
        tolerance=config.tolerance,
        scripts=config.scripts,
        counted="own" if own else "gold",
        held_out=checked,
    )
    keep_vocabulary(task_model.pack, tokenizer, profile, config)
    gain = head_savings(task_model.model, profile, checked)
    return Tailoring(str(task_model.pack.path), config.head, gain, config.tables, left_out)

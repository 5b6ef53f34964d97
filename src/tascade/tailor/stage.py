"""The list of tokens that a task needs, and what `tascade tailor` says of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tascade.config import VocabConfig
from tascade.core import Row
from tascade.data.encode import end_tokens
from tascade.tailor.counts import count_documents
from tascade.tailor.profile import Profile, build_profile
from tascade.tailor.savings import VocabularyGain


def list_tokens(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    held_out: Sequence[Row],
    config: VocabConfig,
    *,
    own: bool = False,
    fingerprint: str = "",
) -> Profile:
    """List the tokens that a task's answers need.

    Args:
        model: what answers.
        tokenizer: the model's.
        rows: whose answers are counted.
        held_out: to measure the list on.
        config: tolerance and scripts.
        own: whether the answers are the model's own.
        fingerprint: of the tokenizer, where it is known already.

    Raises:
        ConfigError: see :func:`tascade.tailor.profile.build_profile`.
    """
    return build_profile(
        count_documents(rows),
        tokenizer,
        end_tokens(model, tokenizer),
        vocab_size=int(model.config.get_text_config().vocab_size),
        tolerance=config.tolerance,
        scripts=config.scripts,
        counted="own" if own else "gold",
        held_out=held_out,
        fingerprint=fingerprint,
    )


@dataclass(frozen=True, slots=True)
class Tailoring:
    """A pack's list of tokens, the head it uses now, where the tables are, and what that saves.

    With ``tables`` on the ``device`` it saves time alone: ``gain`` is what it would be without.
    ``left_out``: of the model's own answers, where they were counted, how many prompts of each part
    there was no time for.
    """

    pack: str
    head: str
    gain: VocabularyGain
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

"""Does a tokenizer with new tokens still say and read everything as the base one does?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tokenizers.decoders import DecodeStream

from tascade.data.encode import encode_text
from tascade.enrich.tokens.merger import Merger

_SHOWN = 5


@dataclass(slots=True)
class ExtensionReport:
    """What was checked, and every way in which it failed (the first few of each kind)."""

    prompts: int = 0
    outputs: int = 0
    tokens: int = 0
    failures: dict[str, list[str]] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether nothing failed."""
        return not self.failures

    def fail(self, kind: str, what: object) -> None:
        """Note a failure."""
        shown = self.failures.setdefault(kind, [])
        if len(shown) < _SHOWN:
            shown.append(str(what)[:200])


def check_extension(
    base: Any,
    extended: Any,
    merger: Merger,
    prompts: Sequence[str] = (),
    outputs: Sequence[str] = (),
) -> ExtensionReport:
    """Compare an extended tokenizer with its base.

    Args:
        base: the fast Transformers tokenizer there was.
        extended: the one with new tokens.
        merger: writes base ids with the new ones.
        prompts: texts that must be read alike.
        outputs: answers that must be said alike when merged.

    Returns:
        What failed: special ids, prompts, merging, or decoding (whole and in a stream).
    """
    report = ExtensionReport(len(prompts), len(outputs), len(merger))
    _check_specials(base, extended, report)
    for prompt in prompts:
        both = [encode_text(one, prompt, special=True).tolist() for one in (base, extended)]
        if both[0] != both[1]:
            report.fail("a prompt is read differently", repr(prompt))
    for number, expansion in enumerate(merger.expansions):
        _check_said(base, extended, [merger.first + number], list(expansion), report)
    for output in outputs:
        ids = encode_text(base, output).tolist()
        merged = merger.merge(ids).tolist()
        if merger.unmerge(merged).tolist() != ids:
            report.fail("merging is not undone by unmerging", repr(output))
        if len(merged) > len(ids):
            report.fail("merging makes an answer longer", repr(output))
        _check_said(base, extended, merged, ids, report)
    return report


def _check_specials(base: Any, extended: Any, report: ExtensionReport) -> None:
    before = {number: str(token) for number, token in base.added_tokens_decoder.items()}
    after = {number: str(token) for number, token in extended.added_tokens_decoder.items()}
    if before != after:
        report.fail("special or added ids have changed", set(before.items()) ^ set(after.items()))
    for number, content in before.items():
        if extended.convert_tokens_to_ids(content) != number:
            report.fail("special or added ids have changed", (content, number))
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id"):
        if getattr(base, name, None) != getattr(extended, name, None):
            report.fail("special or added ids have changed", name)


def _check_said(
    base: Any, extended: Any, merged: list[int], ids: list[int], report: ExtensionReport
) -> None:
    wanted = base.decode(ids)
    if extended.decode(merged) != wanted:
        report.fail("decoded text differs", (extended.decode(merged), wanted))
    whole = base.backend_tokenizer.decode(ids)
    said = _streamed(extended.backend_tokenizer, merged)
    if said != _streamed(base.backend_tokenizer, ids) or not whole.startswith(said):
        report.fail("streamed text differs", (said, whole))


def _streamed(tokenizer: Any, ids: list[int]) -> str:
    stream = DecodeStream(skip_special_tokens=True)
    return "".join(stream.step(tokenizer, token) or "" for token in ids)

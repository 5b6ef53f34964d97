"""A tokenizer with new tokens that only answers use: prompts are read as before, which is checked.

A new token is an entry of the vocabulary that no merge leads to, so that reading text never finds
it; writing text from it is what every engine does with any token. Tokens added the usual way
(``add_tokens``) are matched in text instead, and cut the tokens around them.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers.decoders import DecodeStream

from tascade.data.encode import encode_text
from tascade.enrich.tokens.family import TokenizerFamily
from tascade.enrich.tokens.merger import TokenMerger
from tascade.errors import ConfigError
from tascade.util.files import write_atomic
from tascade.util.places import forget_places

TOKENIZER_FILE = "tokenizer.json"
_SHOWN = 5


def extended_layout(
    family: TokenizerFamily, expansions: Sequence[Sequence[int]], first: int
) -> dict[str, Any]:
    """The contents of ``tokenizer.json`` with new tokens.

    Args:
        family: the base tokenizer's.
        expansions: base ids of each new token.
        first: the id of the first one; the others follow.

    Raises:
        ConfigError: ids that are taken, or base ids that must not become one token.
    """
    if first < family.size:
        raise ConfigError(
            "the ids of the new tokens are taken",
            got=f"the first one is {first}",
            wanted=f"{family.size} or more",
        )
    layout = copy.deepcopy(family.layout)
    vocabulary: dict[str, int] = layout["model"]["vocab"]
    # The library numbers added tokens behind the vocabulary unless the vocabulary holds them: a
    # longer one would move every special id.
    vocabulary |= {content: number for number, content in family.added.items()}
    for number, expansion in enumerate(expansions):
        string = family.spell(expansion)
        if string is None or string in vocabulary:
            raise ConfigError(
                "these ids must not become one token",
                got=list(expansion),
                wanted="plain ids that begin and end with a character, as choose() gives them",
                where=f"new token {number}",
            )
        vocabulary[string] = first + number
    return layout


def save_extended(
    tokenizer: Any, expansions: Sequence[Sequence[int]], first: int, folder: Path
) -> None:
    """Write a tokenizer with new tokens; any Transformers or vLLM opens it.

    Args:
        tokenizer: the base tokenizer, which stays as it is.
        expansions: base ids of each new token.
        first: the id of the first one.
        folder: where its files go; there may be others.

    Raises:
        ConfigError: see :func:`extended_layout`, or a tokenizer of another kind.
    """
    layout = extended_layout(TokenizerFamily(tokenizer), expansions, first)
    tokenizer.save_pretrained(folder)
    forget_places(Path(folder) / "tokenizer_config.json")
    text = json.dumps(layout, ensure_ascii=False, indent=1)
    write_atomic(Path(folder) / TOKENIZER_FILE, text.encode())


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
    merger: TokenMerger,
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

"""The tokens a task's answers need, whatever the prompt: VocabTailor's static list."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tascade.config import VocabConfig
from tascade.core import IntArray, Row
from tascade.data.encode import end_tokens
from tascade.data.encode import fingerprint as tokenizer_fingerprint
from tascade.errors import ConfigError, FingerprintError, PackError
from tascade.tailor.counts import (
    MOST_TOKENS,
    Coverage,
    DocumentCounts,
    count_documents,
    measure_coverage,
)
from tascade.tailor.required import Charset, pinned_tokens
from tascade.util.files import write_atomic

FORMAT, VERSION = "tascade-vocabulary", 1
_MOST_BYTES = 64 << 20
_MOST_TOLERANCE = 1e9
_COUNTED = ("gold", "own")


@dataclass(frozen=True, slots=True)
class Profile:
    """A list of tokens, and what it was made from.

    ids: [n] int32, ascending; those that are always kept among them.
    counts: [n] int64, documents whose answer has the token and whose prompt has not.
    vocab_size: rows of the model's LM head.
    fingerprint: of the tokenizer (see :func:`tascade.data.encode.fingerprint`).
    corpus: sha256 of what was counted. documents: how many. counted: ``own`` or ``gold`` answers.
    tolerance: what was asked for. missing: tokens an answer lacks, on average, on those documents.
    held_out: coverage of answers that were not counted.
    """

    ids: IntArray
    counts: npt.NDArray[np.int64]
    vocab_size: int
    fingerprint: str
    corpus: str
    documents: int
    counted: str
    tolerance: float
    missing: float
    held_out: Coverage | None = None

    def save(self, path: str | Path, tokenizer: Any = None) -> None:
        """Write it as JSON, a token a line: id, documents, and its string where there is one."""
        names: list[Any] = [None] * len(self.ids)
        if tokenizer is not None:
            names = tokenizer.convert_ids_to_tokens(self.ids.tolist())
        head = {"format": FORMAT, "version": VERSION}
        head |= {f.name: getattr(self, f.name) for f in fields(self)[2:]}
        head["held_out"] = None if self.held_out is None else asdict(self.held_out)
        lines = [
            json.dumps([token, count, name], ensure_ascii=False)
            for token, count, name in zip(
                self.ids.tolist(), self.counts.tolist(), names, strict=True
            )
        ]
        text = (
            json.dumps(head, indent=1)[:-2] + ',\n "tokens": [\n' + ",\n".join(lines) + "\n]\n}\n"
        )
        write_atomic(Path(path), text.encode())

    @classmethod
    def load(cls, path: str | Path, *, vocab_size: int, fingerprint: str) -> Profile:
        """Read a list, for a model of this vocabulary.

        Raises:
            PackError: no such file, or not one written by :meth:`save`.
            FingerprintError: it was made for another tokenizer, or another size of vocabulary.
        """
        file = Path(path)
        try:
            with file.open("rb") as opened:
                content = opened.read(_MOST_BYTES + 1)
            if len(content) > _MOST_BYTES:
                raise ValueError("the file is too large")
            profile = _parsed(json.loads(content))
        except (OSError, ValueError, KeyError, TypeError, RecursionError, OverflowError) as error:
            raise PackError(
                "cannot read the tailored vocabulary",
                got=f"{type(error).__name__}: {error}"[:300],
                wanted="a file written by `tascade tailor`",
                where=str(file),
                fix="run `tascade tailor` again",
            ) from error
        if (profile.fingerprint, profile.vocab_size) != (fingerprint, vocab_size):
            raise FingerprintError(
                "this vocabulary was made for another tokenizer",
                got=f"tokenizer {fingerprint}, {vocab_size} rows",
                wanted=f"tokenizer {profile.fingerprint}, {profile.vocab_size} rows",
                where=str(file),
                fix="run `tascade tailor` again, for this model",
            )
        return profile


def _parsed(raw: Any) -> Profile:
    if (raw["format"], raw["version"]) != (FORMAT, VERSION):
        raise ValueError(f"{raw['format']!r} version {raw['version']!r}")
    size, documents = _whole(raw["vocab_size"], 1, MOST_TOKENS), _whole(raw["documents"])
    tokens = [(_whole(t, 0, size - 1), _whole(n, 0, documents)) for t, n, _ in raw["tokens"]]
    ids = [token for token, _ in tokens]
    if any(a >= b for a, b in pairwise(ids)):
        raise ValueError("token ids do not ascend")
    if raw["counted"] not in _COUNTED:
        raise ValueError(f"counted {raw['counted']!r:.40}")
    tolerance = _number(raw["tolerance"])
    held_out = raw["held_out"]
    return Profile(
        ids=np.asarray(ids, np.int32),
        counts=np.asarray([count for _, count in tokens], np.int64),
        vocab_size=size,
        fingerprint=_text(raw["fingerprint"]),
        corpus=_text(raw["corpus"]),
        documents=documents,
        counted=raw["counted"],
        tolerance=tolerance,
        missing=_number(raw["missing"], tolerance),
        held_out=None if held_out is None else _coverage(held_out),
    )


def _coverage(raw: dict[str, Any]) -> Coverage:
    documents, tokens, high = _whole(raw["documents"]), _whole(raw["tokens"]), _number(raw["high"])
    misses = _whole(raw["misses"], 0, tokens)
    return Coverage(
        documents=documents,
        tokens=tokens,
        misses=misses,
        missed_documents=_whole(raw["missed_documents"], 0, min(documents, misses)),
        per_document=_number(raw["per_document"], high),
        low=_number(raw["low"], high),
        high=high,
        share=_number(raw["share"], 1.0),
    )


def _whole(value: Any, least: int = 0, most: int = 1 << 53) -> int:
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{value!r:.40} is not a whole number from {least} to {most}")
    return value


def _number(value: Any, most: float = _MOST_TOLERANCE) -> float:
    if type(value) not in (int, float) or not 0 <= value <= most:
        raise ValueError(f"{value!r:.40} is not a number from 0 to {most}")
    return float(value)


def _text(value: Any) -> str:
    if not isinstance(value, str) or len(value) > 1000:
        raise ValueError("not a short text")
    return value


def list_tokens(
    loaded: tuple[Any, Any],
    rows: Iterable[Row],
    held_out: Iterable[Row],
    config: VocabConfig,
    *,
    own: bool = False,
    fingerprint: str = "",
) -> Profile:
    """:func:`build_profile` of rows for a loaded model and its tokenizer, as ``config`` wants it.

    ``own``: whether the answers are the model's own, and not the references.
    """
    return build_profile(
        count_documents(rows),
        loaded[1],
        end_tokens(*loaded),
        vocab_size=int(loaded[0].config.get_text_config().vocab_size),
        tolerance=config.tolerance,
        scripts=config.scripts,
        counted="own" if own else "gold",
        held_out=held_out,
        fingerprint=fingerprint,
    )


def build_profile(
    counts: DocumentCounts,
    tokenizer: Any,
    ends: Sequence[int],
    *,
    vocab_size: int,
    tolerance: float = 0.01,
    scripts: Sequence[str] = (),
    counted: str = "gold",
    held_out: Iterable[Row] | None = None,
    fingerprint: str = "",
) -> Profile:
    """List the tokens that answers need and prompts do not bring (2508.15229, section 3.3).

    Three stages: tokens that answers have and their own prompts have not; of these, tokens that
    ``scripts`` write; of these, all but the rarest, as far as ``tolerance`` allows. What the second
    stage leaves out counts against the tolerance too, and comes back where it is too much. Bytes,
    added tokens, end tokens, white space and digits are in the list whatever the counts say.

    Args:
        counts: of the task's answers.
        tokenizer: the model's.
        ends: the model's end tokens.
        vocab_size: rows of the model's LM head.
        tolerance: how many distinct tokens an answer may lack, on average, on what was counted.
        scripts: names in :data:`tascade.tailor.required.SCRIPTS`; none leaves the second stage out.
        counted: ``own`` or ``gold``, whose answers were counted.
        held_out: rows that were not counted, to measure coverage on.
        fingerprint: of the tokenizer, where it is known already.

    Raises:
        ConfigError: an unknown script, a tolerance below 0 or not finite, or ids of answers or end
            tokens beyond ``vocab_size``.
    """
    _check(counts, ends, vocab_size, tolerance, counted)
    pins = pinned_tokens(tokenizer, ends)
    pins = pins[pins < vocab_size]  # a tokenizer may have more entries than a model has rows
    missing = np.zeros(vocab_size, np.int64)
    missing[: len(counts.missing)] = counts.missing
    missing[pins] = 0  # never lacking
    foreign = _foreign(missing, tokenizer, scripts)
    # As it is written: in binary, 0.29 of a hundred documents is less than 29.
    budget = int(Fraction(str(float(tolerance))) * counts.documents)
    dropped = droppable(missing, budget, foreign)
    lost = int(missing[dropped].sum())
    missing[dropped] = 0
    ids = np.union1d(np.flatnonzero(missing), pins).astype(np.int32)
    held = counts.missing
    return Profile(
        ids=ids,
        counts=np.asarray([held[i] if i < len(held) else 0 for i in ids.tolist()], np.int64),
        vocab_size=vocab_size,
        fingerprint=fingerprint or tokenizer_fingerprint(tokenizer),
        corpus=counts.corpus,
        documents=counts.documents,
        counted=counted,
        tolerance=float(tolerance),
        missing=lost / max(counts.documents, 1),
        held_out=None if held_out is None else measure_coverage(ids, held_out),
    )


def _check(
    counts: DocumentCounts, ends: Sequence[int], vocab_size: int, tolerance: float, counted: str
) -> None:
    if not 0 <= tolerance <= _MOST_TOLERANCE:  # nor is "not a number"
        raise ConfigError(
            "the tolerance is out of range",
            got=tolerance,
            wanted=f"0 to {_MOST_TOLERANCE:g}",
            where="vocab.tolerance",
        )
    if counted not in _COUNTED:
        raise ConfigError("whose answers?", got=counted, wanted=" or ".join(_COUNTED))
    highest = max(len(counts.said) - 1, *ends, 0)
    if min(ends, default=0) < 0 or highest >= vocab_size:
        raise ConfigError(
            "an answer has or ends with a token that the model has no row for",
            got=highest if highest >= vocab_size else min(ends),
            wanted=f"ids from 0 to {vocab_size - 1}",
            fix="count with the model's own tokenizer, and give its own end tokens",
        )


def droppable(
    missing: npt.NDArray[np.int64], budget: float, first: npt.NDArray[np.bool_]
) -> npt.NDArray[np.int64]:
    """Tokens to leave out: ids, whose counts add up to at most ``budget``.

    Args:
        missing: [V] documents that would lack each token.
        budget: documents' tokens that may be lacking in all.
        first: [V] tokens to leave out before any other, the rarest of them first.

    The rarest go first; of two alike, the one of the higher id.
    """
    held = np.flatnonzero(missing)
    order = held[np.lexsort((-held, missing[held], ~first[held]))]
    return order[: int(np.searchsorted(np.cumsum(missing[order]), budget, side="right"))]


def _foreign(
    missing: npt.NDArray[np.int64], tokenizer: Any, scripts: Sequence[str]
) -> npt.NDArray[np.bool_]:
    """[V] tokens that the scripts do not write."""
    out = np.zeros(len(missing), np.bool_)
    if scripts:
        letters = Charset(scripts)
        for token in np.flatnonzero(missing).tolist():
            out[token] = not letters.write(tokenizer.decode([token]))
    return out

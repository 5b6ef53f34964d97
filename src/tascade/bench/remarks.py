"""What is to be said beside a benchmark's table: where it says less than it seems."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean
from typing import Any

from tascade.bench.metrics import OURS, with_spread

_SOONER = 1.1
"""Transformers' speed over plain's from which ours is set against it too."""
_MUCH = 0.25
"""The part of the time that reading prompts takes, from which it is told."""
_ODD = 1.15
"""A speed-up over the tokens a step from which other work must have run."""
FEW_ROWS = 30
"""Measured rows below which a result says what others may give, and below which it is doubtful."""
NOISY = 1.5
"""High over low of a speed-up from which a run says little."""
_ROWS_TELL = 4
"""Rows from which such a spread is the machine's: two seconds of one row scatter by themselves."""


def remarks(result: Mapping[str, Any]) -> list[str]:
    """What makes a result say less than it seems: rows that the pack knew, a machine at work."""
    said = []
    if role := result["data"].get("seen_as"):
        said.append(
            f"The pack was made with these rows ({role} data): of rows that it has not seen, this "
            "says nothing. Measure on others."
        )
    said += _cut(result)
    said += _in_another_precision(result)
    said += _beside_transformers(result["methods"])
    said += _prompts_share(result["methods"])
    said += _few_rows(result)
    apart = [
        f"{name} {ratio['low']:.2f}x to {ratio['high']:.2f}x"
        for name, method in result["methods"].items()
        if (ratio := method.get("speedup")) and ratio["high"] > NOISY * max(ratio["low"], 1e-9)
    ]
    said += _impossible(result["methods"].get("tasc-spec", {}))
    if apart and result["data"]["examples"] >= _ROWS_TELL:
        said.append(
            f"The machine was not quiet: speed-ups lie far apart ({', '.join(apart)}). "
            "Other work may have run, here or on the same hardware: measure again."
        )
    return said


def _cut(result: Mapping[str, Any]) -> list[str]:
    """Where answers end at the limit of tokens, and not where the model would end them."""
    cut, rows = result["methods"]["plain"].get("cut", 0), result["data"]["examples"]
    if not cut:
        return []
    limit = result["settings"]["max_new_tokens"]
    return [
        f"{cut} of {rows} answers end at the limit of {limit} tokens: --max-new-tokens, here and "
        "in tascade adapt, gives longer ones."
    ]


def _prompts_share(methods: Mapping[str, Any]) -> list[str]:
    """Where much of the time goes to reading prompts, which no draft makes shorter."""
    plain, ours = methods["plain"], methods.get("tasc-spec", {})
    if not ours.get("seconds") or not plain.get("prefill_seconds"):
        return []
    # Ours reads them in the passes that also verify its first drafts.
    reading = fmean(plain["prefill_seconds"])
    before, after = fmean(plain["seconds"]), fmean(ours["seconds"])
    if not _MUCH * after <= reading < after:
        return []
    gain = (before - reading) / (after - reading)
    return [
        f"Reading the prompts, which drafts do not shorten, takes {reading:.3g} s of plain "
        f"decoding's {before:.3g} s and of tasc-spec's {after:.3g} s: the rest is {gain:.2f}x as "
        "fast."
    ]


def _in_another_precision(result: Mapping[str, Any]) -> list[str]:
    """Where the checkpoint's own precision may be what a user runs now, and faster there."""
    here = result["dtype"]
    if (stored := result.get("stored_dtype", here)) == here:
        return []
    return [
        f"All of this is in {here}, and the checkpoint in {stored}. Rounding in that makes other "
        "words of some answers, where the model is not sure, with tascade or without. Who runs it "
        f"so now compares with what tascade bench --dtype {stored} --methods hf-generate says."
    ]


def _few_rows(result: Mapping[str, Any]) -> list[str]:
    """Where other rows may well give another speed-up: the table's brackets are of the rounds."""
    rows = result["data"]["examples"]
    if rows >= FEW_ROWS:
        return []
    ranges = [
        f"{name} {ends['low']:.2f}x to {ends['high']:.2f}x"
        for name, method in result["methods"].items()
        if name.startswith(OURS) and (ends := method.get("by_rows"))
    ]
    said = f"{rows} row{'s' * (rows != 1)} say little of others"
    if ranges:
        said += f": those may give {', '.join(ranges)} (95 %, by resampling these)"
    return [f"{said}. More: --minutes, --rows, or fewer --methods."]


def _impossible(method: Mapping[str, Any]) -> list[str]:
    """Where drafts gained more time than steps. Of ``tasc-spec`` alone: other methods may have
    cheaper steps than plain, by a small head or other code.
    """
    gain = method.get("speedup", {}).get("median", 0.0)
    tokens = method.get("tokens_per_step", gain)
    if gain <= _ODD * tokens:
        return []
    return [
        f"A speed-up above the tokens a step (tasc-spec {gain:.2f}x with {tokens:.2f}) cannot be "
        "right: other work ran at times. Measure again while nothing else runs."
    ]


def _beside_transformers(methods: Mapping[str, Any]) -> list[str]:
    """Where Transformers' own decoding is sooner than plain: how ours compares with that.

    In half precision on a CPU plain decoding fills a lone token up to several rows, so that it says
    the same words with drafts and without.
    """
    theirs = methods.get("hf-generate", {}).get("tokens_per_second", 0.0)
    if theirs <= _SOONER * methods["plain"]["tokens_per_second"]:
        return []
    return [
        f"hf-generate (Transformers) was faster than plain here: against it {name} is "
        f"{with_spread(ratio)}."
        for name, method in methods.items()
        if (ratio := method.get("versus", {}).get("hf-generate"))
    ]

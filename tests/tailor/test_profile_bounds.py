"""Lists of tokens at the edges: odd tolerances and ids, rare misses, tokenizers without bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from list_oracle import lint
from tests.enrich.families import FAMILIES, SENTENCES
from tests.tailor.test_profile import (
    PINS,
    SPELLERS,
    fields_of,
    listed,
    own,
    rows,
    some_counts,
    with_words,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tascade.errors import ConfigError, DataError, PackError
from tascade.tailor.counts import count_documents, measure_coverage
from tascade.tailor.profile import Profile, build_profile
from tascade.tailor.required import pinned_tokens
from tascade.tailor.scripts import Letters
from tascade.testing import byte_tokenizer

# --- tolerances and ids -------------------------------------------------------------------------


@pytest.mark.parametrize("tolerance", [float("nan"), float("inf"), -0.01, 1e12])
def test_a_tolerance_that_says_nothing_is_refused(tolerance: float) -> None:
    with pytest.raises(ConfigError, match="tolerance"):
        listed([5, 9], 10, tolerance=tolerance)


@settings(max_examples=40)
@given(st.integers(0, 120), st.integers(1, 20))
def test_a_tolerance_is_meant_as_it_is_written(hundredths: int, hundreds: int) -> None:
    # 0.29 of 100 documents is 28.999... in binary, and one token too many would be kept.
    allowed = hundredths * hundreds
    made = listed([1] * (allowed + 1), 100 * hundreds, tolerance=hundredths / 100)
    assert len(own(made)) == 1
    assert made.missing <= made.tolerance


@settings(max_examples=60)
@given(st.integers(1, 400), st.data())
def test_what_is_lacking_is_never_above_the_tolerance(documents: int, data: st.DataObject) -> None:
    lost = data.draw(st.integers(1, documents))
    for tolerance in (lost / documents, float(np.nextafter(lost / documents, 0))):
        made = listed([lost], documents, tolerance=tolerance)
        assert made.missing <= tolerance


@pytest.mark.parametrize("ends", [(-1,), (256, 999)])
def test_an_end_token_that_is_no_row_is_refused(ends: tuple[int, ...]) -> None:
    tokenizer = byte_tokenizer()
    counts = some_counts([0] * 260 + [5], 10)
    with pytest.raises(ConfigError, match="no row"):
        build_profile(counts, tokenizer, ends, vocab_size=261)
    sound = build_profile(counts, tokenizer, (256,), vocab_size=261)
    assert [f"end token {ends[-1]} is not a row of the model"] == lint(sound, tokenizer, ends)


def test_it_is_said_whose_answers_were_counted() -> None:
    with pytest.raises(ConfigError, match="whose"):
        listed([5], 10, counted="silver")


@pytest.mark.parametrize("odd", [[3, -1], [1.5], [1 << 32], [[1, 2]], ["a"]])
def test_what_is_no_list_of_ids_is_refused(odd: Any) -> None:
    for pair in ((None, np.asarray(odd)), (np.asarray(odd), np.asarray([1]))):
        with pytest.raises(DataError, match="document 1"):
            count_documents([(None, np.asarray([1])), pair])


def test_a_list_holds_what_answers_need_and_prompts_do_not_bring() -> None:
    brought, prompt_only, needed, beyond = 260, 261, 262, 900
    counted = count_documents(
        rows(([brought, prompt_only], [brought, needed]), ([brought], [brought, beyond]))
    )
    held_out = rows(([brought], [brought, needed, 270, 270]))
    made = build_profile(
        counted, byte_tokenizer(), (256,), vocab_size=901, tolerance=0.0, held_out=held_out
    )
    assert [i for i in made.ids.tolist() if i >= 260] == [needed, beyond]
    assert made.held_out is not None
    assert (made.held_out.misses, made.held_out.tokens) == (1, 4)


def test_what_is_always_kept_costs_no_tolerance() -> None:
    counts = some_counts([1] * 256 + [0] * 4 + [1, 9], 10)
    made = build_profile(counts, byte_tokenizer(), (256,), vocab_size=262, tolerance=0.1)
    assert own(made) == [1]
    assert made.missing == 0.1
    assert set(range(256)) <= set(made.ids.tolist())


def test_what_no_script_writes_goes_before_what_is_rarer() -> None:
    tokenizer = with_words("cat", "кот", "dog")
    counts = some_counts([0] * 256 + [3, 8, 20], 100)
    words = []
    for scripts in ((), ("english",)):
        made = build_profile(
            counts,
            tokenizer,
            (),
            vocab_size=len(tokenizer),
            tolerance=0.08,
            scripts=scripts,
        )
        words.append([i - 256 for i in made.ids.tolist() if 256 <= i < 259])
    assert words == [[1, 2], [0, 2]]


# --- the interval -------------------------------------------------------------------------------


def misses_of(rng: np.random.Generator, answers: int, chance: float, each: int) -> Any:
    """Answers of which some lack ``each`` tokens."""
    lacking = list(range(10, 10 + each))
    answered = [(None, [1, *lacking * bool(bad)]) for bad in rng.random(answers) < chance]
    return measure_coverage([1], rows(*answered))


@pytest.mark.parametrize(
    ("answers", "chance", "each"), [(80, 0.01, 1), (300, 0.005, 1), (80, 0.1, 4)]
)
def test_the_interval_holds_where_misses_are_rare(answers: int, chance: float, each: int) -> None:
    # Resampled answers give [0, 0] where no miss was seen, and hold in 57 % of the first case.
    rng = np.random.default_rng(5)
    found = [misses_of(rng, answers, chance, each) for _ in range(300)]
    assert sum(f.low <= chance * each <= f.high for f in found) >= 0.9 * len(found)
    assert sum(f.high for f in found) / len(found) < 8 * chance * each  # and says something


def test_no_miss_seen_is_not_no_miss() -> None:
    few, many = (measure_coverage([1], rows(*[(None, [1])] * n)) for n in (20, 2000))
    assert few.low == many.low == few.per_document == 0
    assert 3 / 20 < few.high < 4 / 20
    assert 3 / 2000 < many.high < 4 / 2000


# --- what is always kept ------------------------------------------------------------------------


def some_text(rng: np.random.Generator) -> str:
    spans = ((0x20, 0x7E), (0x400, 0x4FF), (0x1F300, 0x1FAFF), (0x4E00, 0x9FFF), (1, 0xD7FF))
    parts = []
    for at in rng.integers(0, len(spans), rng.integers(1, 6)).tolist():
        parts.append("".join(map(chr, rng.integers(*spans[at], rng.integers(1, 7)).tolist())))
    if rng.random() < 0.2:
        parts.append("def f(x):\n\treturn {'a': x[1:]}\r\n\n    ")
    return "".join(parts)


@pytest.mark.parametrize("family", FAMILIES)
def test_ten_thousand_texts_can_be_said(family: str) -> None:
    speller, kept, rng = SPELLERS[family], PINS[family], np.random.default_rng(7)
    for _ in range(10_000 // len(FAMILIES)):
        text = some_text(rng)
        ids = speller.spell(text, kept)
        assert set(ids) <= kept
        assert speller.said(ids) == speller.said(speller.ids(text))


@pytest.mark.parametrize("family", FAMILIES)
def test_white_space_and_digits_are_kept_in_every_spelling(family: str) -> None:
    speller, tokenizer = SPELLERS[family], SPELLERS[family].tokenizer
    byte_like = {number for number in speller.bytes if number >= 0}
    for string, number in tokenizer.get_vocab().items():
        text = string.replace("▁", " ").replace("Ġ", " ").replace("Ċ", "\n").replace("ĉ", "\t")
        plain = (not text.strip(" \n\t") and len(text) <= 8) or text.strip(" ") in set("0123456789")
        if plain and len(text.lstrip(" ")) <= 8:
            assert number in PINS[family], string
        elif text.isalpha() and len(text) > 1:
            assert number not in PINS[family] - byte_like, string


def test_runs_of_white_space_are_kept_up_to_a_length() -> None:
    runs = ["\n\n", " \n", "\t\t", "\r\n", " " * 8, " " * 9, "x\n", " 7", "77", "\u00a0\u00a0"]
    tokenizer = with_words(*runs)
    kept = set(pinned_tokens(tokenizer, ()).tolist())
    assert [run for number, run in enumerate(runs, 256) if number in kept] == [*runs[:5], " 7"]


def unigram(byte_pieces: bool) -> Any:
    """A tokenizer of T5's kind: Unigram, a piece a character, and bytes or none."""
    pieces = [("<unk>", 0.0), ("</s>", 0.0), ("▁", -3.0), ("▁the", -2.0), ("ing", -2.0)]
    pieces += [(char, -9.0) for char in sorted(set("".join(SENTENCES) + "0123456789") - {" "})]
    if byte_pieces:
        pieces += [(f"<0x{byte:02X}>", -20.0) for byte in range(256)]
    core = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=byte_pieces))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("byte_pieces", [False, True])
def test_a_tokenizer_without_bytes_can_say_what_it_can_read(byte_pieces: bool) -> None:
    tokenizer = unigram(byte_pieces)
    vocab = tokenizer.get_vocab()
    made = build_profile(
        some_counts([], 10), tokenizer, (1,), vocab_size=len(tokenizer), tolerance=5.0
    )
    kept = set(made.ids.tolist())
    assert vocab["▁the"] not in kept
    assert vocab["ing"] not in kept
    assert (vocab["a"] in kept) == (not byte_pieces)
    assert {vocab["▁"], vocab["7"], 1} <= kept
    found = lint(made, tokenizer, (1,))
    if byte_pieces:
        assert {vocab[f"<0x{byte:02X}>"] for byte in range(256)} <= kept
        assert found == []
        return
    assert len(found) == 1
    assert "no token for 243 of 256 bytes" in found[0]
    for text in SENTENCES:
        assert all(vocab["▁" if char == " " else char] in kept for char in text)


def test_so_does_the_real_one(shared: Path) -> None:
    path = shared / "tokenizers" / "t5-32k" / "tokenizer.json"
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(path), eos_token="</s>")
    vocab, kept = tokenizer.get_vocab(), set(pinned_tokens(tokenizer, (1,)).tolist())
    assert {number for string, number in vocab.items() if len(string) == 1} <= kept
    assert len(kept) < 500


@pytest.mark.parametrize("family", FAMILIES)
def test_lint_finds_every_kind_of_token(family: str) -> None:
    speller = SPELLERS[family]
    tokenizer = speller.tokenizer
    size, vocab = len(tokenizer), tokenizer.get_vocab()
    made = build_profile(some_counts([], 1), tokenizer, (5,), vocab_size=size)
    assert lint(made, tokenizer, (5,)) == []
    bytewise = speller.bytes[0x0A], speller.bytes[0xE4], speller.bytes[ord("7")]
    for lacking in (5, vocab["<tool>"], vocab["<|user|>"], *bytewise):
        poor = Profile(**{**fields_of(made), "ids": made.ids[made.ids != lacking]})
        assert len(lint(poor, tokenizer, (5,))) == 1, lacking


def test_emoji_are_not_of_one_block() -> None:
    emoji = Letters(["emoji"])
    for text in ("⭐", "⌚", "⏰", "1️⃣", "⬆️", "👩‍🚀", "🏴󠁧󠁢󠁷󠁬󠁳󠁿", "🇺🇳", "👍🏽"):
        assert emoji.write(text), text
    assert not emoji.write("star")


# --- on disk ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Profile]:
    path = tmp_path_factory.mktemp("bounds") / "vocabulary.json"
    held_out = rows((None, [260, 97]), (None, [262]), (None, [999]))
    made = listed([4, 1, 2], 10, tolerance=0.1, held_out=held_out)
    made.save(path, byte_tokenizer())
    return path, made


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("counted", "silver"),
        ("counted", ["gold"]),
        ("missing", 0.2),
        ("documents", 3),
        ("tolerance", float("inf")),
        ("tolerance", float("nan")),
        ("tolerance", True),
        ("vocab_size", 263.0),
        ("held_out.share", 7.0),
        ("held_out.low", 99.0),
        ("held_out.per_document", 99.0),
        ("held_out.misses", 5),
        ("held_out.missed_documents", 2),
        ("held_out", []),
    ],
)
def test_a_file_that_contradicts_itself_is_refused(
    written: tuple[Path, Profile], place: str, value: Any
) -> None:
    path, made = written
    raw = json.loads(path.read_bytes())
    *into, name = place.split(".")
    (raw[into[0]] if into else raw)[name] = value
    bad = path.with_name("bad.json")
    bad.write_text(json.dumps(raw))
    with pytest.raises(PackError, match="tailor"):
        Profile.load(bad, vocab_size=263, fingerprint=made.fingerprint)


def test_a_list_is_read_back_whatever_the_tolerance(tmp_path: Path) -> None:
    for tolerance in (0.0, 1e-9, 0.29, 1e9):
        made = listed([4, 1, 2], 10, tolerance=tolerance, held_out=rows((None, [262])))
        made.save(tmp_path / "v.json", byte_tokenizer())
        found = Profile.load(tmp_path / "v.json", vocab_size=263, fingerprint=made.fingerprint)
        assert (found.tolerance, found.missing) == (tolerance, made.missing)
        assert found.held_out == made.held_out


def test_an_endless_file_is_not_read_to_its_end(
    written: tuple[Path, Profile], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, made = written
    monkeypatch.setattr("tascade.tailor.profile._MOST_BYTES", path.stat().st_size - 1)
    with pytest.raises(PackError, match="too large"):
        Profile.load(path, vocab_size=263, fingerprint=made.fingerprint)

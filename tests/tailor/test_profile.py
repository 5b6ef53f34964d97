"""Lists of a task's tokens: what is kept, what may be lacking, and that any text can be said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from list_oracle import lint
from tests.enrich.families import FAMILIES, SENTENCES, make
from transformers import PreTrainedTokenizerFast

from tascade.data.encode import fingerprint
from tascade.errors import ConfigError, FingerprintError, PackError, TascadeError
from tascade.tailor.counts import DocumentCounts, count_documents, measure_coverage
from tascade.tailor.profile import Profile, build_profile, droppable
from tascade.tailor.required import pinned_tokens
from tascade.tailor.scripts import ALWAYS, SCRIPTS, Letters
from tascade.testing import byte_tokenizer

LETTERS = {letter: byte for letter, byte in byte_tokenizer().get_vocab().items() if byte < 256}
REAL = ("dolma2-100k", "phi3-32k", "pythia-50k")


def rows(*pairs: tuple[list[int] | None, list[int]]) -> list[Any]:
    return [
        (None if p is None else np.asarray(p, np.int32), np.asarray(a, np.int32)) for p, a in pairs
    ]


def some_counts(missing: list[int], documents: int) -> DocumentCounts:
    counts = np.asarray(missing, np.int64)
    return DocumentCounts(counts, counts, documents, int(counts.sum()), "0" * 64)


def listed(missing: list[int], documents: int, **options: Any) -> Profile:
    """A list over the byte tokenizer, with ordinary tokens from 260 on."""
    counts = some_counts([0] * 260 + missing, documents)
    size = 260 + len(missing)
    return build_profile(counts, byte_tokenizer(), (256,), vocab_size=size, **options)


def own(profile: Profile) -> list[int]:
    """What is in a list without having to be, counted from 260."""
    return [i - 260 for i in profile.ids.tolist() if i >= 260]


# --- counting -----------------------------------------------------------------------------------


def test_a_document_counts_once_and_what_its_prompt_holds_does_not() -> None:
    counts = count_documents(rows(([1, 2], [2, 3, 3, 9]), (None, [3, 2]), ([3], [3])))
    assert counts.missing.tolist() == [0, 0, 1, 2, 0, 0, 0, 0, 0, 1]
    assert counts.said.tolist() == [0, 0, 2, 3, 0, 0, 0, 0, 0, 1]
    assert (counts.documents, counts.tokens) == (3, 7)


def test_the_corpus_is_told_apart_by_all_of_it() -> None:
    seen = {
        count_documents(rows(*pairs)).corpus
        for pairs in (
            [([1], [2])],
            [([1], [2]), ([1], [2])],
            [([], [1, 2])],
            [([1, 2], [])],
            [([2], [1])],
        )
    }
    assert len(seen) == 5
    assert count_documents(rows(([1], [2]))).corpus in seen


@given(st.lists(st.tuples(st.lists(st.integers(0, 40)), st.lists(st.integers(0, 40)))))
def test_counts_are_those_of_sets(pairs: list[tuple[list[int], list[int]]]) -> None:
    counts = count_documents(rows(*pairs))
    for token in range(41):
        wanted = sum(token in answer and token not in prompt for prompt, answer in pairs)
        found = counts.missing[token] if token < len(counts.missing) else 0
        assert found == wanted


# --- the tolerance ------------------------------------------------------------------------------


@given(
    st.lists(st.integers(0, 30), min_size=1, max_size=60),
    st.floats(0, 5),
    st.integers(1, 50),
    st.randoms(use_true_random=False),
)
def test_what_is_lacking_keeps_to_the_tolerance_and_not_one_more_could_go(
    missing: list[int], tolerance: float, documents: int, random: Any
) -> None:
    foreign = np.asarray([random.random() < 0.3 for _ in missing])
    counts = np.asarray(missing, np.int64)
    dropped = droppable(counts, tolerance * documents, foreign)
    assert counts[dropped].sum() <= tolerance * documents
    left = np.setdiff1d(np.flatnonzero(counts), dropped)
    if len(left):
        # Foreign ones first, rarest first: the next in line does not fit.
        line = left[foreign[left]] if foreign[left].any() else left
        assert counts[dropped].sum() + counts[line].min() > tolerance * documents
        if not foreign[left].any():
            plain = dropped[~foreign[dropped]]
            assert counts[plain].max(initial=0) <= counts[left].min()


def test_a_larger_tolerance_never_keeps_more_and_one_above_all_counts_keeps_nothing() -> None:
    missing = np.random.default_rng(0).zipf(1.5, 300).clip(0, 900).tolist()
    sizes = [len(own(listed(missing, 1000, tolerance=t))) for t in (0, 0.01, 0.1, 1, 5, 100)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == 300
    assert sizes[1] < 300
    assert sizes[-1] == 0  # the reference then keeps everything


def test_alike_tokens_go_by_id_however_they_were_counted() -> None:
    assert own(listed([1, 1, 1, 1, 5], 10, tolerance=0.2)) == [0, 1, 4]
    forth, back = rows((None, [5, 6]), (None, [7])), rows((None, [7]), (None, [6, 5]))
    tokens = [
        droppable(count_documents(part).missing, 2, np.zeros(8, bool)).tolist()
        for part in (forth, back)
    ]
    assert tokens[0] == tokens[1]


def test_the_third_stage_holds_for_a_hundred_and_fifty_thousand_types() -> None:
    missing = np.random.default_rng(1).zipf(1.3, 150_000).clip(0, 1_000_000)
    dropped = droppable(missing, 0.01 * 1_000_000, np.zeros(len(missing), bool))
    assert 0 < len(dropped) < len(missing)
    assert (
        missing[dropped].sum()
        <= 10_000
        < missing[dropped].sum()
        + np.delete(missing, dropped).min(where=np.delete(missing, dropped) > 0, initial=10**9)
    )


# --- scripts ------------------------------------------------------------------------------------


def test_what_a_script_rules_out_is_charged_to_the_tolerance() -> None:
    tokenizer = with_words("cat", "кот", "猫")
    counts = some_counts([0] * 256 + [50, 3, 8], 100)
    made = {
        tolerance: build_profile(
            counts,
            tokenizer,
            (),
            vocab_size=len(tokenizer),
            tolerance=tolerance,
            scripts=("english",),
        )
        for tolerance in (0.0, 0.05, 0.2)
    }
    words = {t: [i - 256 for i in p.ids.tolist() if 256 <= i < 259] for t, p in made.items()}
    assert words == {0.0: [0, 1, 2], 0.05: [0, 2], 0.2: [0]}  # at 0 all come back
    assert [round(p.missing, 2) for p in made.values()] == [0.0, 0.03, 0.11]


def with_words(*words: str) -> Any:
    """The byte tokenizer with these words as tokens from 256 on; its marks come behind them."""
    base = byte_tokenizer()
    layout = json.loads(base.backend_tokenizer.to_str())
    letters = {i: t for t, i in layout["model"]["vocab"].items()}
    for number, word in enumerate(words, 256):
        layout["model"]["vocab"]["".join(letters[b] for b in word.encode())] = number
    from tokenizers import Tokenizer

    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(layout)), eos_token="<|end|>"
    )


@pytest.mark.parametrize(
    ("script", "text"),
    [
        ("english", "cat's tail, 50 % – “so” €3 →"),
        ("german", "Größe"),
        ("hindi", "नमस्ते"),
        ("thai", "แมว"),
        ("chinese", "猫。"),
        ("japanese", "ねこネコ猫"),
        ("korean", "고양이"),
        ("arabic", "قطة"),
        ("cyrillic", "кошка"),
        ("greek", "γάτα"),
        ("hebrew", "חתול"),
        ("emoji", "🙂☺"),
        ("math", "α ∈ ℝ"),
    ],
)
def test_scripts_write_their_own(script: str, text: str) -> None:
    assert Letters([script]).write(text)
    others = [name for name in SCRIPTS if not Letters([name]).write(text)]
    assert others or script == "english"  # every other one but code writes English
    assert Letters(list(SCRIPTS)).write(text)


@given(st.sets(st.sampled_from(sorted(SCRIPTS))), st.characters())
def test_a_character_is_written_if_a_span_has_it(names: set[str], char: str) -> None:
    spans = [*ALWAYS, *(span for name in names for span in SCRIPTS[name])]
    wanted = any(first <= ord(char) <= last for first, last in spans) or char == "�"
    assert Letters(sorted(names)).write(char) == wanted


def test_an_unknown_script_is_refused() -> None:
    with pytest.raises(ConfigError, match="klingon"):
        Letters(["english", "klingon"])


# --- what is always kept ------------------------------------------------------------------------


class Speller:
    """Writes text with tokens that are kept, the others in bytes."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        vocab = tokenizer.get_vocab()
        self.pieces = "<0x41>" in vocab
        names = (
            [f"<0x{byte:02X}>" for byte in range(256)]
            if self.pieces
            else sorted(LETTERS, key=LETTERS.__getitem__)
        )
        # Pythia has no entry for the bytes that UTF-8 never uses.
        unused = {0xC0, 0xC1, *range(0xF5, 0x100)}
        self.bytes = [
            vocab[n] if n in vocab or b not in unused else -1 for b, n in enumerate(names)
        ]
        self.strings = {number: string for string, number in vocab.items()}

    def spell(self, text: str, kept: set[int]) -> list[int]:
        out: list[int] = []
        for token in self.ids(text):
            out += [token] if token in kept else self.bytewise(self.strings[token])
        return out

    def bytewise(self, string: str) -> list[int]:
        if self.pieces:
            return [self.bytes[b] for b in string.replace("▁", " ").encode()]
        return [self.bytes[LETTERS[letter]] for letter in string]

    def ids(self, text: str) -> list[int]:
        found: list[int] = self.tokenizer(text, add_special_tokens=False).input_ids
        return found

    def said(self, ids: list[int]) -> str:
        text: str = self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        return text


SPELLERS = {family: Speller(make(family)) for family in FAMILIES}
PINS = {f: set(pinned_tokens(s.tokenizer, ()).tolist()) for f, s in SPELLERS.items()}
TEXTS = st.one_of(st.text(max_size=40), st.sampled_from([*SENTENCES, "def f(x):\n\treturn x\n\n"]))


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=60)
@given(texts=st.lists(TEXTS, min_size=8, max_size=40))
def test_any_text_can_be_said_with_what_is_always_kept(family: str, texts: list[str]) -> None:
    speller, kept = SPELLERS[family], PINS[family]
    for text in texts:
        ids = speller.spell(text, kept)
        assert set(ids) <= kept
        assert speller.said(ids) == speller.said(speller.ids(text))


@pytest.mark.parametrize("family", FAMILIES)
def test_marks_and_white_space_are_kept_whatever_was_counted(family: str) -> None:
    speller = SPELLERS[family]
    tokenizer = speller.tokenizer
    size = len(tokenizer) + 64
    empty = some_counts([], 10)
    profile = build_profile(empty, tokenizer, (3, 5), vocab_size=size, tolerance=100.0)
    kept = set(profile.ids.tolist())
    assert set(speller.bytes) - {-1} <= kept
    assert {3, 5} <= kept
    assert set(tokenizer.get_added_vocab().values()) <= kept  # `<tool>` is not special
    for text in ("\n", " ", "7"):
        assert set(tokenizer(text, add_special_tokens=False).input_ids) & kept
    assert lint(profile, tokenizer, (3, 5)) == []
    poor = profile.ids[profile.ids != tokenizer.get_added_vocab()["<tool>"]]
    broken = Profile(**{**fields_of(profile), "ids": poor})
    assert lint(broken, tokenizer, (3, 5)) == [
        "'<tool>' is not in the list, and some texts cannot be said"
    ]


def fields_of(profile: Profile) -> dict[str, Any]:
    return {name: getattr(profile, name) for name in Profile.__slots__}


@pytest.mark.parametrize("name", REAL)
def test_real_tokenizers_keep_a_few_hundred_at_least_and_at_most(shared: Path, name: str) -> None:
    path = shared / "tokenizers" / name / "tokenizer.json"
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(path))
    speller, kept = Speller(tokenizer), set(pinned_tokens(tokenizer, ()).tolist())
    assert set(speller.bytes) - {-1} <= kept
    assert len(kept) < 500
    rng = np.random.default_rng(2)
    for _ in range(500):
        codes = [c for c in rng.integers(1, 0x1F700, 20).tolist() if not 0xD800 <= c < 0xE000]
        text = "".join(map(chr, codes))
        ids = speller.spell(text, kept)
        assert set(ids) <= kept
        assert speller.said(ids) == speller.said(speller.ids(text))


def test_no_bound_on_ids_but_the_models_own() -> None:
    # The reference ignores ids from 128,000 on, for every tokenizer.
    assert own(listed([0] * 130_000 + [7], 10)) == [130_000]
    with pytest.raises(ConfigError, match="no row"):
        build_profile(some_counts([0] * 300, 1), byte_tokenizer(), (), vocab_size=299)


# --- coverage -----------------------------------------------------------------------------------


def test_coverage_counts_a_token_once_an_answer() -> None:
    found = measure_coverage([1, 2], rows(([3], [1, 3, 9, 9, 8]), (None, [2]), (None, [3, 1])))
    assert (found.documents, found.tokens, found.misses) == (3, 8, 3)
    assert found.missed_documents == 2
    assert found.per_document == 1.0
    assert 0 <= found.low < 1 < found.high
    assert found.share == 1 - 3 / 8


def test_nothing_held_out_is_nothing_missed() -> None:
    found = measure_coverage([1], [])
    assert (found.documents, found.misses, found.share) == (0, 0, 1.0)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(3)
    covered = 0
    for _ in range(200):
        answers = [[7] * (rng.random() < 0.3) + [1] for _ in range(80)]
        found = measure_coverage([1], rows(*((None, answer) for answer in answers)))
        covered += found.low <= 0.3 <= found.high
    assert 180 <= covered <= 200


# --- on disk ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Profile]:
    path = tmp_path_factory.mktemp("profile") / "vocabulary.json"
    held_out = rows((None, [260, 97]), (None, [262]))
    made = listed([4, 0, 2], 10, tolerance=0.0, held_out=held_out)
    made.save(path, byte_tokenizer())
    return path, made


def test_a_list_is_read_back_and_a_person_can_read_it(saved: tuple[Path, Profile]) -> None:
    path, made = saved
    mark = fingerprint(byte_tokenizer())
    found = Profile.load(path, vocab_size=263, fingerprint=mark)
    for name, value in fields_of(made).items():
        assert np.array_equal(getattr(found, name), value), name
    lines = path.read_text().splitlines()
    assert '[256, 0, "<|end|>"],' in lines
    assert "[260, 4, null]," in lines


def test_another_tokenizers_list_is_refused(saved: tuple[Path, Profile]) -> None:
    path, made = saved
    for mark, size in (("1-abc", 263), (made.fingerprint, 264)):
        with pytest.raises(FingerprintError, match="another tokenizer"):
            Profile.load(path, vocab_size=size, fingerprint=mark)


@settings(max_examples=300)
@given(data=st.data())
def test_a_damaged_list_is_refused(saved: tuple[Path, Profile], data: st.DataObject) -> None:
    path, made = saved
    raw = json.loads(path.read_bytes())
    odd = st.one_of(st.none(), st.integers(), st.floats(), st.text(max_size=5), st.just([[]]))
    key = data.draw(st.sampled_from(sorted(raw)))
    if data.draw(st.booleans()):
        raw[key] = data.draw(odd)
    else:
        raw["tokens"][data.draw(st.integers(0, 9))] = data.draw(odd)
    bad = path.with_name("bad.json")
    bad.write_text(json.dumps(raw))
    try:
        found = Profile.load(bad, vocab_size=263, fingerprint=made.fingerprint)
    except TascadeError:
        return
    assert found.vocab_size == 263
    assert (np.diff(found.ids) > 0).all()


def test_no_list_and_half_a_list_are_refused(saved: tuple[Path, Profile], tmp_path: Path) -> None:
    path, made = saved
    bad = tmp_path / "vocabulary.json"
    for content in (None, b"", path.read_bytes()[:-30], b"[" * 100_000, b"\xff\xfe"):
        if content is not None:
            bad.write_bytes(content)
        with pytest.raises(PackError, match="tailor"):
            Profile.load(bad, vocab_size=263, fingerprint=made.fingerprint)

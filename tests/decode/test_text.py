"""Streamed text is the text of the whole, part by part, in time that grows with its length."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tascade import bundled
from tascade.cli import console
from tascade.core import Generation
from tascade.decode.sampling import SamplingParams
from tascade.decode.stop import StopRule
from tascade.decode.text import TextStream, special_tokens
from tascade.testing import byte_tokenizer

END = 256
TEXTS = (
    "Hello , world . It does n't say ' no ' to  me , and I 've had ' ' ' enough !",
    "naïve café e\u0301 o\u0302\u0323 — Zürich\n\n\n    indented\ttabs  and   runs",
    "한국어 문장과 日本語の文、中文句子。",
    "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇩🇪 and \u202eright to left\u202c עברית العربية",
    '{"a": [1, 2, {"b": "c\\n"}], "x": "<|end|>"}',
    "▁a ##b </w> <0x41> � ��",
)


def wrapped(core: Tokenizer, **options: Any) -> Any:
    core.add_special_tokens(["<end>", "<mark>"])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", **options)


@cache
def wordpiece(cleans: bool) -> Any:
    letters = "abcdefghijklmnopqrstuvwxyz0123456789,.'!?"
    words = sorted({*letters, "Hello", "world", "It", "does", "say", "no"})
    vocab = {"[UNK]": 0}
    for word in words:
        for form in (word, f"##{word}"):
            vocab.setdefault(form, len(vocab))
    core = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.decoder = decoders.WordPiece(cleanup=False)
    return wrapped(core, clean_up_tokenization_spaces=cleans)


@cache
def byte_fallback(strips: bool) -> Any:
    """As Llama 2's: pieces with a mark for the space, and bytes for what is in none."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", *"abcdefghilmnorstuvwxy,.'", "▁a", "▁the", "ing", "é", "��"]
    core = Tokenizer(
        models.BPE(
            {piece: i for i, piece in enumerate(pieces)}, [], byte_fallback=True, unk_token="<unk>"
        )
    )
    core.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    core.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)] if strips else parts)
    return wrapped(core)


@cache
def unigram() -> Any:
    pieces = ["<unk>", "▁", *"abcdefghilmnorstuvwxyz,.'! ", "▁the", "▁no", "▁world", "ing", "한국"]
    core = Tokenizer(models.Unigram([(piece, -float(i)) for i, piece in enumerate(pieces)], 0))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    return wrapped(core, clean_up_tokenization_spaces=True)


@cache
def words_with_ends() -> Any:
    pieces = [*"abcdefghilmnorstuvwxyz,.'!", *(f"{c}</w>" for c in "abcdefghilmnorstuvwxyz,.'!")]
    core = Tokenizer(
        models.BPE({p: i for i, p in enumerate(pieces)}, [], end_of_word_suffix="</w>")
    )
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.decoder = decoders.BPEDecoder()
    return wrapped(core)


@cache
def cleaned_bytes() -> Any:
    made = byte_tokenizer()
    made.clean_up_tokenization_spaces = True
    made.clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output = True
    return made


@cache
def bundled_tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(bundled.model_path()))


KINDS = {
    "bytes": byte_tokenizer,
    "byte-level BPE": bundled_tokenizer,
    "bytes, cleaned up": cleaned_bytes,
    "WordPiece": lambda: wordpiece(False),
    "WordPiece, cleaned up": lambda: wordpiece(True),
    "byte fallback": lambda: byte_fallback(True),
    "byte fallback, nothing stripped": lambda: byte_fallback(False),
    "Unigram, cleaned up": unigram,
    "ends of words": words_with_ends,
}
REAL = ("pythia-50k", "dolma2-100k", "phi3-32k", "t5-32k")


def streamed(tokenizer: Any, ids: list[int], params: SamplingParams, steps: list[int]) -> str:
    """What a reader gets in all, where step i brings ``steps[i]`` tokens."""
    whole = StopRule(params, tokenizer).text(ids)
    stream, out, at = TextStream(tokenizer, params), "", 0
    for size in steps:
        at = min(at + size, len(ids))
        result = Generation(ids[:at])
        if at == len(ids):
            result.text = whole
        out += stream.take(result)
        assert whole.startswith(out)
        if at == len(ids):
            break
    return out


def check(tokenizer: Any, seed: int, cases: int = 45) -> None:
    rng = np.random.default_rng(seed)
    size = len(tokenizer)
    for case in range(cases):
        if case % 3:
            text = "".join(TEXTS[int(rng.integers(len(TEXTS)))] for _ in range(3))
            ids = list(tokenizer(text, add_special_tokens=False).input_ids)
            cut = int(rng.integers(len(ids) + 1))
            ids = ids[cut:] + ids[:cut]
        else:
            ids = rng.integers(0, size, 80).tolist()
        for _ in range(int(rng.integers(4))):
            ids.insert(int(rng.integers(len(ids) + 1)), int(rng.choice(tokenizer.all_special_ids)))
        whole = tokenizer.decode(ids, skip_special_tokens=True)
        stops = [whole[at : at + 3] for at in rng.integers(len(whole) + 1, size=2) if whole[at:]]
        for stop in ((), tuple(stops)):
            params = SamplingParams(stop=stop, end_tokens=(int(tokenizer.eos_token_id),))
            steps = rng.integers(1, 2 if case % 2 else 9, len(ids)).tolist()
            wanted = StopRule(params, tokenizer).text(ids)
            assert streamed(tokenizer, ids, params, steps) == wanted


@pytest.mark.parametrize("kind", KINDS)
def test_the_parts_are_the_text_of_the_whole(kind: str) -> None:
    check(KINDS[kind](), seed=1)


@pytest.mark.parametrize("name", REAL)
def test_of_real_tokenizers_too(shared: Path, name: str) -> None:
    file = shared / "tokenizers" / name / "tokenizer.json"
    if not file.is_file():
        pytest.skip(f"{file} is not there")
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(file))
    special = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
    tokenizer.eos_token = special[-1]
    check(tokenizer, seed=2, cases=30)


@pytest.mark.parametrize("kind", KINDS)
def test_most_of_it_comes_before_the_end(kind: str) -> None:
    tokenizer = KINDS[kind]()
    ids = tokenizer("the world is no place to say " * 8, add_special_tokens=False).input_ids
    stream, told = TextStream(tokenizer, SamplingParams()), ""
    for at in range(1, len(ids) + 1):
        told += stream.take(Generation(ids[:at]))
    assert len(told) > len(tokenizer.decode(ids)) - 8


class Counting:
    """A tokenizer that counts what it is given to decode."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.tokens = inner, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def decode(self, ids: list[int], **options: Any) -> str:
        self.tokens += len(ids)
        return self.inner.decode(ids, **options)


HARD = {
    "text": lambda made: made("no one is the world ", add_special_tokens=False).input_ids,
    "spaces": lambda made: made(" ", add_special_tokens=False).input_ids[:1],
    "emoji": lambda made: made("한👍🏽", add_special_tokens=False).input_ids,
    "half a character": lambda made: made("👍", add_special_tokens=False).input_ids[-1:],
    "special": lambda made: [made.eos_token_id],
}


@pytest.mark.parametrize("of", HARD)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_decoded_grows_with_the_answer_and_no_faster(kind: str, of: str) -> None:
    tokenizer = KINDS[kind]()
    part = HARD[of](tokenizer)
    if not part:
        pytest.skip("no tokens of this kind")
    ids = (part * 3000)[:3000]
    counting = Counting(tokenizer)
    stream = TextStream(counting, SamplingParams(stop=("\n\n\n\n",)))
    for at in range(1, len(ids) + 1):
        stream.take(Generation(ids[:at]))
    assert counting.tokens <= 24 * len(ids)


def test_explaining_an_answer_is_no_slower_and_shows_all_of_it() -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer("how é 👍🏽 is it ", add_special_tokens=False).input_ids * 40
    counting = Counting(tokenizer)
    shown = console.explain(counting, Generation(ids, sources=[0] * len(ids)))
    assert shown.plain == tokenizer.decode(ids)
    assert counting.tokens <= 24 * len(ids)


def test_an_answer_without_text_stays_so() -> None:
    tokenizer, params = byte_tokenizer(), SamplingParams(stop=("\n",), end_tokens=(END,))
    ids = tokenizer("\nand more", add_special_tokens=False).input_ids
    stream = TextStream(tokenizer, params)
    assert "".join(stream.take(Generation(ids[:at])) for at in range(1, len(ids) + 1)) == ""


# --- stop strings ---------------------------------------------------------------------------------


def first_stop(tokenizer: Any, ids: list[int], stops: tuple[str, ...]) -> tuple[int, str] | None:
    """By decoding every beginning: tokens up to the first stop string, and the text before it."""
    for count in range(1, len(ids) + 1):
        shown = tokenizer.decode(ids[:count], skip_special_tokens=True)
        whole = tokenizer.decode(ids[:count], skip_special_tokens=False)
        if any(stop in shown or stop in whole for stop in stops):
            places = [shown.find(stop) for stop in stops if stop in shown]
            return count, shown[: min(places)] if places else ""
    return None


def ended(tokenizer: Any, ids: list[int], params: SamplingParams) -> int | None:
    rule = StopRule(params, tokenizer)
    return next((n for n in range(1, len(ids) + 1) if rule.is_last(ids[:n])), None)


@pytest.mark.parametrize("kind", KINDS)
def test_a_stop_string_is_found_where_it_stands_in_the_text(kind: str) -> None:
    tokenizer, rng = KINDS[kind](), np.random.default_rng(5)
    specials = special_tokens(tokenizer)
    found = 0
    for case in range(560):
        ids = rng.integers(0, len(tokenizer), 24).tolist()
        if case % 2:
            text = TEXTS[int(rng.integers(len(TEXTS)))]
            ids = list(tokenizer(text, add_special_tokens=False).input_ids)[:40]
        whole = tokenizer.decode(ids, skip_special_tokens=True)
        if not whole:
            continue
        at = int(rng.integers(len(whole)))
        stop = whole[at : at + int(rng.integers(1, 5))]
        if "�" in stop:
            continue
        params = SamplingParams(stop=(stop,), max_new_tokens=1000)
        wanted = first_stop(tokenizer, ids, (stop,))
        assert ended(tokenizer, ids, params) == (wanted and wanted[0])
        if wanted is None:
            continue
        found += 1
        said = StopRule(params, tokenizer).text(ids[: wanted[0]])
        if not specials & set(ids):
            assert said == wanted[1]
        stream = TextStream(tokenizer, params)
        parts = [stream.take(Generation(ids[:n])) for n in range(1, wanted[0] + 1)]
        assert said.startswith("".join(parts))
        assert "".join([*parts, stream.take(Generation(ids[: wanted[0]], said))]) == said
    assert found > 100


@pytest.mark.parametrize("kind", ["bytes", "byte-level BPE", "byte fallback", "WordPiece"])
def test_a_stop_string_may_be_or_hold_a_special_token(kind: str) -> None:
    tokenizer = KINDS[kind]()
    mark = tokenizer.eos_token
    words = [tokenizer(w, add_special_tokens=False).input_ids for w in ("say no", "Hello")]
    ids = [*words[0], tokenizer.eos_token_id, *words[1]]
    before = tokenizer.decode(words[0])
    for stop, text in ((mark, before), (before[-1] + mark, before[:-1])):
        params = SamplingParams(stop=(stop,), max_new_tokens=1000)
        if stop in tokenizer.decode(ids):
            assert ended(tokenizer, ids, params) == len(words[0]) + 1
            assert StopRule(params, tokenizer).text(ids[: len(words[0]) + 1]) == text
    shown = SamplingParams(skip_special_tokens=False)
    assert StopRule(shown, tokenizer).text(ids) == tokenizer.decode(ids)
    assert streamed(tokenizer, ids, shown, [1] * len(ids)) == tokenizer.decode(ids)


def test_guesses_taken_back_leave_no_text_behind() -> None:
    tokenizer = byte_tokenizer()
    rule = StopRule(SamplingParams(stop=("end",), max_new_tokens=99), tokenizer)
    right, wrong = (
        tokenizer(t, add_special_tokens=False).input_ids for t in ("one end", "one ebb")
    )
    for n in range(1, len(right)):
        assert not rule.is_last(right[:n])
        for guess in range(n + 1, len(wrong) + 1):
            rule.is_last([*right[:n], *wrong[n:guess]])
    assert rule.is_last(right)

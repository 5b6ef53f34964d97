"""New tokens change nothing but how answers are written, whatever the tokenizer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from families import FAMILIES, SENTENCES, make
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tascade.enrich.tokens.extend import (
    TOKENIZER_FILE,
    ExtensionReport,
    check_extension,
    save_extended,
)
from tascade.enrich.tokens.family import TokenizerFamily
from tascade.enrich.tokens.merger import TokenMerger
from tascade.enrich.tokens.mine import MiningRules, OutputCounts, choose
from tascade.errors import ConfigError

REAL = ("pythia-50k", "dolma2-100k", "phi3-32k")
RULES = MiningRules(tokens=60, least=2, method="paper")  # unused ones too


def answers(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    return [tokenizer(text, add_special_tokens=False).input_ids for text in texts]


def extend(tokenizer: Any, texts: Sequence[str], folder: Path, rules: MiningRules = RULES) -> Any:
    family = TokenizerFamily(tokenizer)
    counted = OutputCounts(answers(tokenizer, [text for text in texts for _ in range(3)]))
    chosen = choose(counted, family.size, rules, family.spell)
    merger = TokenMerger(chosen, family.size)
    save_extended(tokenizer, chosen, family.size, folder)
    return AutoTokenizer.from_pretrained(folder), merger


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    tokenizer = make(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    return (request.param, tokenizer, *extend(tokenizer, SENTENCES, folder), folder)


def test_every_family_reads_and_says_the_same(case: Any) -> None:
    _, base, extended, merger, _ = case
    assert len(merger) > 20
    prompts = [*SENTENCES, "in therapy <tool> in theory<|end|>", "book_flight", " the", ""]
    report = check_extension(base, extended, merger, prompts, SENTENCES)
    assert report.passed, report.failures


def test_random_ids_are_merged_exactly(case: Any) -> None:
    _, base, _, merger, _ = case
    rng = np.random.default_rng(0)
    size = TokenizerFamily(base).size
    for _ in range(300):
        ids = rng.integers(0, size, rng.integers(0, 40)).tolist()
        ids += list(merger.expansions[rng.integers(len(merger))])
        merged = merger.merge(ids)
        assert merger.unmerge(merged).tolist() == ids
        assert len(merged) < len(ids)


def test_chat_templates_are_read_the_same(case: Any) -> None:
    _, base, extended, _, _ = case
    messages = [{"role": "user", "content": text} for text in SENTENCES]
    before = base.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert before == extended.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )


def test_no_token_holds_what_it_must_not(case: Any) -> None:
    _, base, extended, merger, _ = case
    family = TokenizerFamily(base)
    for number, expansion in enumerate(merger.expansions):
        assert all(family.is_plain(token) for token in expansion)
        assert "\N{REPLACEMENT CHARACTER}" not in extended.decode([merger.first + number])
    specials = [base.convert_tokens_to_ids(t) for t in ("<|end|>", "<tool>")]
    plain = next(t for t in range(family.size) if family.is_plain(t))
    assert all(family.spell([special, plain]) is None for special in specials)


@pytest.mark.parametrize("family", ["llama2", "gemma"])
def test_byte_pieces_stay_alone(family: str) -> None:
    tokenizer = make(family)
    ids = tokenizer("°C", add_special_tokens=False).input_ids
    pieces = [t for t in ids if tokenizer.convert_ids_to_tokens(t).startswith("<0x")]
    assert len(pieces) == 2
    assert TokenizerFamily(tokenizer).spell(pieces) is None


def test_half_a_character_is_no_token() -> None:
    tokenizer = make("gpt2")
    ids = tokenizer("日本").input_ids
    family = TokenizerFamily(tokenizer)
    assert len(ids) > 2
    assert family.spell(ids) is not None
    assert family.spell(ids[:-1]) is None


def test_a_word_that_prompts_would_find_is_no_token() -> None:
    found = {}
    for name in ("qwen", "llama3"):
        tokenizer = make(name)
        family = TokenizerFamily(tokenizer)
        ids = tokenizer(" therapeutic").input_ids
        found[name] = family.spell(ids) is not None
    assert found == {"qwen": True, "llama3": False}


def planted(case: Any, change: Any) -> ExtensionReport:
    """The report on an extended tokenizer that somebody broke."""
    _, base, _, merger, folder = case
    layout = json.loads((folder / TOKENIZER_FILE).read_text())
    change(layout)
    from tokenizers import Tokenizer

    core = Tokenizer.from_str(json.dumps(layout))
    broken = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>")
    return check_extension(base, broken, merger, ["in therapy<|end|>", *SENTENCES], SENTENCES)


def test_a_shifted_special_id_is_caught(case: Any) -> None:
    def shift(layout: Any) -> None:
        for entry in layout["added_tokens"]:
            layout["model"]["vocab"].pop(entry["content"], None)

    family, base, *_ = case
    if family in ("llama2", "gemma"):  # <unk>, <s> and </s> must stay, or nothing opens
        pytest.skip("their first special tokens are part of the model")
    report = planted(case, shift)
    assert "special or added ids have changed" in report.failures
    assert base.eos_token_id is not None


def test_two_tokens_swapped_are_caught(case: Any) -> None:
    def swap(layout: Any) -> None:
        vocabulary = layout["model"]["vocab"]
        *_, a, b = vocabulary
        vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]

    assert "decoded text differs" in planted(case, swap).failures


def test_tokens_that_prompts_match_are_caught(case: Any) -> None:
    """What ``add_tokens`` does: it cuts the tokens around it."""
    _, base, _, merger, folder = case
    broken = AutoTokenizer.from_pretrained(folder)
    broken.add_tokens(["the pat", " in the"])
    report = check_extension(base, broken, merger, ["the patient, in therapy"])
    assert "a prompt is read differently" in report.failures


def test_taken_ids_are_refused(tmp_path: Path) -> None:
    tokenizer = make("gpt2")
    ids = tokenizer("in the").input_ids
    with pytest.raises(ConfigError, match="taken"):
        save_extended(tokenizer, [ids], 5, tmp_path)
    with pytest.raises(ConfigError, match="must not become one token"):
        save_extended(tokenizer, [ids, ids], 5000, tmp_path)


def test_other_kinds_are_refused_with_the_reason(shared: Path) -> None:
    path = shared / "tokenizers" / "t5-32k" / TOKENIZER_FILE
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(path))
    with pytest.raises(ConfigError, match="new tokens") as caught:
        TokenizerFamily(tokenizer)
    assert "Unigram" in str(caught.value)


@pytest.mark.parametrize("name", REAL)
def test_real_tokenizers_on_real_answers(shared: Path, tmp_path: Path, name: str) -> None:
    from tascade.data.load import load_examples

    path = shared / "tokenizers" / name / TOKENIZER_FILE
    base = PreTrainedTokenizerFast(tokenizer_file=str(path))
    texts, prompts = [], []
    for task in ("multilabel_nlupp", "text_to_sql_advising", "translation_pydocs_es"):
        rows = list(load_examples(shared / "data" / task / "train.jsonl"))[:700]
        texts += [str(row.completion) for row in rows]
        prompts += [str(row.prompt) for row in rows]
    extended, merger = extend(base, texts, tmp_path, MiningRules(tokens=300, least=9))
    assert len(merger) == 300
    report = check_extension(base, extended, merger, prompts[:2000], texts[:2000])
    assert report.passed, report.failures

"""Tokenizers of every family that can be given new tokens, trained here on a few sentences."""

from __future__ import annotations

import json
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

SENTENCES = [
    "the patient was diagnosed with a rare form of cancer in the lung",
    "intent: book_flight, slots: {from: Paris, to: Zürich, day: Monday}",
    "SELECT name FROM course WHERE course.department = 'EECS' ;",
    "there is no temperature of 37 °C; naïveté costs 5 µg of café",
    "in therapy, in theory, in the end  two  spaces\nand a new line",
    "日本語の文 and emoji 🙂 too",
]
_SPLIT = Regex(r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+")
FAMILIES = ("gpt2", "llama3", "qwen", "llama2", "gemma")


def make(family: str) -> Any:
    """A Transformers tokenizer of this family, special tokens added behind the vocabulary."""
    core = _byte_level(family) if family in ("gpt2", "llama3", "qwen") else _sentencepiece(family)
    ends = [AddedToken(text, special=True, normalized=False) for text in ("<|end|>", "<|user|>")]
    core.add_special_tokens(ends)
    core.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    made = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>")
    made.chat_template = (
        "{% for m in messages %}<|user|>{{ m['content'] }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<tool>{% endif %}"
    )
    return made


def _byte_level(family: str) -> Tokenizer:
    core = Tokenizer(models.BPE())
    if family == "gpt2":
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        split = pre_tokenizers.Split(_SPLIT, "isolated")
        plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        core.pre_tokenizer = pre_tokenizers.Sequence([split, plain])
    if family == "qwen":
        core.normalizer = normalizers.NFC()
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        SENTENCES * 20, BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    if family != "llama3":
        return core
    layout = json.loads(core.to_str())
    layout["model"]["ignore_merges"] = True
    return Tokenizer.from_str(json.dumps(layout))


def _sentencepiece(family: str) -> Tokenizer:
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(
        [s for s in SENTENCES if s.isascii()] * 20, BpeTrainer(vocab_size=200, show_progress=False)
    )
    model = json.loads(trained.to_str())["model"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    for piece in model["vocab"]:
        vocabulary.setdefault(piece, len(vocabulary))
    merges = [tuple(merge) for merge in model["merges"]]
    core = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    back = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if family == "llama2":
        core.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        back.append(decoders.Strip(" ", 1, 0))
    else:
        core.normalizer = normalizers.Replace(" ", "▁")
        core.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    core.decoder = decoders.Sequence(back)
    core.add_special_tokens([AddedToken(p, special=True) for p in ("<unk>", "<s>", "</s>")])
    return core

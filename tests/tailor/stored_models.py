"""Tiny random models of every family, saved to a folder as a hub would hold them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tascade.testing import byte_tokenizer, tiny_model

VOCAB = 263
KINDS = {
    "llama-tied": ("llama", True),
    "llama": ("llama", False),
    "qwen3-tied": ("qwen3", True),
    "gemma-tied": ("gemma", True),
    "gemma3": ("gemma3", False),
    "gpt_neox": ("gpt_neox", False),
    "phi": ("phi", False),
    "phi-tied": ("phi", True),
    "gpt2-tied": ("gpt2", True),
}
"""Name -> (family, tied)."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def make(kind: str, **overrides: Any) -> Any:
    """A model in float32; a head's bias is not left at zero."""
    family, tied = KINDS[kind]
    settings = {"vocab_size": VOCAB, **overrides}
    if family == "gpt2":
        model = _gpt2(**settings)
    else:
        model = tiny_model(family, tie_word_embeddings=tied, **settings)
    bias = model.get_output_embeddings().bias
    if bias is not None:
        with torch.no_grad():
            bias.copy_(torch.linspace(-2, 2, len(bias)).sin())
    return model


def save(folder: Path, kind: str, dtype: torch.dtype = torch.float32, **how: Any) -> Path:
    """Save a model and a tokenizer; ``how`` goes to ``save_pretrained``."""
    make(kind).to(dtype).save_pretrained(folder, **how)
    byte_tokenizer().save_pretrained(folder)
    return folder


def stock(folder: Path, **how: Any) -> Any:
    """The model as Transformers loads it."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True, **how)


def some_ids(*shape: int) -> torch.Tensor:
    """Reproducible token ids, first and last among them."""
    ids = torch.randint(0, VOCAB, shape, generator=torch.Generator().manual_seed(0))
    ids.view(-1)[0], ids.view(-1)[-1] = 0, VOCAB - 1
    return ids


def _gpt2(vocab_size: int, **overrides: Any) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, **overrides}
    ids = {"bos_token_id": None, "eos_token_id": None}
    config = GPT2Config(vocab_size=vocab_size, initializer_range=0.4, **ids, **sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return GPT2LMHeadModel(config).eval()

"""Models whose state cannot be rewound, or that a tree would confuse, are refused."""

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from tascade.core import DraftTree
from tascade.decode.loop import Decoder
from tascade.decode.sampling import SamplingParams
from tascade.decode.target import Target
from tascade.draft.budget import NoDrafter
from tascade.errors import UnsupportedModelError
from tascade.testing import OracleDrafter, RandomTreeDrafter, ScriptedDrafter, tiny_model

SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "pad_token_id": 0}
ATTENTION = {
    **SMALL,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 32,
    "initializer_range": 0.4,
    "bos_token_id": None,
    "eos_token_id": None,
}
MAMBA = {"mamba_d_state": 8, "mamba_d_conv": 4, "mamba_expand": 2}
REFUSED = {
    "mamba": {**SMALL, "state_size": 8},
    "recurrent_gemma": {**ATTENTION, "lru_width": 32, "attention_window_size": 16},
    "qwen3_next": {**ATTENTION, "num_experts": 4, "num_experts_per_tok": 2},
    "lfm2": {**ATTENTION, "layer_types": ["conv", "full_attention"]},
    "llama4_text": {**ATTENTION, "num_local_experts": 2, "intermediate_size_mlp": 32},
    "falcon_h1": {**ATTENTION, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8},
    "jamba": {**ATTENTION, **MAMBA, "num_experts": 2, "mamba_dt_rank": 4},
    "bamba": {**ATTENTION, **MAMBA, "mamba_n_heads": 8, "mamba_d_head": 8},
    "granitemoehybrid": {
        **ATTENTION,
        **MAMBA,
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "layer_types": ["mamba", "attention"],
    },
    "minimax": {**ATTENTION, "num_local_experts": 2},
    # attention, but not placed by position ids and masks alone:
    "bloom": {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "mpt": {"vocab_size": 64, "d_model": 32, "n_layers": 2, "n_heads": 4},
    "falcon": {**SMALL, "num_attention_heads": 4, "alibi": True},
    "gpt_neo": {
        "vocab_size": 64,
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
    },
    "bert": {**SMALL, "num_attention_heads": 4, "intermediate_size": 32},
    "bart": {"vocab_size": 64, "d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4},
}


def tiny(kind, **fields):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **fields))
    return model.eval()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", REFUSED)
def test_refused(kind):
    with pytest.raises(UnsupportedModelError, match="cannot be verified"):
        Target(tiny(kind, **REFUSED[kind]))


def test_encoder_decoder_models_are_refused():
    config = AutoConfig.for_model(
        "t5", vocab_size=64, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4
    )
    with pytest.raises(UnsupportedModelError, match="cannot be rewound"):
        Target(AutoModelForSeq2SeqLM.from_config(config))


MORE = {
    "mixtral": {**ATTENTION, "num_local_experts": 4},
    "gpt2": {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.4},
    "opt": {
        **SMALL,
        "num_attention_heads": 4,
        "ffn_dim": 64,
        "word_embed_proj_dim": 32,
        "init_std": 0.4,
    },
    "falcon": {**SMALL, "num_attention_heads": 4, "initializer_range": 0.4},
    "cohere2": {
        **ATTENTION,
        "sliding_window": 12,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "deepseek_v3": {
        **ATTENTION,
        "num_key_value_heads": 4,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 16,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 16,
        "q_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    },
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", MORE)
def test_mixtures_of_experts_and_learned_positions_are_taken(kind):
    target = Target(tiny(kind, **MORE[kind]))
    params = SamplingParams(max_new_tokens=40, end_tokens=())
    prompt = list(range(3, 12))
    plain = Decoder(target, NoDrafter()).generate(prompt, params).tokens
    ids = torch.tensor([prompt])
    own = target.model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=40,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert own[0, 9:].tolist() == plain
    for drafter in (OracleDrafter(plain, wrong_every=5), RandomTreeDrafter(64)):
        assert Decoder(target, drafter).generate(prompt, params).tokens == plain


# --- edges of the positions -----------------------------------------------------------------


class Deep(ScriptedDrafter):
    """Drafts a chain as deep as it may, at every step."""

    def __init__(self):
        super().__init__([])
        self.asked = []

    def _draft(self, limit):
        self.asked.append(limit)
        return DraftTree.chain(np.arange(limit) % 64)


def same_with_deep_drafts(model, prompt, tokens):
    target = Target(model)
    params = SamplingParams(max_new_tokens=tokens)
    plain = Decoder(target, NoDrafter()).generate(prompt, params).tokens
    deep = Deep()
    assert Decoder(target, deep).generate(prompt, params).tokens == plain
    known = OracleDrafter(plain, wrong_every=7, branching=0.0)
    assert Decoder(target, known).generate(prompt, params).tokens == plain
    return deep.asked


def test_drafts_end_where_learned_positions_end():
    model = tiny("gpt2", **MORE["gpt2"], n_positions=40)
    asked = same_with_deep_drafts(model, list(range(20)), 21)
    assert max(asked) == 20


@pytest.mark.parametrize("kind", ["dynamic", "longrope", "yarn"])
def test_drafts_do_not_turn_rotary_frequencies_before_their_time(kind):
    rope = {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0}
    if kind != "dynamic":
        rope["original_max_position_embeddings"] = 32
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 4.0, 8.0]}
    length = 32 if kind == "dynamic" else 128
    model = tiny_model("llama", max_position_embeddings=length, rope_parameters=rope)
    asked = same_with_deep_drafts(model, list(range(20)), 60)
    assert max(asked) == (64 if kind != "dynamic" else 12)

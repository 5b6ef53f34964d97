"""Write the table of docs/models.md: every causal architecture of the installed Transformers.

    python docs/generate_models.py

Each is built with two small random layers, and asked five prompts: what tascade says, plain and
with drafts that are wrong at times, is held against ``model.generate``, token for token in float32.
"""

from __future__ import annotations

import inspect
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from tascade.decode.batch import BatchDecoder
from tascade.decode.batch_target import BatchTarget
from tascade.decode.loop import AllNodes, Decoder
from tascade.decode.sampling import SamplingParams
from tascade.decode.target import Target
from tascade.draft.budget import NoDrafter
from tascade.errors import UnsupportedModelError
from tascade.testing import OracleDrafter, RandomTreeDrafter

PAGE = Path(__file__).parent / "models.md"
MARKS = "<!-- models -->", "<!-- end of models -->"
NAMES = tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
VOCAB, ANSWER = 96, 16
MOST_WEIGHTS = 20_000_000
LENGTHS = (3, 9, 17, 30, 41)

_LAYERS, _WIDTH, _HEADS = 2, 32, 4
SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "initializer_range": 0.4,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
    "is_decoder": True,
    **dict.fromkeys(
        ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "decoder_layers"), _LAYERS
    ),
    "encoder_layers": 1,
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "embedding_size", "dim_model"), _WIDTH),
    **dict.fromkeys(
        ("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), _HEADS
    ),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "decoder_ffn_dim", "n_inner", "dim_ff"), 64),
    **dict.fromkeys(("ffn_hidden_size", "shared_expert_intermediate_size"), 64),
    **dict.fromkeys(("moe_intermediate_size", "intermediate_size_mlp", "expert_ffn_size"), 32),
    **dict.fromkeys(("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "num_experts_per_token"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "num_shared_experts"), 1),
    "num_key_value_heads": 2,
    "head_dim": 8,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "qk_head_dim": 16,
    "v_head_dim": 8,
    "rotary_dim": 8,
    "state_size": 8,
    "sliding_window": 24,
    "first_k_dense_replace": 1,
    "query_pre_attn_scalar": 8,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCAB,
    "num_kv_shared_layers": 0,
    "mamba_d_state": 8,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_ssm": 64,
    "dropout": 0.0,
}
# What a small model of them needs besides.
_LATENT = {"num_key_value_heads": _HEADS}  # latent attention: as many as there are queries
MORE: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        ("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite"), _LATENT
    ),
    **dict.fromkeys(("glm_moe_dsa", "longcat_flash", "minicpm3", "youtu"), _LATENT),
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
}


def config_of(name: str) -> Any:
    """A small config of an architecture; fields that it does not have are left out."""
    kind = CONFIG_MAPPING[name]
    known = {*vars(kind()), *inspect.signature(kind.__init__).parameters}
    known |= set(getattr(kind, "attribute_map", {}))
    fields = {field: value for field, value in SMALL.items() if field in known}
    fields |= MORE.get(name, {})
    while True:
        try:
            return kind(**fields)
        except StrictDataclassFieldValidationError as error:
            del fields[str(error).split("'")[1]]  # of another type there


def build(name: str) -> Any:
    """A random model in float32 that fits into a test.

    Raises:
        Exception: of any kind, where the architecture cannot be built like this.
    """
    config = config_of(name)
    other = {"vision_config", "audio_config"} & set(type(config).sub_configs)
    if other or config.get_text_config() is not config:
        raise ValueError("more than a language model")
    with torch.device("meta"):
        weights = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if weights > MOST_WEIGHTS:
        raise ValueError(f"{weights / 1e6:.0f} million weights: its config has other names")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config_of(name), dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    return model


def says(model: Any, prompt: list[int]) -> list[int]:
    """Transformers' answer."""
    made = model.generate(
        torch.tensor([prompt]), max_new_tokens=ANSWER, do_sample=False, pad_token_id=0
    )
    return [int(token) for token in made[0, len(prompt) :]]


def compare(model: Any) -> str:
    """Say that all is equal, or what is not.

    Raises:
        UnsupportedModelError: it is refused.
    """
    target, params = Target(model), SamplingParams(max_new_tokens=ANSWER)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(1, VOCAB, n).tolist() for n in LENGTHS]
    wanted = [says(model, prompt) for prompt in prompts]
    for prompt, answer in zip(prompts, wanted, strict=True):
        drafters = {
            "plain": NoDrafter(),
            "drafts": OracleDrafter(answer, wrong_every=3),
            "trees": RandomTreeDrafter(VOCAB, 0),
        }
        for how, drafter in drafters.items():
            said = Decoder(target, drafter, AllNodes(6)).generate(prompt, params).tokens
            if said != answer:
                return f"differs: {how}, a prompt of {len(prompt)}"
    try:
        together = BatchDecoder(BatchTarget(model), size=3).generate(prompts, params)
    except UnsupportedModelError as error:
        return f"equal; not in batches: {error.message}"
    if [answer.tokens for answer in together] != wanted:
        return "differs: a batch"
    return "equal" if len({token for answer in wanted for token in answer}) > 3 else "equal, dull"


def tried(name: str) -> str:
    """What becomes of an architecture here: equal, refused and why, or not built."""
    try:
        model = build(name)
        Target(model)
        says(model, [1, 2, 3])
    except UnsupportedModelError as error:
        return f"refused: {error.got}"
    except Exception as error:  # whatever its own code raises for a config of these fields
        return (
            f"not built: {str(error).splitlines()[0][:110] if str(error) else type(error).__name__}"
        )
    return compare(model)


def rows_of(text: str) -> dict[str, str]:
    """What the page says of each architecture."""
    table = text.partition(MARKS[0])[2].partition(MARKS[1])[0]
    lines = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| `")]
    return {name.strip("`"): said for name, said in lines}


def main() -> None:
    """Try all, or those that are named, and put them into the page."""
    logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    text = PAGE.read_text("utf-8")
    found = rows_of(text)
    before, _, rest = text.partition(MARKS[0])
    after = rest.partition(MARKS[1])[2]
    for name in sys.argv[1:] or NAMES:
        found[name] = tried(name).replace("|", "/")
        sys.stdout.write(f"{name} | {found[name]}\n")
        sys.stdout.flush()
        lines = ["", "| architecture | here |", "|---|---|"]
        lines += [f"| `{known}` | {found[known]} |" for known in NAMES if known in found]
        table = "\n".join(lines)
        PAGE.write_text(f"{before}{MARKS[0]}\n{table}\n\n{MARKS[1]}{after}", "utf-8")


if __name__ == "__main__":
    main()

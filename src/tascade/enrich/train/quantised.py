"""Training over a quantised base (QLoRA, arXiv 2305.14314), and merging into the full one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tascade.enrich.train.lora import load_peft, merge
from tascade.enrich.train.seeding import seeded
from tascade.errors import ConfigError

KINDS = ("4bit", "8bit")


def load_quantised(name: str, kind: str, device: Any) -> Any:
    """A model whose linear layers, but the LM head, hold 4 or 8 bits a weight (bitsandbytes).

    Args:
        name: a hub id or a folder.
        kind: one of :data:`KINDS`; ``4bit`` is NF4, quantised twice.
        device: where to put it.

    Raises:
        ConfigError: bitsandbytes is not installed, or cannot serve this machine.
    """
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    four: dict[str, Any] = {
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.bfloat16,
    }
    try:
        quantised = BitsAndBytesConfig(
            **{f"load_in_{kind}": True}, **(four if kind == "4bit" else {})
        )
        model = AutoModelForCausalLM.from_pretrained(
            name, quantization_config=quantised, device_map={"": device}, use_safetensors=True
        )
    except (ImportError, RuntimeError) as error:
        raise ConfigError(
            "cannot load the model quantised",
            got=str(error).splitlines()[0] if str(error) else type(error).__name__,
            wanted="bitsandbytes, on a machine it serves",
            where="tune.load",
            fix="pip install bitsandbytes, or leave tune.load empty",
        ) from error
    return model.eval()


def merge_into(trained: Any, full: Any) -> Any:
    """What ``trained`` learned over a quantised base, merged into the full one's own weights.

    The base has been rounded for training; merging into the rounded weights would keep that loss.

    Args:
        trained: see :func:`tascade.enrich.train.lora.wrap`.
        full: the same base model, as many rows as that one has; it is changed.
    """
    peft = load_peft()
    adapter = replace(trained.peft_config["default"], base_model_name_or_path=None)
    with seeded(0, full.device):  # what is drawn here is written over
        wrapped = peft.get_peft_model(full, adapter)
    learned = peft.get_peft_model_state_dict(trained, save_embedding_layers=False)
    learned = {key: value.to(full.device) for key, value in learned.items()}
    peft.set_peft_model_state_dict(wrapped, learned)
    return merge(wrapped)

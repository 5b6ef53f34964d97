"""LoRA over all linear layers, and the rows of new tokens beside it (PEFT)."""

from __future__ import annotations

from typing import Any

import torch

from tascade.config import TuneConfig
from tascade.enrich.train.samples import seeded
from tascade.errors import ConfigError


def load_peft() -> Any:
    """The PEFT library.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise ConfigError(
            "PEFT is not installed",
            got=error,
            wanted="peft, for tuning",
            fix="pip install 'tascade[tune]'",
        ) from error
    return peft


def wrap(model: Any, first: int, rows: int, config: TuneConfig) -> Any:
    """A PEFT model over ``model``: LoRA, and ``rows`` rows from ``first`` on trainable.

    The rows are named table by table. A bare list of ids would train the input rows alone where
    the LM head is a table of its own.
    """
    peft = load_peft()
    tables = _names(model, model.get_input_embeddings(), model.get_output_embeddings())
    ids = list(range(first, first + rows))
    adapter = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=config.rank,
        lora_alpha=2 * config.rank,  # never varied
        target_modules="all-linear",
        trainable_token_indices={name: ids for name in tables} if rows else None,
    )
    with seeded(config.seed, model.device):  # LoRA's own start is random
        return peft.get_peft_model(model, adapter)


def _names(model: Any, *modules: Any) -> list[str]:
    """The last parts of the modules' names, as PEFT matches them."""
    found = {id(module): name for name, module in model.named_modules()}
    return [found[id(module)].rsplit(".", 1)[-1] for module in modules]


def lora_parameters(model: Any) -> list[torch.nn.Parameter]:
    """The adapter's matrices."""
    return [p for name, p in model.named_parameters() if ".lora_" in name]


def row_parameters(model: Any) -> list[torch.nn.Parameter]:
    """The rows of new tokens, each table's once."""
    named = dict(model.named_parameters(remove_duplicate=True))
    return [p for name, p in named.items() if "trainable_tokens_delta" in name]


def merge(model: Any) -> Any:
    """The plain model with everything learned in its own weights."""
    return model.merge_and_unload()

"""Loading a model and its tokenizer: the one place that may reach a hub."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

from tascade.errors import ConfigError

ModelRef = str | Path | tuple[Any, Any]
"""A hub id, a folder, or a loaded ``(model, tokenizer)``."""


def load_model(ref: ModelRef, *, dtype: str = "auto", device: str = "auto") -> tuple[Any, Any, str]:
    """Load ``(model, tokenizer, name)``. Weights must be safetensors; remote code is never run.

    Raises:
        ConfigError: nothing loadable under that name.
    """
    if isinstance(ref, tuple):
        model, tokenizer = ref
        return model.eval(), tokenizer, str(getattr(model, "name_or_path", "") or "in-memory model")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    name = str(ref)
    kind = dtype if dtype == "auto" else getattr(torch, dtype)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=kind, use_safetensors=True)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            "cannot load the model",
            got=f"{name}: {str(error).splitlines()[0] if str(error) else type(error).__name__}",
            wanted="a hub id or a folder with config.json, safetensors weights and a tokenizer",
            where="model",
            fix="check the name; offline, give the path of a downloaded folder",
        ) from error
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.to(device).eval(), tokenizer, name


def stored_dtype(model: Any, name: str) -> Any:
    """The precision a model's checkpoint is stored in; its own, if it came from none."""
    from transformers import AutoConfig

    try:
        stored = AutoConfig.from_pretrained(name).get_text_config().dtype
    except (OSError, ValueError, KeyError):
        stored = None
    return stored or model.dtype


def machine_key(model: Any) -> str:
    """Names the conditions a measured step cost holds under."""
    import torch

    where = model.device.type
    if where == "cuda":
        unit = torch.cuda.get_device_name(model.device)
    else:
        unit = f"{_cpu_name()} x{torch.get_num_threads()}"
    return f"{where}/{unit}/{str(model.dtype).removeprefix('torch.')}/torch {torch.__version__}"


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()

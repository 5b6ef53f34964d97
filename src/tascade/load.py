"""Loading a model and its tokenizer: the one place that may reach a hub."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tascade.errors import ConfigError, TascadeError

ModelRef = str | Path | tuple[Any, Any]
"""A hub id, a folder, or a loaded ``(model, tokenizer)``."""


def load_model(ref: ModelRef, *, dtype: str = "auto", device: str = "auto") -> tuple[Any, Any, str]:
    """Load ``(model, tokenizer, name)``. Weights must be safetensors; remote code is never run.

    Raises:
        ConfigError: nothing loadable under that name.
    """
    if isinstance(ref, tuple):
        model, tokenizer = ref
        return model, tokenizer, str(getattr(model, "name_or_path", "") or "in-memory model")
    import torch
    from transformers import AutoModelForCausalLM

    name = str(ref)
    kind = dtype if dtype == "auto" else getattr(torch, dtype)
    with loading(name):
        tokenizer = load_tokenizer(name)
        model = AutoModelForCausalLM.from_pretrained(
            name, dtype=kind, use_safetensors=True, trust_remote_code=False
        )
    return model.to(pick_device(device)).eval(), tokenizer, name


@contextmanager
def loading(name: str) -> Iterator[None]:
    """Turn what Transformers and the hub raise about a model into a ConfigError."""
    try:
        yield
    except TascadeError:
        raise
    except Exception as error:  # on damaged files they and the parsers below raise nearly anything
        raise ConfigError(
            "cannot load the model",
            got=f"{name}: {str(error).splitlines()[0] if str(error) else type(error).__name__}",
            wanted="a hub id or a folder with config.json, safetensors weights and a tokenizer",
            where="model",
            fix="check the name; offline, give the path of a downloaded folder",
        ) from error


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a hub id or a folder."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(name, trust_remote_code=False)


def checkpoint_folder(name: str, weights: str | None = None) -> Path:
    """The folder of a model's safetensors files: itself, or the hub's snapshot, fetched if need be.

    Args:
        name: a hub id or a folder.
        weights: the name of the weights' file, where the model's config gives one.
    """
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    files = [weights] if weights else ["model.safetensors", "model-*-of-*.safetensors"]
    files += ["model.safetensors.index.json", "adapter_config.json"]
    return Path(snapshot_download(name, allow_patterns=files))


def pick_device(device: str) -> str:
    """The device meant by ``auto``: a GPU if there is one."""
    if device != "auto":
        return device
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


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
        unit = f"{cpu_name()} x{torch.get_num_threads()}"
    return f"{where}/{unit}/{str(model.dtype).removeprefix('torch.')}/torch {torch.__version__}"


def cpu_name() -> str:
    """The processor's name, or at least its kind."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine() or "unknown")

"""The state of a training run on disk: tensors and JSON, so that opening it runs nothing."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from tascade.core import IntArray
from tascade.errors import ConfigError
from tascade.util.files import folder_beside, install_folder, write_atomic

_TENSORS, _ABOUT, _RUN = "state.safetensors", "state.json", "run.json"


def begin_run(work: Path, about: dict[str, Any], *, resume: bool, or_anew: bool = False) -> None:
    """Begin a run in the folder ``work``, or go on with the one that was stopped there.

    Args:
        work: where the run keeps what it has made so far.
        about: what the run is made from, by name: digests and settings, as JSON has them.
        resume: go on with what is there. Otherwise it is thrown away if it was made from something
            else: nobody could go on with it.
        or_anew: throw it away then in either case.

    Raises:
        ConfigError: what is there was made from something else, or does not say from what; or,
            without ``resume``, a run like this one has left there what it made.
    """
    found, there = _read_run(work), set(os.listdir(work)) if work.is_dir() else set()
    if not resume and found == about and there != {_RUN}:
        raise ConfigError(
            "a run like this one was stopped, and what it had made would be lost",
            got=", ".join(sorted(there - {_RUN})[:4]),
            wanted="to go on with it, or not to have it there",
            where=str(work),
            fix="give --resume (resume=True) to go on with it, or remove the folder to begin anew",
        )
    if resume and found != about and there and not or_anew:
        raise ConfigError(
            "the run that was stopped here was another",
            got=_difference(found, about) or "more settings",
            wanted="the same model, data and settings",
            where=str(work),
            fix="run without resume to begin anew, or with what the stopped run had",
        )
    if not resume or found != about:
        shutil.rmtree(work, ignore_errors=True)
        write_atomic(work / _RUN, json.dumps(about).encode())


def _read_run(work: Path) -> Any:
    try:
        return json.loads((work / _RUN).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None


def model_digest(model: Any) -> str:
    """Identifies a model by its config and all its weights, wherever it lies."""
    digest = hashlib.blake2b(digest_size=16)
    config = model.config.to_dict()
    for name in ("_name_or_path", "transformers_version"):
        config.pop(name, None)
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    for name, weight in model.named_parameters():
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        # As bytes: NumPy has no bfloat16.
        raw = weight.detach().cpu().contiguous().flatten().view(torch.uint8)
        digest.update(memoryview(raw.numpy()))
    return digest.hexdigest()


def rows_digest(rows: Sequence[tuple[IntArray | None, IntArray]]) -> str:
    """Identifies rows (prompt, answer) of token ids, and their order."""
    digest = hashlib.blake2b(digest_size=16)
    for row in rows:
        for ids in row:
            digest.update(b"none" if ids is None else f"{len(ids)} ".encode() + ids.tobytes())
    return digest.hexdigest()


def save_state(
    folder: Path,
    parameters: dict[str, torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    about: dict[str, Any],
) -> None:
    """Write parameters, the optimizer's moments and ``about``; the folder before is replaced.

    A crash leaves the state of before or this one (see :func:`tascade.util.files.install_folder`).
    """
    tensors = {f"p.{name}": p.detach().cpu().contiguous() for name, p in parameters.items()}
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{key}.{name}"] = torch.as_tensor(value).detach().cpu().contiguous()
    with folder_beside(folder) as part:
        save_file(tensors, part / _TENSORS)
        (part / _ABOUT).write_text(json.dumps(about))
        install_folder(part, folder)


def has_state(folder: Path) -> bool:
    """Whether a state was saved there."""
    return (folder / _ABOUT).is_file()


def load_state(
    folder: Path,
    parameters: dict[str, torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    wanted: dict[str, Any],
) -> dict[str, Any]:
    """Put a saved state back into parameters and optimizer; returns what was saved with it.

    Args:
        folder: see :func:`save_state`.
        parameters: to fill, by the names they were saved under.
        optimizer: to fill.
        wanted: its ``settings`` must be those the state was saved with.

    Raises:
        ConfigError: no readable state, or one of another run.
    """
    try:
        about: dict[str, Any] = json.loads((folder / _ABOUT).read_text())
        tensors = load_file(folder / _TENSORS)
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise ConfigError(
            "cannot read the state of training", got=error, where=str(folder)
        ) from error
    shapes = {f"p.{name}": p.shape for name, p in parameters.items()}
    found = {name: t.shape for name, t in tensors.items() if name.startswith("p.")}
    settings = about.get("settings")
    if found != shapes or settings != wanted["settings"]:
        raise ConfigError(
            "the state of training was left by another run",
            got=_difference(settings, wanted["settings"]) or "other layers",
            wanted="the same model, data and settings",
            where=str(folder),
            fix="remove the folder to begin anew, or run with the settings of before",
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[f"p.{name}"])
            moments = {
                key: tensors[f"{key}.{name}"]
                for key in ("step", "exp_avg", "exp_avg_sq")
                if f"{key}.{name}" in tensors
            }
            if moments:
                step = moments.pop("step")
                on_device = {key: value.to(parameter.device) for key, value in moments.items()}
                optimizer.state[parameter] = {"step": step, **on_device}
    return about


def _difference(found: Any, wanted: dict[str, Any]) -> str:
    if not isinstance(found, dict):
        return "it does not say which: an earlier version of tascade began it"
    keys = [key for key in wanted if found.get(key) != wanted[key]]
    return ", ".join(f"{key} {found.get(key)!r} (now {wanted[key]!r})" for key in keys)

"""A trained drafter in a file of its pack: safetensors, with what it was made for in the header."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from tascade.decode.supported import table_rows
from tascade.draft.neural.canary import Canary
from tascade.draft.neural.network import DraftNetwork, DraftShape
from tascade.errors import ConfigError, FingerprintError, PackError
from tascade.util.fields import typed
from tascade.util.files import write_atomic

FORMAT, VERSION = "tascade-drafter", 1
MOST_BYTES = 4 << 30
_FEW = 64
_DAMAGE = (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError, ConfigError)


@dataclass(frozen=True, slots=True)
class DrafterInfo:
    """What a trained drafter was made for, and what it did on held-out answers.

    target: identifies the model (:func:`weights_mark`)
    fingerprint: of the tokenizer
    rows, tokens: answers that it learned from, and their tokens
    own_answers: how many of them were the model's own
    rounds: over all of them
    held_out: answers that it was tried on
    acceptance: share of its likeliest tokens that were right at depth 1, 2, ... if all before were
    coverage: share of held-out tokens that it can say
    canary: a few of the held-out answers, to look at where it is used; none in a file of before
    """

    target: str
    fingerprint: str
    rows: int
    tokens: int
    own_answers: int
    rounds: int
    held_out: int
    acceptance: tuple[float, ...]
    coverage: float
    canary: Canary | None = None


def weights_mark(model: Any) -> str:
    """Identifies a model's weights, in any precision: by a few numbers of each layer's tensors.

    A model that was trained further, merged with an adapter or quantised is another; one that was
    loaded as float32 instead of bfloat16 is not.
    """
    digest = hashlib.blake2b(digest_size=16)
    # Not the vocabulary's tables, which may stay in their file.
    tables = [end for end in (model.get_input_embeddings(), model.get_output_embeddings()) if end]
    apart = {id(weight) for table in tables for weight in table.parameters()}
    for name, weight in model.named_parameters():
        if id(weight) in apart:
            continue
        few = weight.detach().flatten()[:_FEW].float().cpu().numpy()
        digest.update(f"{name} {tuple(weight.shape)}".encode() + few.tobytes())
    return digest.hexdigest()


def save_drafter(
    path: Path, network: DraftNetwork, ids: torch.Tensor, info: DrafterInfo, dtype: torch.dtype
) -> None:
    """Write it whole, or not at all.

    Args:
        path: the file.
        network: as trained.
        ids: [Vd] the tokens that it can say, ascending.
        info: what is said of it.
        dtype: of the weights in the file.
    """
    tensors = {name: w.detach().to(dtype).contiguous() for name, w in network.state_dict().items()}
    about = {"format": FORMAT, "version": str(VERSION)}
    about |= {"shape": json.dumps(network.shape.to_json()), "info": json.dumps(asdict(info))}
    write_atomic(path, save(tensors | {"ids": ids.to(torch.int64)}, about))


@dataclass(frozen=True, slots=True)
class StoredDrafter:
    """A drafter's file as it was read, for no model in particular.

    shape, info: of the network
    ids: [Vd] the tokens that it can say, ascending
    tensors: its weights by name
    """

    shape: DraftShape
    info: DrafterInfo
    ids: torch.Tensor
    tensors: dict[str, torch.Tensor]


def read_drafter(path: Path) -> StoredDrafter:
    """Read a drafter's file; whether it fits a model is not looked at.

    Raises:
        PackError: no such file, or not one written by :func:`save_drafter`.
    """
    try:
        if path.stat().st_size > MOST_BYTES:
            raise ValueError("the file is too large")
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            if (about.get("format"), about.get("version")) != (FORMAT, str(VERSION)):
                raise ValueError(f"{about.get('format')!r} version {about.get('version')!r}")
            shape, info = _shape(json.loads(about["shape"])), _info(json.loads(about["info"]))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        ids = _ids(tensors.pop("ids"), shape)
        _check_tensors(shape, tensors)
    except _DAMAGE as error:
        raise _unreadable(path, error) from error
    return StoredDrafter(shape, info, ids, tensors)


def _unreadable(path: Path, error: Exception) -> PackError:
    return PackError(
        "cannot read the trained drafter",
        got=f"{type(error).__name__}: {error}"[:300],
        wanted="a file written by `tascade drafter`",
        where=str(path),
        fix="run `tascade drafter` again, or remove the file",
    )


def load_drafter(
    path: Path, model: Any, fingerprint: str
) -> tuple[DraftNetwork, torch.Tensor, DrafterInfo]:
    """Read a drafter for a model: the network, its tokens [Vd], its facts.

    Raises:
        PackError: no such file, or not one written by :func:`save_drafter`.
        FingerprintError: it was made for another model, or another tokenizer; it says which.
    """
    stored = read_drafter(path)
    shape, info, ids = stored.shape, stored.info, stored.ids
    rows = table_rows(model)
    if int(ids[-1]) >= rows or not (info.canary is None or info.canary.fits(rows)):
        raise _unreadable(path, ValueError("its tokens are none of the model's"))
    _check_target(info, model, fingerprint, path)
    config = model.config.get_text_config()
    if shape.hidden != config.hidden_size or shape.taps[-1] >= config.num_hidden_layers:
        raise PackError(
            "the trained drafter reads states that this model has not",
            got=f"width {shape.hidden}, of layers {', '.join(map(str, shape.taps))}",
            wanted=f"width {config.hidden_size}, of {config.num_hidden_layers} layers",
            where=str(path),
            fix="run `tascade drafter` again",
        )
    with torch.device("meta"):
        network = DraftNetwork(shape)
    network.load_state_dict(stored.tensors, assign=True)
    network.set_turns()
    # A row at a time, float32 is the faster one on a CPU: 1.1 against 1.7 ms at SmolLM2's widths.
    kind = torch.float32 if model.device.type == "cpu" else model.dtype
    return network.requires_grad_(False).to(model.device, kind).eval(), ids, info


def _check_target(info: DrafterInfo, model: Any, fingerprint: str, path: Path) -> None:
    for what, got, wanted in (
        ("another tokenizer", fingerprint, info.fingerprint),
        ("a model of other weights", weights_mark(model), info.target),
    ):
        if got != wanted:
            raise FingerprintError(
                f"this drafter was trained for {what}",
                got=got,
                wanted=wanted,
                where=str(path),
                fix="run `tascade drafter` again, for this model",
            )


def _shape(raw: Any) -> DraftShape:
    numbers = {field.name for field in fields(DraftShape)} - {"taps", "epsilon", "theta"}
    for name in numbers:
        if not 0 < typed(int, raw[name], name) <= 1 << 20:
            raise ValueError(f"{name} {raw[name]} is out of range")
    for name in ("epsilon", "theta"):
        if typed(float, raw[name], name) <= 0:
            raise ValueError(f"{name} {raw[name]} is out of range")
    taps = tuple(typed(int, tap, "taps") for tap in typed(list, raw["taps"], "taps"))
    if not 0 < len(taps) <= 8 or min(taps) < 0 or list(taps) != sorted(set(taps)):
        raise ValueError(f"taps {taps}")
    if raw["heads"] % raw["kv_heads"] or raw["head_dim"] % 2:
        raise ValueError("heads do not fit each other")
    return DraftShape(**{**raw, "taps": taps})


def _info(raw: Any) -> DrafterInfo:
    for name in ("rows", "tokens", "own_answers", "rounds", "held_out"):
        typed(int, raw[name], name)
    for name in ("target", "fingerprint"):
        typed(str, raw[name], name)
    shares = typed(list, raw["acceptance"], "acceptance")
    acceptance = tuple(typed(float, share, "acceptance") for share in shares)
    typed(float, raw["coverage"], "coverage")
    canary = Canary.from_json(raw.get("canary"))
    return DrafterInfo(**{**raw, "acceptance": acceptance, "canary": canary})


def _ids(ids: torch.Tensor, shape: DraftShape) -> torch.Tensor:
    fits = ids.dtype == torch.int64 and ids.shape == (shape.vocabulary,)
    if not fits or int(ids[0]) < 0 or bool((ids.diff() <= 0).any()):
        raise ValueError("its tokens are none of the model's, or do not ascend")
    return ids


def _check_tensors(shape: DraftShape, tensors: dict[str, torch.Tensor]) -> None:
    with torch.device("meta"):
        wanted = DraftNetwork(shape).state_dict()
    for name, weight in wanted.items():
        if name not in tensors or tensors[name].shape != weight.shape:
            got = tuple(tensors[name].shape) if name in tensors else "nothing"
            raise ValueError(f"{name}: {got} instead of {tuple(weight.shape)}")
        if not tensors[name].is_floating_point():
            raise ValueError(f"{name} is {tensors[name].dtype}")
    if extra := sorted(set(tensors) - set(wanted)):
        raise ValueError(f"unknown tensors: {', '.join(extra[:5])}")

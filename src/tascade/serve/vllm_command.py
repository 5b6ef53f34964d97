"""The `vllm serve` command that serves a pack."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from tascade.pack import Pack

PROPOSER = "tascade.integrations.vllm.TascadeProposer"
EXTENSION = "tascade.integrations.vllm.WorkerExtension"


def vllm_command(
    pack: Pack,
    *,
    model: str = "",
    name: str = "",
    host: str = "127.0.0.1",
    port: int = 8000,
    drafted: int = 16,
    learn: str = "",
    extra: Sequence[str] = (),
) -> list[str]:
    """The command and its arguments; ``extra`` is passed on as it stands, and comes last.

    What a pack holds decides the command: its model, and the drafter that its corpus feeds.
    """
    speculative = {"method": "custom_class", "model": PROPOSER, "num_speculative_tokens": drafted}
    options = {"pack": str(Path(pack.path).resolve())}
    if learn:
        options["learn"] = str(Path(learn).resolve())
    additional = {"tascade": options}
    return [
        "vllm",
        "serve",
        model or str(Path(pack.model).resolve() if pack.model != pack.info.model else pack.model),
        *("--host", host, "--port", str(port)),
        *(("--served-model-name", name) if name else ()),
        *("--speculative-config", json.dumps(speculative)),
        *("--additional-config", json.dumps(additional)),
        *("--worker-extension-cls", EXTENSION),
        *extra,
    ]

"""The `vllm serve` command that serves a pack."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tascade.data.chat import ChatConfig
from tascade.data.encode import system_template
from tascade.errors import ConfigError
from tascade.load import load_tokenizer, loading
from tascade.pack import Pack

PROPOSER = "tascade.integrations.vllm.TascadeProposer"
EXTENSION = "tascade.integrations.vllm.WorkerExtension"
_RUNNER = "VLLM_USE_V2_MODEL_RUNNER"
_VARIABLES, _TEMPLATE = "--default-chat-template-kwargs", "--chat-template"


def vllm_command(
    pack: Pack,
    *,
    model: str = "",
    name: str = "",
    host: str = "127.0.0.1",
    port: int = 8000,
    drafted: int = 16,
    learn: str = "",
    drafter: str = "",
    extra: Sequence[str] = (),
) -> list[str]:
    """The command and its arguments; ``extra`` is passed on as it stands, and comes last.

    What a pack holds decides the command: its model and the precision it was made in, the drafter
    that its corpus feeds, and what its prompts take along into the chat template. The API calls the
    model by ``name``, or as vLLM would, and by the pack's folder. Where the environment asks for
    vLLM's second model runner, the command is for that one. ``drafter``: the folder that the pack's
    trained drafter was exported to, which then drafts too.

    Raises:
        ConfigError: ``extra`` would take the place of what prompts take along; the tokenizer whose
            template is to have a system prompt cannot be loaded; or no drafter was exported to the
            folder.
        PackError: ``pack.json`` has a wrong chat section.
    """
    speculative: dict[str, Any] = {"num_speculative_tokens": drafted}
    if os.environ.get(_RUNNER) == "1":
        # The method that vLLM's second runner schedules ahead with; tascade takes its place.
        speculative["method"] = "ngram_gpu"
    else:
        speculative |= {"method": "custom_class", "model": PROPOSER}
    if drafter:
        # Its proposer takes the tokens from the host, where the outputs' drafts are made.
        network = {"method": "eagle3", "model": exported_folder(drafter)}
        speculative |= network | {"disable_padded_drafter_batch": True}
    options = {"pack": str(Path(pack.path).resolve())}
    if learn:
        options["learn"] = str(Path(learn).resolve())
    additional = {"tascade": options}
    precision, told = pack.precision(), any(word.startswith("--dtype") for word in extra)
    served = model or str(
        Path(pack.model).resolve() if pack.model != pack.info.model else pack.model
    )
    return [
        "vllm",
        "serve",
        served,
        *("--host", host, "--port", str(port)),
        *("--served-model-name", *dict.fromkeys((name or served, pack.name))),
        *_chat_options(pack.chat, served, extra),
        *("--speculative-config", json.dumps(speculative)),
        *("--additional-config", json.dumps(additional)),
        *("--worker-extension-cls", EXTENSION),
        *(("--dtype", precision) if precision != "auto" and not told else ()),
        *extra,
    ]


def exported_folder(name: str) -> str:
    """The whole path of a folder that a drafter was exported to.

    Raises:
        ConfigError: there is none.
    """
    folder = Path(name).expanduser().resolve()
    if not (folder / "config.json").is_file():
        raise ConfigError(
            "no drafter was exported to this folder",
            got=name,
            wanted="a folder that `tascade export` wrote",
            where="--drafter",
            fix="tascade export PACK --out FOLDER",
        )
    return str(folder)


def _chat_options(chat: ChatConfig, model: str, extra: Sequence[str]) -> list[str]:
    """What vLLM has for a pack's prompts: defaults of the template's variables, and a template.

    vLLM has no default for a system prompt, so the template is given one, as text.
    """
    found = [_VARIABLES, json.dumps(chat.kwargs)] if chat.kwargs else []
    if chat.system:
        with loading(model):
            tokenizer = load_tokenizer(model)
        found += [_TEMPLATE, system_template(tokenizer, chat)]
    for word in extra:
        # vLLM takes --a_b for --a-b, and --a-b.key for a key of its value.
        option = word.partition("=")[0].partition(".")[0].replace("_", "-")
        if option in found[::2]:
            raise ConfigError(
                f"{option} would replace what this pack's prompts take along",
                got=word,
                wanted="requests that bring their own, as chat_template_kwargs or system message",
                where=option,
                fix="leave it out; or print the command (--print) and change it there",
            )
    return found

"""Options and arguments that several verbs share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one machine-readable object on stdout.")]
ModelOpt = Annotated[str, typer.Option("--model", "-m", help="A hub id or a model folder.")]
DataArg = Annotated[str, typer.Argument(help="Training examples: file, folder or hub id.")]
HeldOut = Annotated[str, typer.Option(help="Held-out examples; a share of DATA if absent.")]
PackArg = Annotated[Path, typer.Argument(help="A pack folder, written by `tascade adapt`.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
Threads = Annotated[int, typer.Option(help="CPU threads; 0 leaves torch's choice.")]
OnError = Annotated[str, typer.Option("--on-error", help="raise, or skip bad rows and list them.")]
System = Annotated[
    str, typer.Option("--system", help="System prompt, for prompts that bring none.")
]
ChatKwargs = Annotated[
    str,
    typer.Option(
        "--chat-template-kwargs",
        help="Variables of the chat template, and tools: a JSON object.",
    ),
]
MaxTokens = Annotated[int, typer.Option("--max-new-tokens", help="Most tokens to generate.")]


def use_threads(count: int) -> None:
    """Let torch use ``count`` threads; 0 leaves its choice."""
    if count:
        import torch

        torch.set_num_threads(count)

"""Arguments and options that several verbs take, each described once."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer

_ESCAPES = {"n": "\n", "t": "\t", "\\": "\\"}


def _unescaped(text: str) -> str:
    r"""A flag's text with its line breaks (\n) and tabs (\t), which a shell would not make."""
    return re.sub(r"\\([nt\\])", lambda found: _ESCAPES[found[1]], text or "")


Json = Annotated[bool, typer.Option("--json", help="Print one machine-readable object on stdout.")]
ModelOpt = Annotated[str, typer.Option("--model", "-m", help="A hub id or a model folder.")]
OtherModel = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        help="Another copy of the model.",
        show_default="what the pack was made for",
    ),
]
DataArg = Annotated[str, typer.Argument(help="Training examples: file, folder or hub id.")]
HeldOut = Annotated[
    str, typer.Option(help="Held-out examples.", show_default="a share of the training examples")
]
PackArg = Annotated[Path, typer.Argument(help="A pack folder, written by `tascade adapt`.")]
Dtype = Annotated[
    str, typer.Option(help="auto (as the weights were saved), float32, bfloat16 or float16.")
]
PackDtype = Annotated[
    str,
    typer.Option(help="auto (the one the pack was made in), float32, bfloat16 or float16."),
]
Threads = Annotated[int, typer.Option(help="CPU threads.", show_default="torch's choice")]
OnError = Annotated[str, typer.Option("--on-error", help="raise, or skip bad rows and list them.")]
RecipesOnError = Annotated[
    str,
    typer.Option(
        "--on-error",
        help="raise, or skip bad rows and list them.",
        show_default="the recipe's, else raise",
    ),
]
_USUAL = "as the recipe or the pack says, else the usual names"
PromptField = Annotated[
    str, typer.Option(help="The field that holds the prompt.", show_default=_USUAL)
]
CompletionField = Annotated[
    str, typer.Option(help="The field that holds the answer.", show_default=_USUAL)
]
PromptTemplate = Annotated[
    str,
    typer.Option(
        help=r"The prompt made of fields, as '{question}\nContext: {context}'; braces doubled.",
        callback=_unescaped,
    ),
]
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
Temperature = Annotated[
    float | None, typer.Option(help="0 is greedy.", show_default="the checkpoint's, else 0")
]
MaxTokens = Annotated[
    int,
    typer.Option("--max-new-tokens", help="Most tokens to generate.", show_default="the pack's"),
]
Methods = Annotated[
    str,
    typer.Option(
        help="Comma-separated; `all` for every one.", show_default="all there is time for"
    ),
]
OwnSeconds = Annotated[
    float,
    typer.Option(help="Time for the model's own answers.", show_default="the recipe's, else 900"),
]
Resume = Annotated[bool, typer.Option(help="Go on with the run that was stopped.")]
Seed = Annotated[int, typer.Option(help="Fixes every draw.")]
TokenCount = Annotated[
    int, typer.Option(help="How many new tokens.", show_default="as many as are worth it")
]


def given(**flags: Any) -> dict[str, Any]:
    """The flags that were given: those that are not empty, 0 or off."""
    return {name: value for name, value in flags.items() if value}


def use_threads(count: int) -> None:
    """Let torch use ``count`` threads; 0 leaves its choice."""
    if count:
        import torch

        torch.set_num_threads(count)

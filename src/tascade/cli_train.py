"""The verbs that change a model: `enrich`, which chooses new tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tascade.cli_options import Json, ModelOpt, OnError, Threads, use_threads


def enrich(
    data: Annotated[str, typer.Argument(help="Training examples: file, folder or hub id.")],
    model: ModelOpt,
    held_out: Annotated[
        str, typer.Option(help="Held-out examples; a share of DATA if absent.")
    ] = "",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="New folder for tokens and tokenizer.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="How many; 0 for as many as are worth it.")] = 0,
    method: Annotated[str, typer.Option(help="best, pruned, paper or flat.")] = "best",
    own: Annotated[
        bool, typer.Option("--self", help="Choose from the model's own answers.")
    ] = False,
    on_error: OnError = "raise",
    threads: Threads = 0,
    json: Json = False,
) -> None:
    """Choose output n-grams that become tokens; predict the steps they save. Trains nothing."""
    from tascade import console
    from tascade.enrichment import enrich as build
    from tascade.tokens.mine import MiningRules

    use_threads(threads)
    with console.progress_bar() as progress:
        made = build(
            data,
            model,
            held_out=held_out or None,
            tokens=tokens,
            rules=MiningRules(method=method),  # type: ignore[arg-type]  # checked by choose()
            own_answers=own,
            out=out,
            on_error=on_error,
            progress=progress,
        )
    if json:
        console.print_json(made.to_json())
    else:
        console.out.print(made.describe())

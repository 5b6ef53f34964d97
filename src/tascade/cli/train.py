"""The verbs of the vocabulary: `enrich` chooses new tokens, `tune` teaches them, `tailor` lists."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tascade.cli.console import (
    ChatKwargs,
    DataArg,
    HeldOut,
    Json,
    ModelOpt,
    OnError,
    PackArg,
    System,
    Threads,
    use_threads,
)


def enrich(
    data: DataArg,
    model: ModelOpt,
    held_out: HeldOut = "",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="New folder for tokens and tokenizer.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="How many; 0 for as many as are worth it.")] = 0,
    method: Annotated[str, typer.Option(help="best, pruned, paper or flat.")] = "best",
    own: Annotated[
        bool, typer.Option("--self", help="Choose from the model's own answers.")
    ] = False,
    system: System = "",
    chat_template_kwargs: ChatKwargs = "",
    on_error: OnError = "raise",
    threads: Threads = 0,
    json: Json = False,
) -> None:
    """Choose output n-grams that become tokens; predict the steps they save. Trains nothing."""
    from tascade.builder import answering
    from tascade.cli import console
    from tascade.data.chat import ChatConfig
    from tascade.enrich.choose import enrich as build
    from tascade.enrich.tokens.mine import MiningRules

    use_threads(threads)
    with console.progress_bar() as progress:
        made = build(
            data,
            model,
            held_out=held_out or None,
            tokens=tokens,
            rules=MiningRules(method=method),  # type: ignore[arg-type]  # checked by choose()
            own_answers=answering if own else None,
            out=out,
            on_error=on_error,
            chat=ChatConfig().given(system, chat_template_kwargs),
            progress=progress,
        )
    if json:
        console.print_json(made.to_json())
    else:
        console.say(made.describe())


def tune(
    data: DataArg,
    model: ModelOpt,
    out: Annotated[Path, typer.Option("--out", "-o", help="New folder for the tuned model.")],
    held_out: HeldOut = "",
    tokens: Annotated[int, typer.Option(help="How many; 0 for as many as are worth it.")] = 0,
    epochs: Annotated[int, typer.Option(help="Rounds over the examples [recipe: 3].")] = 0,
    targets: Annotated[str, typer.Option(help="own [recipe's default] or gold answers.")] = "",
    control: Annotated[
        bool, typer.Option("--control", help="Train LoRA alone too, to compare with.")
    ] = False,
    recipe: Annotated[
        Path | None, typer.Option(help="A recipe (YAML) with a tune section.")
    ] = None,
    system: System = "",
    chat_template_kwargs: ChatKwargs = "",
    resume: Annotated[bool, typer.Option(help="Go on with the run that was stopped.")] = False,
    on_error: OnError = "",
    threads: Threads = 0,
    json: Json = False,
) -> None:
    """Teach a model the task's tokens: fewer steps an answer, in any engine. Answers may change."""
    import dataclasses

    from tascade.cli import console
    from tascade.config import Recipe
    from tascade.pipeline import tune as run

    use_threads(threads)
    chosen = Recipe.from_yaml(recipe) if recipe else Recipe()
    given: dict[str, Any] = {
        "tokens": tokens,
        "epochs": epochs,
        "targets": targets,
        "control": control,
    }
    stage = dataclasses.replace(chosen.tune, **{k: v for k, v in given.items() if v})
    kept = dataclasses.replace(chosen.data, on_error=on_error or chosen.data.on_error)
    chat = chosen.chat.given(system, chat_template_kwargs)
    with console.progress_bar() as progress:
        made = run(
            model,
            data,
            out=out,
            held_out=held_out or None,
            recipe=dataclasses.replace(chosen, tune=stage, data=kept, chat=chat),
            resume=resume,
            progress=progress,
        )
    if json:
        console.print_json(made.to_json())
    else:
        console.say(made.enrichment.describe())
        console.say(made.verdict.describe())
    if made.path is None:
        raise typer.Exit(1)


def tailor(
    pack: PackArg,
    data: Annotated[str, typer.Option("--data", "-d", help="Training examples.")],
    held_out: Annotated[
        str, typer.Option(help="Held-out examples; a share of the data if absent.")
    ] = "",
    head: Annotated[
        str, typer.Option(help="exact (lossless), masked, draft-only or full again.")
    ] = "exact",
    tolerance: Annotated[
        float, typer.Option(help="Tokens an answer may lack, on average, on the data.")
    ] = 0.01,
    scripts: Annotated[
        str, typer.Option(help="What the task writes, as english,code; other tokens go first.")
    ] = "",
    tables: Annotated[
        str, typer.Option(help="Where the whole tables are: the checkpoint's file, or the device.")
    ] = "file",
    own: Annotated[
        bool, typer.Option("--self", help="Count the model's own answers, not the references.")
    ] = False,
    on_error: OnError = "raise",
    threads: Threads = 0,
    json: Json = False,
) -> None:
    """List the tokens a task's answers need; the pack then uses an LM head of those."""
    from tascade.cli import console
    from tascade.config import VocabConfig
    from tascade.pipeline import tailor as run

    use_threads(threads)
    names = tuple(name.strip() for name in scripts.split(",") if name.strip())
    with console.progress_bar() as progress:
        made = run(
            pack,
            data,
            held_out=held_out or None,
            config=VocabConfig(head=head, tolerance=tolerance, scripts=names, tables=tables),
            own=own,
            on_error=on_error,
            progress=progress,
        )
    if json:
        console.print_json(made.to_json())
    else:
        console.say(made.describe())

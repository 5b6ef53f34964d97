"""The verbs of the vocabulary: `enrich` chooses new tokens, `tune` teaches them, `tailor` lists."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tascade.cli.flags import (
    ChatKwargs,
    CompletionField,
    DataArg,
    HeldOut,
    Json,
    ModelOpt,
    OnError,
    OtherModel,
    PackArg,
    PromptField,
    PromptTemplate,
    RecipesOnError,
    Resume,
    System,
    Threads,
    TokenCount,
    given,
    use_threads,
)


def enrich(
    data: DataArg,
    model: ModelOpt,
    held_out: HeldOut = "",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="New folder for tokens and tokenizer.")
    ] = None,
    tokens: TokenCount = 0,
    method: Annotated[str, typer.Option(help="best, pruned, paper or flat.")] = "best",
    own: Annotated[
        bool, typer.Option("--self", help="Choose from the model's own answers.")
    ] = False,
    prompt_field: PromptField = "",
    completion_field: CompletionField = "",
    prompt_template: PromptTemplate = "",
    system: System = "",
    chat_template_kwargs: ChatKwargs = "",
    on_error: OnError = "raise",
    threads: Threads = 0,
    json: Json = False,
) -> None:
    """Choose output n-grams that become tokens; predict the steps they save. Trains nothing."""
    from tascade.cli import console
    from tascade.options import laid_over

    options = given(on_error=on_error, system=system, chat_template_kwargs=chat_template_kwargs)
    options |= given(prompt_field=prompt_field, completion_field=completion_field)
    options |= given(prompt_template=prompt_template)
    rows = laid_over(None, options).data
    with console.reading(rows, (data, "train"), (held_out, "validation")) as progress:
        use_threads(threads)
        from tascade.builder import answering
        from tascade.enrich.choose import enrich as build
        from tascade.enrich.tokens.mine import MiningRules

        made = build(
            data,
            model,
            held_out=held_out or None,
            tokens=tokens,
            rules=MiningRules(method=method),  # type: ignore[arg-type]  # checked by choose()
            own_answers=answering if own else None,
            out=out,
            progress=progress,
            **options,
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
    tokens: TokenCount = 0,
    epochs: Annotated[
        int,
        typer.Option(help="Rounds over the examples.", show_default="the recipe's, else 3"),
    ] = 0,
    targets: Annotated[
        str,
        typer.Option(
            help="own (the model's) or gold answers.", show_default="the recipe's, else own"
        ),
    ] = "",
    control: Annotated[
        bool, typer.Option("--control", help="Train LoRA alone too, to compare with.")
    ] = False,
    recipe: Annotated[
        Path | None, typer.Option(help="A recipe (YAML) with a tune section.")
    ] = None,
    prompt_field: PromptField = "",
    completion_field: CompletionField = "",
    prompt_template: PromptTemplate = "",
    system: System = "",
    chat_template_kwargs: ChatKwargs = "",
    resume: Resume = False,
    on_error: RecipesOnError = "",
    threads: Threads = 0,
    json: Json = False,
) -> None:
    """Teach a model the task's tokens: fewer steps an answer, in any engine. Answers may change."""
    from dataclasses import replace

    from tascade.cli import console
    from tascade.options import laid_over

    options = given(on_error=on_error, system=system, chat_template_kwargs=chat_template_kwargs)
    options |= given(prompt_field=prompt_field, completion_field=completion_field)
    options |= given(prompt_template=prompt_template)
    chosen = laid_over(recipe, options)
    training = given(tokens=tokens, epochs=epochs, targets=targets, control=control)
    chosen = replace(chosen, tune=replace(chosen.tune, **training))
    with console.reading(chosen.data, (data, "train"), (held_out, "validation")) as progress:
        use_threads(threads)
        from tascade.pipeline import tune as run

        made = run(
            model,
            data,
            out=out,
            held_out=held_out or None,
            recipe=chosen,
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
    held_out: HeldOut = "",
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
    prompt_field: PromptField = "",
    completion_field: CompletionField = "",
    prompt_template: PromptTemplate = "",
    on_error: OnError = "raise",
    threads: Threads = 0,
    json: Json = False,
) -> None:
    """List the tokens a task's answers need; the pack then uses an LM head of those."""
    from tascade.cli import console
    from tascade.config import Recipe, VocabConfig
    from tascade.options import laid_over
    from tascade.pack import Pack

    options = given(on_error=on_error, prompt_field=prompt_field)
    options |= given(completion_field=completion_field, prompt_template=prompt_template)
    names = tuple(name.strip() for name in scripts.split(",") if name.strip())
    config = VocabConfig(head=head, tolerance=tolerance, scripts=names, tables=tables)
    rows = laid_over(Recipe(data=Pack.open(pack).reading), options).data
    with console.reading(rows, (data, "train"), (held_out, "validation")) as progress:
        use_threads(threads)
        from tascade.pipeline import tailor as run

        made = run(
            pack,
            data,
            held_out=held_out or None,
            config=config,
            own=own,
            progress=progress,
            **options,
        )
    if json:
        console.print_json(made.to_json())
    else:
        console.say(made.describe())


def drafter(
    pack: PackArg,
    data: Annotated[str, typer.Option("--data", "-d", help="Training examples.")],
    held_out: HeldOut = "",
    own: Annotated[
        bool,
        typer.Option(
            "--self/--references", help="Learn from the model's own answers, or the references."
        ),
    ] = True,
    force: Annotated[
        bool, typer.Option("--force", help="Train even where the forecast says it would not pay.")
    ] = False,
    rounds: Annotated[int, typer.Option(help="How often all answers are learned.")] = 6,
    seed: Annotated[int, typer.Option(help="Of first weights and order.")] = 0,
    resume: Resume = False,
    prompt_field: PromptField = "",
    completion_field: CompletionField = "",
    prompt_template: PromptTemplate = "",
    on_error: OnError = "raise",
    threads: Threads = 0,
    json: Json = False,
) -> None:
    """Train a small network that drafts beside the task's outputs, where these repeat little."""
    from tascade.cli import console
    from tascade.config import Recipe
    from tascade.options import laid_over
    from tascade.pack import Pack

    options = given(on_error=on_error, prompt_field=prompt_field)
    options |= given(completion_field=completion_field, prompt_template=prompt_template)
    rows = laid_over(Recipe(data=Pack.open(pack).reading), options).data
    sources = (data, "train"), (held_out, "validation")
    with (
        console.stopped(pack, ("drafter",), resume=resume),
        console.reading(rows, *sources) as tell,
    ):
        use_threads(threads)
        from tascade.train_drafter import train_drafter as run

        made = run(
            pack,
            data,
            held_out=held_out or None,
            own=own,
            force=force,
            rounds=rounds,
            seed=seed,
            resume=resume,
            progress=tell,
            **options,
        )
    if json:
        console.print_json(made.to_json())
    else:
        console.say(made.describe())


def export(
    pack: PackArg,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the drafter.")],
    model: OtherModel = "",
    depth: Annotated[
        int, typer.Option("--num-speculative-tokens", help="Tokens that vLLM drafts in a row.")
    ] = 4,
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; compare the folder with the pack.")
    ] = False,
    json: Json = False,
) -> None:
    """Write a pack's trained drafter as an EAGLE-3 folder, which vLLM loads by itself."""
    from tascade.cli import console
    from tascade.draft.neural.export import export_drafter

    made = export_drafter(pack, out, model=model or None, depth=depth, check=check)
    if json:
        console.print_json(made.to_json())
    else:
        console.say(made.describe())

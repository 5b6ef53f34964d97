"""The verb that makes a pack: `adapt`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tascade.cli.flags import (
    ChatKwargs,
    CompletionField,
    Json,
    OwnSeconds,
    PromptField,
    PromptTemplate,
    RecipesOnError,
    Resume,
    System,
    Threads,
    given,
    use_threads,
)
from tascade.errors import ConfigError

if TYPE_CHECKING:
    from tascade.config import Recipe
    from tascade.model import TaskModel


def adapt(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the new pack.")],
    model: Annotated[
        str,
        typer.Option(
            "--model", "-m", help="A hub id or a model folder.", show_default="the recipe's"
        ),
    ] = "",
    data: Annotated[
        str,
        typer.Option("--data", "-d", help="Training examples.", show_default="the recipe's"),
    ] = "",
    validation: Annotated[
        str,
        typer.Option(
            help="Examples to calibrate on.", show_default="the recipe's, else a share of --data"
        ),
    ] = "",
    logs: Annotated[
        str,
        typer.Option(
            help="Served requests with the model's own answers, indexed too.",
            show_default="the recipe's",
        ),
    ] = "",
    recipe: Annotated[
        Path | None, typer.Option(help="A recipe (YAML); flags given here win over it.")
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(
            help="auto (as the weights were saved), float32, bfloat16 or float16.",
            show_default="the recipe's, else auto",
        ),
    ] = "",
    max_new_tokens: Annotated[
        int, typer.Option(help="The pack's token limit.", show_default="the recipe's, else 256")
    ] = 0,
    on_error: RecipesOnError = "",
    prompt_field: PromptField = "",
    completion_field: CompletionField = "",
    prompt_template: PromptTemplate = "",
    system: System = "",
    chat_template_kwargs: ChatKwargs = "",
    own_answers: Annotated[
        bool, typer.Option("--self", help="Index the model's own answers, not the references.")
    ] = False,
    own_seconds: OwnSeconds = 0.0,
    tune: Annotated[
        bool, typer.Option("--tune", help="Teach the model the task's tokens first; see `tune`.")
    ] = False,
    drafter: Annotated[
        bool,
        typer.Option("--drafter", help="Train a small network that drafts too, where it pays."),
    ] = False,
    tailor: Annotated[
        str, typer.Option(help="An LM head of the task's tokens: exact, masked or draft-only.")
    ] = "",
    resume: Resume = False,
    overwrite: Annotated[
        bool, typer.Option(help="Replace the pack that is there; nothing else is.")
    ] = False,
    threads: Threads = 0,
    json: Json = False,
) -> None:
    """Learn a task from examples, training-free unless tuned: write a pack."""
    options = given(model=model, data=data, validation=validation, logs=logs)
    options |= given(max_new_tokens=max_new_tokens, on_error=on_error, prompt_field=prompt_field)
    options |= given(completion_field=completion_field, prompt_template=prompt_template)
    options |= given(system=system, chat_template_kwargs=chat_template_kwargs)
    options |= given(own_answers=own_answers, own_seconds=own_seconds)
    options |= given(dtype=dtype, drafter=drafter, tailor=tailor)
    going = {"resume": resume, "overwrite": overwrite}
    made = _make(_recipe(recipe, options), out, tune, going, threads, quiet=json)
    _tell(made, out, json)


def _recipe(path: Path | None, options: dict[str, Any]) -> Recipe:
    """The recipe file with the flags that were given laid over it."""
    from tascade.options import laid_over

    merged = laid_over(path, options)
    for name, value in (("--model", merged.model), ("--data", merged.data.train)):
        if not value:
            raise ConfigError(f"{name} is missing", wanted="a flag, or the key in a recipe")
    return merged


def _make(
    wanted: Recipe, out: Path, tune: bool, going: dict[str, bool], threads: int, *, quiet: bool
) -> TaskModel:
    from tascade.cli import console

    rows = wanted.data
    options: dict[str, Any] = {"out": out, "recipe": wanted, **going}
    options["validation"] = rows.validation or None
    sources = (rows.train, "train"), (rows.validation, "validation")
    kept = ("answers", "tuning", "drafter")
    stopped = console.stopped(out, kept, resume=going["resume"])
    with stopped, console.reading(rows, *sources) as progress:
        console.tell_load()
        use_threads(threads)
        from tascade.own_answers import check_logs
        from tascade.pipeline import adapt as build
        from tascade.pipeline import adapt_tuned

        check_logs(rows.logs, tune)
        if not tune:
            options["logs"] = rows.logs or None
            return build(wanted.model, rows.train, progress=progress, **options)
        made, tuned = adapt_tuned(wanted.model, rows.train, progress=progress, **options)
    if not quiet:
        console.say(tuned.verdict.describe())
    return made


def _tell(made: TaskModel, out: Path, json: bool) -> None:
    from tascade.cli import console

    info, corpus = made.pack.info, made.corpus
    if json:
        console.print_json(
            {
                "pack": str(out),
                "model": info.model,
                "data": info.data,
                "documents": corpus.n_documents,
                "tokens": corpus.n_tokens,
                "index_bytes": corpus.n_bytes,
                "own_answers": info.own_answers,
                "rows": info.rows,
            }
        )
        return
    console.print_skipped(info.data)
    used = console.rows_used(info.rows, info.own_answers)
    console.say(
        f"{out}: {corpus.n_documents} outputs, {corpus.n_tokens} tokens, "
        f"index {corpus.n_bytes / 1e6:.1f} MB\n{used}"
    )
    next_steps = (
        f"next: tascade bench {out} --data TEST.jsonl tells what it gains; tascade serve {out}"
    )
    console.err.print(next_steps, style="dim", markup=False, soft_wrap=True)

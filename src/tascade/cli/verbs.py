"""The command line: one thin function a verb; heavy imports inside the verb."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from tascade.cli import adapt as cli_adapt
from tascade.cli import answer as cli_answer
from tascade.cli import serve as cli_serve
from tascade.cli import train as cli_train
from tascade.cli.flags import (
    ChatKwargs,
    CompletionField,
    DataArg,
    Dtype,
    HeldOut,
    Json,
    MaxTokens,
    Methods,
    ModelOpt,
    OnError,
    OtherModel,
    PackArg,
    PackDtype,
    PromptField,
    PromptTemplate,
    Seed,
    System,
    Threads,
    given,
    use_threads,
)
from tascade.errors import TascadeError

app = typer.Typer(
    name="tascade",
    help="Make a small model fast at one task; what it says stays the same.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Options before the verb."""
    if version:
        import tascade

        typer.echo(f"tascade {tascade.__version__}")
        raise typer.Exit


@app.command()
def inspect(
    data: DataArg,
    model: ModelOpt,
    held_out: HeldOut = "",
    max_new_tokens: Annotated[
        int,
        typer.Option(
            help="Replay so many tokens of an answer.", show_default="all that the answers have"
        ),
    ] = 0,
    prompt_field: PromptField = "",
    completion_field: CompletionField = "",
    prompt_template: PromptTemplate = "",
    system: System = "",
    chat_template_kwargs: ChatKwargs = "",
    on_error: OnError = "raise",
    answers: Annotated[
        int,
        typer.Option(
            help="Have the model say so many held-out answers; forecast from them.",
            show_default="none, from the references",
        ),
    ] = 0,
    drafter: Annotated[
        bool, typer.Option("--drafter", help="Say what a drafter trained on the task might add.")
    ] = False,
    dtype: Dtype = "auto",
    threads: Threads = 0,
    json: Json = False,
) -> None:
    """Predict, before anything is built, what tascade would gain on this task."""
    from tascade.cli import console
    from tascade.options import laid_over

    options = given(dtype=dtype, max_new_tokens=max_new_tokens, on_error=on_error, system=system)
    options |= given(chat_template_kwargs=chat_template_kwargs, prompt_field=prompt_field)
    options |= given(completion_field=completion_field, prompt_template=prompt_template)
    rows = laid_over(None, options).data
    options |= {"held_out": held_out or None, "answers": answers, "drafter": drafter}
    with console.reading(rows, (data, "train"), (held_out, "validation")) as progress:
        console.tell_load()
        use_threads(threads)
        from tascade.forecast.inspection import inspect as look

        found = look(data, model, progress=progress, **options)
    if json:
        console.print_json(found.to_dict())
    else:
        console.say(found.describe())


app.command()(cli_adapt.adapt)
app.command()(cli_answer.generate)
app.command()(cli_answer.chat)


@app.command()
def bench(
    pack: PackArg,
    data: Annotated[str, typer.Option("--data", "-d", help="Held-out examples to measure on.")],
    warmup: Annotated[str, typer.Option(help="Examples for the untimed warm-up pass.")] = "",
    model: OtherModel = "",
    methods: Methods = "",
    rows: Annotated[int, typer.Option(help="How many rows, evenly spaced.")] = 64,
    repeats: Annotated[int, typer.Option(help="Timed rounds, methods in turns.")] = 5,
    minutes: Annotated[
        float, typer.Option(help="Time for these: fewer rounds, then fewer rows fit. 0 for any.")
    ] = 10.0,
    resume: Annotated[
        bool, typer.Option(help="Go on with the one that was stopped, after its whole rounds.")
    ] = False,
    max_new_tokens: MaxTokens = 0,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    seed: Seed = 0,
    prompt_field: PromptField = "",
    completion_field: CompletionField = "",
    prompt_template: PromptTemplate = "",
    dtype: PackDtype = "auto",
    threads: Threads = 0,
    memory: Annotated[
        bool | None,
        typer.Option(
            "--memory/--no-memory",
            help="Measure memory too, each method in a process of its own.",
            show_default="for packs with a tailored vocabulary",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Also write the JSON here.")
    ] = None,
    json: Json = False,
) -> None:
    """Speed, equality and quality against plain decoding and the peers installed.

    Ctrl-C ends it early: what was measured until then is shown and written.
    """
    from tascade.cli import console
    from tascade.config import Recipe
    from tascade.options import laid_over
    from tascade.pack import Pack

    fields = given(prompt_field=prompt_field, completion_field=completion_field)
    fields |= given(prompt_template=prompt_template)
    settings: dict[str, Any] = {"rows": rows, "repeats": repeats, "seed": seed, "memory": memory}
    settings |= {"max_new_tokens": max_new_tokens, "temperature": temperature}
    settings |= {"minutes": minutes}
    read = laid_over(Recipe(data=Pack.open(pack).reading), fields).data
    sources = (data, "test"), (warmup, "test")
    console.tell_load()
    with console.ends_early(), console.reading(read, *sources) as progress:
        use_threads(threads)
        from tascade.bench.pack import BenchOptions, bench_pack

        result = bench_pack(
            pack,
            data,
            warmup=warmup or None,
            model=model or None,
            dtype=dtype,
            options=BenchOptions(tuple(filter(None, methods.split(","))), **settings),
            out=out,
            resume=resume,
            on_repeat=None if json else console.print_bench_so_far,
            progress=progress,
            **fields,
        )
    console.tell_what_was_left_out(result)
    if json:
        console.print_json(result)
    else:
        console.print_bench(result, pack, dtype)


@app.command()
def report(
    pack: PackArg,
    results: Annotated[
        list[Path] | None, typer.Argument(help="Bench JSON files; the pack's own if none.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Where to write the page.")
    ] = None,
) -> None:
    """One self-contained HTML page: speed, drafts, calibration, equality, quality."""
    from tascade.bench.page import report_pack
    from tascade.cli import console

    console.say(str(report_pack(pack, results or [], out)))


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the packs and the page.")] = (
        Path("demo-output")
    ),
    rows: Annotated[int, typer.Option(help="Test rows a task.")] = 12,
    repeats: Annotated[int, typer.Option(help="Timed rounds.")] = 2,
    tune: Annotated[
        bool, typer.Option("--tune", help="Teach the model a task's tokens too: some minutes.")
    ] = False,
    threads: Threads = 0,
) -> None:
    """The bundled task and model, end to end, offline, in some minutes."""
    from tascade.cli.demo import run

    use_threads(threads)
    run(out, rows=rows, repeats=repeats, tune=tune)


@app.command()
def warm_up() -> None:
    """Compile the kernels, so that no first use waits for it: for container images.

    They are kept in NUMBA_CACHE_DIR, or beside tascade's own files.
    """
    from tascade.draft.ngram.warm_up import warm_up as compile_kernels

    compile_kernels()


app.command()(cli_train.enrich)
app.command()(cli_train.tune)
app.command()(cli_train.tailor)
app.command()(cli_train.drafter)
app.command()(cli_train.export)
_PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}
app.command(context_settings=_PASS_ON)(cli_serve.serve)
app.command()(cli_serve.learned)


def main() -> None:
    """Entry point: tascade's own errors are shown without a traceback, with exit code 2."""
    try:
        app()
    except TascadeError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)

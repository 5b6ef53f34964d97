"""The command line: one thin function a verb; heavy imports inside the verb."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from tascade.cli import serve as cli_serve
from tascade.cli import train as cli_train
from tascade.cli.console import (
    ChatKwargs,
    DataArg,
    Dtype,
    HeldOut,
    Json,
    MaxTokens,
    ModelOpt,
    OnError,
    PackArg,
    System,
    Temperature,
    Threads,
    use_threads,
)
from tascade.errors import ConfigError, TascadeError

app = typer.Typer(
    name="tascade",
    help="Make a small model fast at one task. Output: identical in float32, else up to rounding.",
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
    system: System = "",
    chat_template_kwargs: ChatKwargs = "",
    on_error: OnError = "raise",
    threads: Threads = 0,
    json: Json = False,
) -> None:
    """Predict, before anything is built, what tascade would gain on this task."""
    from tascade.cli import console
    from tascade.data.chat import ChatConfig
    from tascade.forecast.inspection import inspect as look

    use_threads(threads)
    options: dict[str, Any] = {"held_out": held_out or None, "on_error": on_error}
    options["chat"] = ChatConfig().given(system, chat_template_kwargs)
    with console.progress_bar() as progress:
        found = look(data, model, progress=progress, **options)
    if json:
        console.print_json(found.to_dict())
    else:
        console.say(found.describe())


@app.command()
def adapt(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the new pack.")],
    model: Annotated[str, typer.Option("--model", "-m", help="A hub id or a model folder.")] = "",
    data: Annotated[str, typer.Option("--data", "-d", help="Training examples.")] = "",
    validation: Annotated[str, typer.Option(help="Examples to calibrate on.")] = "",
    recipe: Annotated[
        Path | None, typer.Option(help="A recipe (YAML); flags given here win over it.")
    ] = None,
    dtype: Dtype = "",
    max_new_tokens: Annotated[int, typer.Option(help="The pack's token limit [256].")] = 0,
    on_error: Annotated[str, typer.Option("--on-error", help="raise [default], or skip.")] = "",
    system: System = "",
    chat_template_kwargs: ChatKwargs = "",
    own: Annotated[
        bool, typer.Option("--self", help="Index the model's own answers, not the references.")
    ] = False,
    tune: Annotated[
        bool, typer.Option("--tune", help="Teach the model the task's tokens first; see `tune`.")
    ] = False,
    tailor: Annotated[
        str, typer.Option(help="An LM head of the task's tokens: exact, masked or draft-only.")
    ] = "",
    overwrite: Annotated[
        bool, typer.Option(help="Replace the pack that is there; nothing else is.")
    ] = False,
    threads: Threads = 0,
    json: Json = False,
) -> None:
    """Learn a task from examples, training-free unless tuned: write a pack."""
    from dataclasses import replace

    from tascade.cli import console
    from tascade.pipeline import adapt as build

    use_threads(threads)
    wanted = _recipe(recipe, model, data, validation, dtype, max_new_tokens, on_error)
    wanted = replace(wanted, chat=wanted.chat.given(system, chat_template_kwargs))
    if own:
        wanted = replace(wanted, spec=replace(wanted.spec, own_answers=True))
    if tailor:
        wanted = replace(wanted, vocab=replace(wanted.vocab, head=tailor))
    options = {"out": out, "recipe": wanted, "overwrite": overwrite}
    options["validation"] = wanted.data.validation or None
    with console.progress_bar() as progress:
        if tune:
            from tascade.pipeline import adapt_tuned

            made, tuned = adapt_tuned(wanted.model, wanted.data.train, progress=progress, **options)
        else:
            made = build(wanted.model, wanted.data.train, progress=progress, **options)
    if tune and not json:
        console.say(tuned.verdict.describe())
    facts = {
        "pack": str(out),
        "model": made.pack.info.model,
        "data": made.pack.info.data,
        "documents": made.corpus.n_documents,
        "tokens": made.corpus.n_tokens,
        "index_bytes": made.corpus.n_bytes,
        "own_answers": made.pack.info.own_answers,
        "rows": made.pack.info.rows,
    }
    if json:
        console.print_json(facts)
        return
    console.print_skipped(made.pack.info.data)
    console.say(
        f"{out}: {facts['documents']} outputs, {facts['tokens']} tokens, "
        f"index {made.corpus.n_bytes / 1e6:.1f} MB\n{console.rows_used(made.pack.info.rows)}"
    )


def _recipe(
    path: Path | None,
    model: str,
    data: str,
    validation: str,
    dtype: str,
    max_new_tokens: int,
    on_error: str,
) -> Any:
    """The recipe file with the flags that were given laid over it."""
    from dataclasses import replace

    from tascade.config import Recipe

    base = Recipe.from_yaml(path) if path else Recipe()
    merged = replace(
        base,
        model=model or base.model,
        dtype=dtype or base.dtype,
        max_new_tokens=max_new_tokens or base.max_new_tokens,
        data=replace(
            base.data,
            train=data or base.data.train,
            validation=validation or base.data.validation,
            on_error=on_error or base.data.on_error,
        ),
    )
    for name, value in (("--model", merged.model), ("--data", merged.data.train)):
        if not value:
            raise ConfigError(f"{name} is missing", wanted="a flag, or the key in a recipe")
    return merged


@app.command()
def generate(
    pack: PackArg,
    prompt: Annotated[
        list[str] | None,
        typer.Argument(help="Prompts; - reads stdin, without its last newline."),
    ] = None,
    prompt_file: Annotated[
        list[Path] | None,
        typer.Option(help="A prompt from a file as it is, last newline too; repeatable."),
    ] = None,
    model: Annotated[str, typer.Option("--model", "-m", help="Another copy of the model.")] = "",
    max_new_tokens: MaxTokens = 0,
    temperature: Temperature = None,
    seed: Annotated[int, typer.Option(help="Fixes every draw.")] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="End the text before this string.")] = None,
    explain: Annotated[bool, typer.Option(help="Colour tokens by who drafted them.")] = False,
    assistant: Annotated[
        str, typer.Option(help="A smaller model of its tokenizer: drafts too.")
    ] = "",
    head: Annotated[
        str, typer.Option(help="full, exact, masked, or draft-only: the assistant's [pack's].")
    ] = "",
    dtype: Dtype = "auto",
    threads: Threads = 0,
    json: Json = False,
) -> None:
    """Generate answers with a pack; stdout has them as the model said them."""
    from tascade.cli import console

    prompts = [console.stdin_prompt() if text == "-" else text for text in prompt or ()]
    prompts += [console.prompt_in(path) for path in prompt_file or ()]
    if not prompts:
        raise ConfigError("no prompt", got="no argument and no --prompt-file", wanted="a prompt")
    from tascade.model import TaskModel

    use_threads(threads)
    options: dict[str, Any] = {"temperature": temperature, "seed": seed, "stop": stop}
    if max_new_tokens:
        options["max_new_tokens"] = max_new_tokens
    task_model = TaskModel.from_pretrained(
        pack, model or None, dtype=dtype, head=head, assistant=assistant or None
    )
    for text in prompts:
        result = task_model.run(text, **options)
        if json:
            console.print_json(
                {
                    "text": result.text,
                    "tokens": len(result.tokens),
                    "forwards": result.forwards,
                    "tokens_per_step": round(result.tokens_per_step, 3),
                    "finish_reason": result.finish_reason,
                    "seconds": round(result.seconds, 4),
                }
            )
        elif explain:
            if console.out.is_terminal:
                console.out.print(console.explain(task_model.tokenizer, result), soft_wrap=True)
            else:
                console.say(result.text)
            console.err.print(console.legend())
            console.err.print(console.summary(result), style="dim")
        else:
            console.say(result.text)


@app.command()
def chat(
    pack: PackArg,
    model: Annotated[str, typer.Option("--model", "-m", help="Another copy of the model.")] = "",
    temperature: Temperature = None,
    seed: Annotated[int, typer.Option(help="Fixes every draw.")] = 0,
    dtype: Dtype = "auto",
    threads: Threads = 0,
) -> None:
    """Type prompts, watch answers stream. Ctrl-D or an empty line ends it."""
    from tascade.cli import console
    from tascade.model import TaskModel

    use_threads(threads)
    task_model = TaskModel.from_pretrained(pack, model or None, dtype=dtype)
    while True:
        try:
            text = console.out.input("[bold]> [/bold]")
        except (EOFError, KeyboardInterrupt):
            break
        if not text.strip():
            break
        for piece in task_model.stream(text, temperature=temperature, seed=seed):
            sys.stdout.write(piece)
            sys.stdout.flush()
        sys.stdout.write("\n")


@app.command()
def bench(
    pack: PackArg,
    data: Annotated[str, typer.Option("--data", "-d", help="Held-out examples to measure on.")],
    warmup: Annotated[str, typer.Option(help="Examples for the untimed warm-up pass.")] = "",
    model: Annotated[str, typer.Option("--model", "-m", help="Another copy of the model.")] = "",
    methods: Annotated[str, typer.Option(help="Comma-separated; `all` for every one.")] = "all",
    rows: Annotated[int, typer.Option(help="How many rows, evenly spaced.")] = 64,
    repeats: Annotated[int, typer.Option(help="Timed rounds, methods in turns.")] = 5,
    max_new_tokens: MaxTokens = 0,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Fixes every draw.")] = 0,
    dtype: Dtype = "auto",
    threads: Threads = 0,
    memory: Annotated[
        bool, typer.Option(help="Measure memory too, each method in a process of its own.")
    ] = True,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Also write the JSON here.")
    ] = None,
    json: Json = False,
) -> None:
    """Speed, equality and quality against plain decoding and the peers installed."""
    from tascade.bench.pack import BenchOptions, bench_pack
    from tascade.cli import console

    use_threads(threads)
    options = BenchOptions(
        methods=tuple(methods.split(",")),
        rows=rows,
        repeats=repeats,
        seed=seed,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        memory=memory,
    )
    with console.progress_bar() as progress:
        result = bench_pack(
            pack,
            data,
            warmup=warmup or None,
            model=model or None,
            dtype=dtype,
            options=options,
            out=out,
            progress=progress,
        )
    if json:
        console.print_json(result)
    else:
        console.out.print(console.bench_table(result))


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
    """The bundled task and model, end to end, offline, in about a minute."""
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

"""The verbs of serving: `serve`, and `learned` for what was learned from traffic."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tascade.cli.flags import Json, OtherModel, PackArg, PackDtype, Threads, use_threads


def serve(
    context: typer.Context,
    pack: PackArg,
    engine: Annotated[str, typer.Option(help="auto (vLLM if there), vllm or builtin.")] = "auto",
    model: OtherModel = "",
    name: Annotated[
        str,
        typer.Option(
            "--served-model-name",
            help="What the API calls the model; the pack's folder name is taken too.",
            show_default="the model's own",
        ),
    ] = "",
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8000,
    drafted: Annotated[
        int, typer.Option("--num-speculative-tokens", help="vLLM: most tokens drafted at once.")
    ] = 16,
    api_key: Annotated[
        str, typer.Option(envvar="TASCADE_API_KEY", help="Built-in: key clients must send.")
    ] = "",
    max_queue: Annotated[int, typer.Option(help="Built-in: requests that may wait.")] = 64,
    max_prompt_tokens: Annotated[int, typer.Option(help="Built-in: longest prompt.")] = 8192,
    max_tokens: Annotated[int, typer.Option(help="Built-in: longest answer.")] = 4096,
    max_n: Annotated[int, typer.Option(help="Built-in: most answers to a prompt.")] = 8,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(help="Built-in: a web page's origin that may ask, * for any; repeatable."),
    ] = None,
    timeout: Annotated[float, typer.Option(help="Built-in: seconds a request may take.")] = 120.0,
    grace: Annotated[float, typer.Option(help="Built-in: seconds to finish when stopped.")] = 20.0,
    learn: Annotated[
        str, typer.Option(help="Folder in which finished answers become drafts; off if absent.")
    ] = "",
    drafter: Annotated[str, typer.Option(help="vLLM: an exported network, drafts too.")] = "",
    dtype: PackDtype = "auto",
    threads: Threads = 0,
    only_print: Annotated[
        bool, typer.Option("--print", help="Only print the vLLM command.")
    ] = False,
) -> None:
    """Serve a pack with OpenAI's API: in vLLM, or with the built-in engine.

    Options not named here are passed on to `vllm serve`.
    """
    from tascade.serve.command import choose_engine, names_of, need_packages, run_builtin

    if only_print or choose_engine(engine, context.args) == "vllm":
        shown = ("--dtype", dtype) if dtype != "auto" else ()
        given = {"model": model, "name": name, "host": host, "port": port, "learn": learn}
        given["drafter"] = drafter
        _serve_in_vllm(pack, only_print, drafted=drafted, extra=[*shown, *context.args], **given)
        return
    _refuse_network(drafter)
    need_packages()
    from tascade.serve.engine import Settings

    use_threads(threads)
    names = names_of(pack, model, name)
    settings = Settings(
        names[0],
        host,
        port,
        api_key,
        max_queue,
        aliases=names[1:],
        max_prompt=max_prompt_tokens,
        max_tokens=max_tokens,
        max_n=max_n,
        timeout=timeout,
        grace=grace,
        cors_origins=tuple(cors_origin or ()),
    )
    run_builtin(pack, settings, model=model, dtype=dtype, learn=learn)


def _refuse_network(drafter: str) -> None:
    """The built-in engine has no use for an exported network."""
    from tascade.errors import ConfigError

    if drafter:
        raise ConfigError(
            "this is an option of vLLM's engine",
            got="--drafter, and the built-in engine",
            wanted="nothing: the built-in engine drafts with the pack's own network as it is",
            where="--drafter",
            fix="leave it out, or use --engine vllm",
        )


def _serve_in_vllm(pack: Path, only_print: bool, **options: Any) -> None:
    """Print vLLM's command and become it; vLLM itself says when it is ready."""
    from tascade.cli import console
    from tascade.pack import Pack
    from tascade.serve.command import run_vllm
    from tascade.serve.vllm_command import vllm_command

    opened = Pack.open(pack)
    command = vllm_command(opened, **options)
    if not only_print:
        names = ", ".join(dict.fromkeys((options["name"] or command[2], opened.name)))
        told = f"http://{options['host']}:{options['port']}/v1, model {names}, engine vllm"
        console.err.print(told, markup=False, soft_wrap=True)
    run_vllm(command, only_print=only_print)


def learned(
    folder: Annotated[Path, typer.Argument(help="A learned corpus, made by a server that learns.")],
    forget: Annotated[
        list[int] | None, typer.Option(help="Remove this document from every file; repeatable.")
    ] = None,
    forget_all: Annotated[bool, typer.Option("--forget-all", help="Remove them all.")] = False,
    json: Json = False,
) -> None:
    """What was learned from traffic; with --forget, remove documents (while no server owns it)."""
    from tascade.cli import console
    from tascade.index.traffic import folder_facts, forget_in

    gone = forget_in(folder, None if forget_all else forget) if forget_all or forget else 0
    facts = {**folder_facts(folder), "forgotten": gone}
    if json:
        console.print_json(facts)
        return
    console.say(
        f"{folder}: {facts['documents']} documents, {facts['tokens']} tokens, "
        f"{facts['bytes']} bytes; {gone} forgotten"
    )

"""What the command line shows: progress, coloured tokens, tables, errors."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tascade.core import Generation, Progress, Source
from tascade.decode.text import Detokenizer
from tascade.errors import ConfigError

out = Console(highlight=False, emoji=False, width=None if sys.stdout.isatty() else 150)
err = Console(stderr=True, highlight=False, emoji=False)

STYLES = {
    Source.TARGET: "bold",
    Source.CORPUS: "green",
    Source.CONTEXT: "cyan",
    Source.BOTH: "magenta",
    Source.OTHER: "yellow",
}
MEANING = {
    Source.TARGET: "the model itself",
    Source.CORPUS: "task corpus",
    Source.CONTEXT: "this request, or similar examples",
    Source.BOTH: "corpus and request agreed",
}


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """A progress callback: bars on a terminal, one plain line a stage elsewhere."""
    if not err.is_terminal:
        seen: set[str] = set()

        def plain(stage: str, done: int, total: int | None) -> None:
            if stage not in seen:
                seen.add(stage)
                err.print(f"{stage} ..." if total is None else f"{stage} ({total}) ...")

        yield plain
        return
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description:<24}"), BarColumn(), MofNCompleteColumn())
    with Bars(*columns, TimeElapsedColumn(), console=err, transient=True) as bars:
        tasks: dict[str, Any] = {}

        def show(stage: str, done: int, total: int | None) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield show


def stdin_prompt() -> str:
    """What is piped in, but for its last newline, which is nearly always the shell's."""
    text = sys.stdin.read()
    return text.removesuffix("\n").removesuffix("\r") if text.endswith("\n") else text


def prompt_in(path: Path) -> str:
    """A prompt file as it is.

    Raises:
        ConfigError: it cannot be read, or is no UTF-8.
    """
    try:
        return path.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            "this prompt file cannot be read", got=error, wanted="a UTF-8 file", where=str(path)
        ) from error


def print_skipped(sources: Sequence[dict[str, Any]]) -> None:
    """How many rows were left out, and which, for each source that lost any."""
    for source in sources:
        if source.get("skipped"):
            err.print(f"{source['role']}: {source['skipped']} rows skipped", style="yellow")
            for where, reason in source.get("skipped_rows", []):
                err.print(f"  {where}: {reason}", markup=False, soft_wrap=True)


def rows_used(rows: dict[str, int]) -> str:
    """On how many rows a pack was calibrated and compared with plain decoding."""
    text = (
        f"calibrated on {rows['calibrated']} of {rows['held_out_of']} held-out rows; "
        f"{rows['checked'] - rows['differing']} of {rows['checked']} answers are plain decoding's"
    )
    if rows["differing"]:
        text += f", {rows['differing']} differ ({rows['near_ties']} at ties up to rounding)"
    if rows.get("references_kept"):
        text += f"\n{rows['references_kept']} prompts not reached in own_seconds: references kept"
    return text


def say(text: str) -> None:
    """Text on stdout, byte for byte, and a newline: nothing in it is markup, wrapped or coloured.

    For whatever a program may read: answers, paths, figures. Half a surrogate pair, which is no
    text, is escaped.
    """
    sys.stdout.flush()
    sys.stdout.buffer.write(text.encode("utf-8", "backslashreplace") + b"\n")
    sys.stdout.buffer.flush()


def print_json(value: object) -> None:
    """One machine-readable object on stdout."""
    say(json.dumps(value, ensure_ascii=False))


def explain(tokenizer: Any, result: Generation) -> Text:
    """The output with each token coloured by who drafted it."""
    text, parts = Text(), Detokenizer(tokenizer)
    for token, source in zip(result.tokens, result.sources, strict=False):
        text.append(parts.add([token]), style=STYLES[Source(source)])
    return text.append(parts.rest())


def legend() -> Text:
    """What the colours of :func:`explain` mean."""
    text = Text()
    for source, meaning in MEANING.items():
        text.append(f"■ {meaning}   ", style=STYLES[source])
    return text


def summary(result: Generation) -> str:
    """One line about a generation."""
    n = len(result.tokens)
    rate = n / result.seconds if result.seconds > 0 else 0.0
    return (
        f"{n} tokens in {result.seconds:.2f} s ({rate:.0f} tokens/s), "
        f"{result.tokens_per_step:.2f} tokens a step"
    )


def bench_table(result: dict[str, Any]) -> Table:
    """The methods of a benchmark, side by side."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name, justify in (
        ("method", "left"),
        ("tokens/s", "right"),
        ("speed-up", "right"),
        ("tokens/step", "right"),
        ("draft µs", "right"),
        ("identical", "right"),
        ("exact match", "right"),
        ("guarantee", "left"),
    ):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for name, method in result["methods"].items():
        if "skipped" in method:
            table.add_row(name, f"skipped: {method['skipped']}", style="dim")
        else:
            table.add_row(*_bench_row(name, method))
    return table


def _bench_row(name: str, method: dict[str, Any]) -> Sequence[str]:
    speedup = method.get("speedup")
    draft = method.get("draft_us")
    same = ""
    if "identical" in method:
        same = f"{method['identical']}/{method['identical'] + method.get('differing', 0)}"
        if method.get("near_ties"):
            same += f" ({method['near_ties']} ties up to rounding)"
    return (
        name,
        f"{method['tokens_per_second']:.0f}",
        f"{speedup['median']:.2f}x [{speedup['low']:.2f}-{speedup['high']:.2f}]"
        if speedup
        else "1",
        f"{method['tokens_per_step']:.2f}" if method.get("tokens_per_step") else "",
        f"{draft['p50']:.0f}" if draft else "",
        same,
        f"{method['quality']['exact_match']:.3f}" if method.get("quality") else "",
        method.get("guarantee", ""),
    )


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
Temperature = Annotated[
    float | None, typer.Option(help="0 is greedy; by default what the checkpoint says, else 0.")
]
MaxTokens = Annotated[int, typer.Option("--max-new-tokens", help="Most tokens to generate.")]


def use_threads(count: int) -> None:
    """Let torch use ``count`` threads; 0 leaves its choice."""
    if count:
        import torch

        torch.set_num_threads(count)

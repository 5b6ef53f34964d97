"""What the command line shows: progress, coloured tokens, tables, errors."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tascade.core import Generation, Progress, Source
from tascade.decode.text import Detokenizer
from tascade.errors import ConfigError
from tascade.util.progress import shown

if TYPE_CHECKING:
    from tascade.config import DataConfig

_LITTLE = 1.3
"""Tokens a step below which drafts are hardly worth it."""
_BUSY = 0.5
"""Cores that others keep busy from which a measurement is warned of."""
_AS_FAST = 110
"""Percent of a half-precision pass's time up to which float32 is as good as free."""
out = Console(highlight=False, emoji=False, width=None if sys.stdout.isatty() else 150)
err = Console(stderr=True, highlight=False, emoji=False, width=None if sys.stderr.isatty() else 150)

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


class _Notes(logging.Handler):
    """Shows what is noted about data and machine, a line each, on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        err.print(record.getMessage(), markup=False, soft_wrap=True)


@contextmanager
def reading(config: DataConfig, *sources: tuple[str, str]) -> Iterator[Progress]:
    """For a verb that reads examples: their first rows are looked at before anything is loaded.

    Args:
        config: how rows are read.
        sources: (path, split) of each; an empty path is none.

    Yields:
        A progress callback; meanwhile notes about the data are shown.

    Raises:
        DataError: a file is missing, or its header or one of its first rows cannot be used.
    """
    from tascade.data.load import check_start

    for source, split in sources:
        if source:
            check_start(source, config, split)
    with noting(), _terminable(), progress_bar() as progress:
        yield progress


@contextmanager
def noting() -> Iterator[None]:
    """Show what is noted about data, model and machine meanwhile."""
    log, notes = logging.getLogger("tascade.data"), _Notes(logging.INFO)
    before = log.level
    log.setLevel(logging.INFO)
    log.addHandler(notes)
    try:
        yield
    finally:
        log.removeHandler(notes)
        log.setLevel(before)


def progress_bar() -> AbstractContextManager[Progress]:
    """A progress callback: bars on a terminal, lines elsewhere."""
    return shown(True)


@contextmanager
def _terminable() -> Iterator[None]:
    """Have a request to terminate be an interrupt, as Ctrl-C is: what is begun is cleaned up."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def stopped(made: Path, kinds: Sequence[str], *, resume: bool) -> Iterator[None]:
    """Say what there is to go on with: before, where nothing is, and when it is stopped.

    Args:
        made: the pack that is made, or trained into; beside it lies what was kept.
        kinds: how the folders that keep something end.
        resume: whether to go on was asked for.
    """
    made = made.absolute()
    folders = [made.with_name(f".{made.name}.{kind}") for kind in kinds]
    if resume and not any(folder.is_dir() for folder in folders):
        err.print("there is nothing to resume: it begins anew")
    try:
        yield
    except KeyboardInterrupt:
        left = any(folder.is_dir() for folder in folders)
        err.print(
            f"stopped; {'--resume goes on with what there is' if left else 'nothing is kept'}"
        )
        raise typer.Exit(130) from None


@contextmanager
def ends_early() -> Iterator[None]:
    """Say what an interrupt means where nothing was measured yet."""
    try:
        yield
    except KeyboardInterrupt:
        err.print("stopped before every method had answered a row: there is nothing to show")
        raise typer.Exit(130) from None


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


def rows_used(rows: dict[str, int], own: int = 0) -> str:
    """On how many rows a pack was calibrated and compared with plain decoding.

    ``own``: how many of the model's own answers it has.
    """
    from tascade.builder import SOONER

    text = (
        f"calibrated on {rows['calibrated']} of {rows['held_out_of']} held-out rows; "
        f"{rows['checked'] - rows['differing']} of {rows['checked']} answers are plain decoding's"
    )
    if rows["differing"]:
        text += f", {rows['differing']} differ ({rows['near_ties']} at ties up to rounding)"
    if rows.get("steps"):
        gain = rows["stepped_tokens"] / rows["steps"]
        text += f"; {gain:.1f} tokens a step on these"
        if cut := rows.get("cut"):
            text += (
                f"\n{cut} of these {rows['calibrated']} answers were cut at the limit of tokens: "
                "--max-new-tokens gives longer ones"
            )
        if gain < _LITTLE and not own:
            text += (
                "\nthat is little: the index holds reference answers, which this model may not "
                "say; --self indexes its own"
            )
    if "rows_alike" in rows:
        text += (
            f"\nhalf precision rounds alike in passes of up to {rows['rows_alike']} rows here, as "
            "far as was tested"
        )
        if not rows["differing"]:
            text += ": answers are plain decoding's"
        if (percent := rows.get("float32_percent", 100)) <= SOONER:
            text += (
                f"; but a float32 pass over 16 tokens took {percent}% of a "
                "half-precision one's time here: with --dtype float32 drafts may gain more"
            )
    elif "float32_percent" in rows:
        text += "\nin half precision answers are the model's up to rounding"
        if (percent := rows["float32_percent"]) <= _AS_FAST:
            text += (
                f"; a float32 pass over 16 tokens took {percent}% of a "
                "half-precision one's time here: with --dtype float32 they are identical"
            )
    if rows.get("references_kept"):
        text += (
            f"\n{own} of {own + rows['references_kept']} own answers, references for the rest "
            "(--own-seconds gives more time)"
        )
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


def tell_what_was_left_out(result: dict[str, Any]) -> None:
    """Say on stderr what a benchmark was stopped before, or had no time for."""
    said, rows = result["settings"], result["data"]["examples"]
    if not said.get("traced", True) and not said.get("stopped"):
        lacking = "stopped before the acceptance of drafts was looked at: the page lacks its plots"
        err.print(lacking, style="yellow", soft_wrap=True)
    if "asked_rows" not in said:
        return
    why = "stopped" if said["stopped"] else "what there was time for (--minutes)"
    text = f"{why}: {said['repeats']} of {said['asked_repeats']} rounds over {rows} of "
    text += f"{said['asked_rows']} rows"
    if said["stopped"]:
        text += "; the same command with --resume goes on after its whole rounds"
    err.print(text, style="yellow", soft_wrap=True)


def print_bench_so_far(so_far: dict[str, Any]) -> None:
    """A benchmark after another round, on stderr."""
    err.print(bench_table(so_far))


def tell_remarks(result: dict[str, Any]) -> None:
    """Warn of what makes a result say less than it seems."""
    from tascade.bench.remarks import remarks

    for said in remarks(result):
        err.print(said, style="yellow", soft_wrap=True)


def _busy_cores(seconds: float = 0.3) -> float:
    """How many cores others keep busy now; 0 where the system does not say."""

    def times() -> tuple[int, int]:
        spent = [*map(int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9])]
        return sum(spent), spent[3] + spent[4]  # idle, and waiting for disks

    try:
        before = times()
        time.sleep(seconds)
        after = times()
    except (OSError, ValueError, IndexError):
        return 0.0
    all_of_them, idle = after[0] - before[0], after[1] - before[1]
    return (os.cpu_count() or 1) * (1.0 - idle / max(1, all_of_them))


def tell_load() -> None:
    """Warn before something is measured on a machine that does other work."""
    busy = _busy_cores()
    if busy > _BUSY:
        err.print(
            f"other work runs here ({busy:.1f} of {os.cpu_count()} cores are busy): what is "
            "measured will be slower and scatter; --threads 1 may be faster than more",
            style="yellow",
            soft_wrap=True,
        )


def print_bench(result: dict[str, Any], pack: Path, dtype: str) -> None:
    """A benchmark's table, what is to be said of it, and what comes next; ``dtype``: as asked."""
    out.print(bench_table(result))
    tell_remarks(result)
    flag = "" if dtype == "auto" else f" --dtype {dtype}"
    served = f"tascade serve {pack}{flag} serves it in {result['dtype']}; tascade report {pack}: a "
    served += "page"
    err.print(served, style="dim", markup=False, soft_wrap=True)


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
    left_out: dict[str, list[str]] = {}
    for name, method in result["methods"].items():
        if "skipped" in method:
            left_out.setdefault(method["skipped"], []).append(name)
        else:
            table.add_row(*_bench_row(name, method, result["dtype"]))
    for why, names in left_out.items():
        more = f" and {len(names) - 1} more" * (len(names) > 1)
        table.add_row(names[0] + more, f"skipped: {why}", style="dim")
    return table


def _bench_row(name: str, method: dict[str, Any], dtype: str) -> Sequence[str]:
    from tascade.bench.metrics import with_spread
    from tascade.bench.schema import promise

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
        with_spread(speedup) if speedup else "1",
        f"{method['tokens_per_step']:.2f}" if method.get("tokens_per_step") else "",
        f"{draft['p50']:.0f}" if draft else "",
        same,
        f"{method['quality']['exact_match']:.3f}" if method.get("quality") else "",
        promise(method, dtype) if speedup else "baseline",
    )

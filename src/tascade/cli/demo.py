"""`tascade demo`: the bundled tasks and model, end to end, offline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.text import Text

from tascade import bundled
from tascade.bench.pack import BenchOptions, bench_pack
from tascade.bench.report import write_report
from tascade.cli import console
from tascade.config import GateConfig, Recipe, TuneConfig
from tascade.errors import ConfigError, GateError
from tascade.pipeline import adapt

METHODS = ("plain", "tasc-paper", "tasc-spec", "hf-generate", "hf-prompt-lookup")
TUNED_TASK = "tickets"
TUNING = TuneConfig(
    tokens=40, epochs=6, init="first", min_ngram_prob=0.9, gate=GateConfig(max_score_drop=0.05)
)
"""How the bundled model is taught. It is sure of nearly all it says, so ``min_token_prob`` finds
few places; and it is judged on 100 prompts, which cannot tell one point from another.
"""


def run(out: Path, *, rows: int = 12, repeats: int = 2, tune: bool = False) -> list[dict[str, Any]]:
    """Adapt to each bundled task, bench it on held-out rows, write one HTML page.

    Args:
        out: folder for the packs, the JSON results and ``report.html``.
        rows: test rows a task.
        repeats: timed rounds, methods in turns.
        tune: teach the model a task's tokens too, which takes some minutes.

    Returns:
        One benchmark result a task.

    Raises:
        ConfigError: ``out`` holds what no demo wrote.
    """
    results = []
    _check_folder(out)
    for task in bundled.tasks():
        console.out.rule(f"[bold]{task}", align="left")
        result = _task(task, out, rows, repeats)
        results.append(result)
    if tune:
        console.out.rule(f"[bold]{TUNED_TASK}, tuned", align="left")
        results += _tuned(TUNED_TASK, out, rows, repeats)
    page = out / "report.html"
    write_report(page, results, title="tascade demo: the bundled tasks and model")
    console.say(f"\nreport: {page}   packs: {out}/<task>")
    console.say(
        f'try:    tascade generate {out / bundled.tasks()[0]} --explain "<a prompt of the task>"'
    )
    return results


def _check_folder(out: Path) -> None:
    """Write into a new folder, an empty one, or that of an earlier demo."""
    packs = {f"{task}{end}" for task in bundled.tasks() for end in ("", "-tuned")}
    found = {path.name for path in out.iterdir()} if out.exists() else set()
    # A pack is what a demo writes first: without one, a page is somebody else's.
    pages = {"report.html", *(f"{pack}.json" for pack in packs)} if found & packs else set()
    if strange := [name for name in found - packs - pages if not name.startswith(".")]:
        raise ConfigError(
            "this folder holds what no demo wrote",
            got=", ".join(sorted(strange)[:5]),
            wanted="a new folder, or that of an earlier demo",
            where=str(out),
            fix="choose another with --out",
        )


def _task(task: str, out: Path, rows: int, repeats: int) -> dict[str, Any]:
    pack = out / task
    with console.progress_bar() as progress:
        adapt(
            bundled.model_path(),
            bundled.data_path(task, "train"),
            validation=bundled.data_path(task, "validation"),
            out=pack,
            overwrite=True,
            progress=progress,
        )
        result = bench_pack(
            pack,
            bundled.data_path(task, "test"),
            warmup=bundled.data_path(task, "validation"),
            options=BenchOptions(METHODS, rows, repeats, memory=False),
            out=out / f"{task}.json",
            progress=progress,
        )
    _show_example(pack, bundled.data_path(task, "test"))
    console.out.print(console.bench_table(result))
    return result


def _tuned(task: str, out: Path, rows: int, repeats: int) -> list[dict[str, Any]]:
    """A pack with a tuned model, measured; nothing if the gate refuses the model."""
    from tascade.enrich.stage import adapt_tuned

    pack = out / f"{task}-tuned"
    with console.progress_bar() as progress:
        try:
            _, tuned = adapt_tuned(
                bundled.model_path(),
                bundled.data_path(task, "train"),
                validation=bundled.data_path(task, "validation"),
                out=pack,
                recipe=Recipe(tune=TUNING),
                overwrite=True,
                progress=progress,
            )
        except GateError as error:
            console.say(str(error))
            return []
        result = bench_pack(
            pack,
            bundled.data_path(task, "test"),
            warmup=bundled.data_path(task, "validation"),
            options=BenchOptions(rows=rows, repeats=repeats, memory=False),
            out=out / f"{task}-tuned.json",
            progress=progress,
        )
    console.say(tuned.verdict.describe())
    console.out.print(console.bench_table(result))
    return [result]


def _show_example(pack: Path, test: Path) -> None:
    from tascade.data.load import load_examples
    from tascade.model import TaskModel

    example = next(iter(load_examples(test)))
    if not isinstance(example.prompt, str):
        return
    task_model = TaskModel.from_pretrained(pack)
    result = task_model.run(example.prompt)
    console.out.print(Text(example.prompt, style="dim"))
    console.out.print(console.explain(task_model.tokenizer, result))
    console.out.print(console.legend())
    console.out.print(console.summary(result), style="dim")

"""`tascade demo`: the bundled tasks and model, end to end, offline."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from rich.text import Text

from tascade import bundled
from tascade.bench.pack import BenchOptions, bench_pack
from tascade.bench.report import write_report
from tascade.cli import console
from tascade.config import GateConfig, Recipe, TuneConfig
from tascade.errors import ConfigError, GateError
from tascade.pipeline import adapt, adapt_tuned
from tascade.util.cpu import multiplies

METHODS = ("plain", "tasc-paper", "tasc-spec", "hf-generate", "hf-prompt-lookup")
TUNED_TASK = "tickets"
_SAVED_IN = "bfloat16"
"""The bundled model's weights."""
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
    results: list[dict[str, Any]] = []
    _check_folder(out)
    tasks = bundled.tasks()
    count, minutes = len(tasks) + tune, 2 * len(tasks) + 15 * tune
    console.err.print(
        f"{count} parts, about {minutes} min on two free cores, longer beside other work"
    )
    console.tell_load()
    if not multiplies(_SAVED_IN):
        console.err.print(f"in float32: this CPU has no instructions for {_SAVED_IN}")
    for number, task in enumerate(tasks, 1):
        console.out.rule(f"[bold]{number} of {count}: {task}", align="left")
        results += _task(task, out, rows, repeats)
        if results and results[-1]["settings"].get("stopped"):
            console.err.print(f"stopped in part {number} of {count}: the report has what there is")
            tune = False
            break
    if tune:
        console.out.rule(f"[bold]{count} of {count}: {TUNED_TASK}, tuned", align="left")
        results += _task(TUNED_TASK, out, rows, repeats, tune=True)
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


def _task(
    task: str, out: Path, rows: int, repeats: int, tune: bool = False
) -> list[dict[str, Any]]:
    """A pack, with a tuned model or the bundled one, measured; nothing if the gate refuses it."""
    pack, data = out / f"{task}{'-tuned' * tune}", partial(bundled.data_path, task)
    given: dict[str, Any] = {"validation": data("validation"), "out": pack, "overwrite": True}
    precision = "auto" if multiplies(_SAVED_IN) else "float32"
    with console.progress_bar() as progress:
        source = bundled.model_path(), data("train")
        try:
            if tune:
                recipe = Recipe(tune=TUNING, dtype=precision)
                _, tuned = adapt_tuned(*source, recipe=recipe, progress=progress, **given)
            else:
                adapt(*source, recipe=Recipe(dtype=precision), progress=progress, **given)
        except GateError as error:
            console.say(str(error))
            return []
        methods = ("all",) if tune else METHODS
        result = bench_pack(
            pack,
            data("test"),
            warmup=data("validation"),
            options=BenchOptions(methods, rows, repeats, memory=False),
            out=out / f"{pack.name}.json",
            progress=progress,
        )
    if tune:
        console.say(tuned.verdict.describe())
    else:
        _show_example(pack, data("test"))
    console.out.print(console.bench_table(result))
    console.tell_remarks(result)
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

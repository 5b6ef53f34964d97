"""Write ``docs/cli.md`` from the command line itself, so that the page cannot fall behind it.

python docs/generate_cli.py
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import typer

from tascade.cli import app

PAGE = Path(__file__).with_name("cli.md")
INTRO = """# Command line

<!-- Written by docs/generate_cli.py from src/tascade/cli/*.py: change those, not this page. -->

`tascade --help` and `tascade VERB --help` say the same. Results go to stdout, progress and errors
to stderr: bars on a terminal, plain lines elsewhere. An error of tascade's own ends with exit code
2 and names what was found, what was wanted, where, and how to fix it; `--json` prints one object
(`generate`: one a prompt) and nothing else on stdout.

Task data (`DATA`, `--data`, `--held-out`, `--validation`, `--warmup`) is described in
[Quick start](quickstart.md), a recipe in [Recipes](recipes.md), the numbers of `bench` in
[Results](results.md). Data is looked at first: a file that is missing, a header that cannot be
read or a bad row at its beginning ends a verb before a model is loaded. A default in words is what
an option does when it is left out.
"""


def commands() -> dict[str, Any]:
    """The verbs by name, as typer shows them."""
    group: Any = typer.main.get_command(app)
    return {name: verb for name, verb in group.commands.items() if not verb.hidden}


def is_argument(parameter: Any) -> bool:
    """Whether a parameter is given by its place, not by a name."""
    return bool(parameter.param_type_name == "argument")


def spellings(option: Any) -> list[str]:
    """Every way to write an option, the negative ones included."""
    return [*option.opts, *option.secondary_opts]


def render() -> str:
    """The whole page."""
    return "\n".join([INTRO, *(_section(name, verb) for name, verb in commands().items())])


def _section(name: str, verb: Any) -> str:
    arguments = [p for p in verb.params if is_argument(p)]
    options = [p for p in verb.params if not is_argument(p) and p.name != "help"]
    lines = [f"## {name}", "", inspect.cleandoc(verb.help or ""), "", "```text"]
    lines += [" ".join(["tascade", name, *map(_place, arguments), *_needed(options)]), "```", ""]
    if arguments:
        lines += ["| argument | |", "|---|---|"]
        lines += [f"| `{p.name.upper()}` | {_text(p.help)} |" for p in arguments] + [""]
    lines += ["| option | default | |", "|---|---|---|"]
    lines += [f"| {_names(p)} | {_default(p)} | {_text(p.help)} |" for p in options] + [""]
    return "\n".join(lines)


def _place(argument: Any) -> str:
    name = argument.name.upper() + ("..." if argument.nargs == -1 else "")
    return name if argument.required else f"[{name}]"


def _needed(options: list[Any]) -> list[str]:
    named = [f"{p.opts[0]} {p.opts[0].strip('-').upper()}" for p in options if p.required]
    return [*named, "[OPTIONS]"]


def _names(option: Any) -> str:
    return ", ".join(f"`{name}`" for name in spellings(option))


def _default(option: Any) -> str:
    if option.required:
        return "required"
    if isinstance(option.show_default, str):
        return option.show_default
    value = option.default
    if value is None or value is False or value == "":
        return ""
    return f"`{value}`"


def _text(text: str | None) -> str:
    return (text or "").replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")

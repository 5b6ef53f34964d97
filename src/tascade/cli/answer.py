"""The verbs that answer: `generate` and `chat`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tascade.cli.flags import (
    Json,
    MaxTokens,
    OtherModel,
    PackArg,
    PackDtype,
    Seed,
    System,
    Temperature,
    Threads,
    given,
    use_threads,
)
from tascade.errors import ConfigError

if TYPE_CHECKING:
    from tascade.core import Generation
    from tascade.model import TaskModel


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
    model: OtherModel = "",
    max_new_tokens: MaxTokens = 0,
    temperature: Temperature = None,
    seed: Seed = 0,
    stop: Annotated[list[str] | None, typer.Option(help="End the text before this string.")] = None,
    system: System = "",
    explain: Annotated[bool, typer.Option(help="Colour tokens by who drafted them.")] = False,
    assistant: Annotated[
        str, typer.Option(help="A smaller model of its tokenizer: drafts too.")
    ] = "",
    head: Annotated[
        str,
        typer.Option(
            help="full, exact, masked, or draft-only: the assistant's.", show_default="the pack's"
        ),
    ] = "",
    dtype: PackDtype = "auto",
    threads: Threads = 0,
    json: Json = False,
) -> None:
    """Generate answers with a pack; stdout has them as the model said them."""
    from tascade.cli import console

    prompts = [console.stdin_prompt() if text == "-" else text for text in prompt or ()]
    prompts += [console.prompt_in(path) for path in prompt_file or ()]
    if not prompts:
        raise ConfigError("no prompt", got="no argument and no --prompt-file", wanted="a prompt")
    use_threads(threads)
    options: dict[str, Any] = {"temperature": temperature, "seed": seed, "stop": stop}
    options |= given(max_new_tokens=max_new_tokens)
    opening = {"dtype": dtype, "head": head, "assistant": assistant or None}
    task_model = _opened(pack, model, system, **opening)
    for text in prompts:
        _show(task_model, task_model.run(text, **options), explain=explain, json=json)


def _opened(pack: Path, model: str, system: str, **options: Any) -> TaskModel:
    """A pack's model, whose prompts bring this system message instead of the pack's, if any."""
    from tascade.cli import console
    from tascade.model import TaskModel

    with console.noting():
        task_model = TaskModel.from_pretrained(pack, model or None, **options)
    task_model.chat = task_model.chat.given(system, "")
    return task_model


def _show(task_model: TaskModel, result: Generation, *, explain: bool, json: bool) -> None:
    from tascade.cli import console

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
            console.err.print(console.legend())
        else:
            console.say(result.text)
            counts = ", ".join(f"{count} {who}" for who, count in result.drafted_by.items())
            console.err.print(f"tokens by who drafted them: {counts}", style="dim")
        console.err.print(console.summary(result), style="dim")
    else:
        console.say(result.text)
    if result.finish_reason == "length":
        cut = f"cut at the limit of {len(result.tokens)} tokens: --max-new-tokens gives more"
        console.err.print(cut, style="dim", soft_wrap=True)


def chat(
    pack: PackArg,
    model: OtherModel = "",
    temperature: Temperature = None,
    seed: Seed = 0,
    system: System = "",
    max_new_tokens: MaxTokens = 0,
    dtype: PackDtype = "auto",
    threads: Threads = 0,
) -> None:
    """Type prompts, watch answers stream. Ctrl-D or an empty line ends it.

    What was said is remembered where the tokenizer has a chat template.
    """
    from tascade.cli import console

    use_threads(threads)
    task_model = _opened(pack, model, system, dtype=dtype)
    remembers = bool(getattr(task_model.tokenizer, "chat_template", None))
    if not remembers:
        said = "no chat template: each line is a prompt of its own, nothing is remembered"
        console.err.print(said, style="dim")
    turns: list[dict[str, str]] = []
    limit = given(max_new_tokens=max_new_tokens)
    while True:
        try:
            text = console.out.input("[bold]> [/bold]")
        except (EOFError, KeyboardInterrupt):
            break
        if not text.strip():
            break
        asked: Any = [*turns, {"role": "user", "content": text}] if remembers else text
        try:
            said = _streamed(task_model, asked, temperature=temperature, seed=seed, **limit)
        except ConfigError as error:
            console.err.print(f"error: {error}", markup=False, soft_wrap=True)
            continue
        if remembers:
            turns = [*asked, {"role": "assistant", "content": said}]


def _streamed(task_model: TaskModel, prompt: Any, **options: Any) -> str:
    """Write an answer as it comes, and return it.

    Raises:
        ConfigError: the conversation has become too long for the model, or a template refuses it.
    """
    from tascade.cli import console
    from tascade.decode.text import TextStream

    params = task_model.params(**options)
    text, result = TextStream(task_model.tokenizer, params), None
    for _, result in task_model.steps(task_model.encode(prompt), params):
        sys.stdout.write(text.take(result))
        sys.stdout.flush()
    sys.stdout.write("\n")
    assert result is not None
    if result.finish_reason == "length":
        console.err.print(f"(cut at {len(result.tokens)} tokens)", style="dim")
    return result.text

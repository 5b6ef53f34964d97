"""Write the tables of docs/options.md from the code: what is honoured, refused or ignored."""

from __future__ import annotations

from pathlib import Path

from tascade.decode import generation
from tascade.serve.requests import NEUTRAL, ChatRequest, CompletionRequest

PAGE = Path(__file__).parent / "options.md"
MARKS = {
    "generation": ("<!-- generation -->", "<!-- end of generation -->"),
    "openai": ("<!-- openai -->", "<!-- end of openai -->"),
}


def generation_table() -> str:
    """Every field of ``GenerationConfig``."""
    lines = ["| field of `GenerationConfig` | here |", "|---|---|"]
    kinds = [
        (generation.OWN, "honoured; also an option of `generate`"),
        (generation.OTHERS, "honoured"),
        (generation.PROCESSED, "honoured, by Transformers' own logits processor; also an option"),
        (generation.IGNORED, "ignored: it changes no answer"),
    ]
    for names, what in kinds:
        lines += [f"| `{name}` | {what} |" for name in names]
    for name, neutral in generation.REFUSED.items():
        shown = ", ".join(f"`{n}`" for n in neutral)
        lines.append(f"| `{name}` | refused by name, unless it is {shown} |")
    return "\n".join(lines)


def openai_table() -> str:
    """Every field of a request that is known."""
    lines = ["| field of a request | chat | completion |", "|---|---|---|"]
    chat, text = ChatRequest.model_fields, CompletionRequest.model_fields
    for name in sorted({*chat, *text}):
        lines.append(
            f"| `{name}` | {'honoured' * (name in chat)} | {'honoured' * (name in text)} |"
        )
    for name, values in NEUTRAL.items():
        free = any(type(value) is object for value in values)
        shown = ", ".join(f"`{value!r}`" for value in (None, *values))
        what = (
            "taken, changes nothing" if free else f"taken where it is {shown}; else refused by name"
        )
        lines.append(f"| `{name}` | {what} | the same |")
    return "\n".join(lines)


def page(text: str) -> str:
    """The page with its tables made anew."""
    for name, table in (("generation", generation_table()), ("openai", openai_table())):
        first, last = MARKS[name]
        before, _, rest = text.partition(first)
        _, _, after = rest.partition(last)
        text = f"{before}{first}\n{table}\n{last}{after}"
    return text


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))

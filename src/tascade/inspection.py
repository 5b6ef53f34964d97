"""`tascade inspect`: what a task would gain, before anything is built."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tascade.config import DataConfig, Recipe
from tascade.core import IntArray
from tascade.draft.budget import CostTable
from tascade.encode import end_tokens
from tascade.errors import DataError
from tascade.forecast import Forecast, forecast
from tascade.load import ModelRef, load_model
from tascade.model import measure_cost
from tascade.pipeline import Progress, prepare, silent, spread

_ROWS = 200


@dataclass(frozen=True, slots=True)
class Inspection:
    """A forecast, and what it was made from."""

    model: str
    data: str
    skipped: int
    forecast: Forecast
    cost: CostTable

    def to_dict(self) -> dict[str, Any]:
        """One JSON-ready object."""
        return {
            "model": self.model,
            "data": self.data,
            "skipped_rows": self.skipped,
            "step_cost": self.cost.to_json(),
            **self.forecast.to_dict(),
        }

    def describe(self) -> str:
        """A few lines for a person."""
        return f"{self.model} on {self.data}\n{self.forecast.describe()}"


def inspect(
    data: Any,
    model: ModelRef,
    *,
    held_out: Any = None,
    on_error: str = "raise",
    progress: Progress | None = None,
) -> Inspection:
    """Predict tokens per step and speed-up on held-out rows by replaying reference outputs.

    The model is loaded only to measure what its steps cost on this machine; nothing is trained,
    and no answer is generated. What the model really says may differ from the references.

    Args:
        data: training examples (see :func:`tascade.adapt`).
        model: a hub id, a folder, or a loaded ``(model, tokenizer)``.
        held_out: held-out examples; a share of ``data`` when absent.
        on_error: ``raise``, or ``skip`` bad rows.
        progress: called with (stage, done, total).

    Raises:
        DataError: a row cannot be used, or there are too few to hold any out.
    """
    tell = progress or silent
    loaded, tokenizer, name = load_model(model)
    ends = end_tokens(loaded, tokenizer)
    recipe = Recipe(data=DataConfig(on_error=on_error))
    prepared = prepare(tokenizer, ends, data, held_out, recipe, tell)
    rows = [_with_prompt(row) for row in spread(prepared.validation, _ROWS)]
    if len(rows) < 2:
        raise DataError(
            "too few examples to hold any out",
            got=f"{len(prepared.train)} examples",
            wanted="at least 40, or held-out examples of their own",
            where=str(data),
            fix="pass held-out examples with --held-out",
        )
    from tascade.decode.target import Target

    tell("measuring the model's steps", 0, None)
    cost = measure_cost(Target(loaded))
    tell("replaying held-out outputs", 0, len(rows))
    found = forecast(
        [answer for _, answer in prepared.train],
        rows,
        cost=cost,
        vocab_size=int(loaded.config.get_text_config().vocab_size),
        end_tokens=ends,
        max_nodes=recipe.spec.max_nodes,
        train_prompts=[prompt for prompt, _ in prepared.train],
    )
    skipped = sum(report.skipped for report in prepared.reports)
    return Inspection(name, str(data), skipped, found, cost)


def _with_prompt(row: tuple[IntArray | None, IntArray]) -> tuple[IntArray, IntArray]:
    prompt, answer = row
    return (answer[:0] if prompt is None else prompt), answer

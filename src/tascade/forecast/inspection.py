"""`tascade inspect`: what a task would gain, before anything is built."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Unpack

import numpy as np

from tascade.config import Recipe, SpecConfig, VocabConfig
from tascade.core import IntArray, Progress, Row
from tascade.data.chat import ChatConfig
from tascade.data.encode import end_tokens
from tascade.data.prepare import Prepared, prepare, spread
from tascade.decode.batch import BatchDecoder
from tascade.decode.batch_target import BatchTarget
from tascade.decode.lm_head import finisher
from tascade.decode.loop import Decoder
from tascade.decode.sampling import SamplingParams
from tascade.decode.target import Target
from tascade.draft.budget import NoDrafter
from tascade.draft.costs import CostTable
from tascade.draft.measure import measure_cost
from tascade.enrich.choose import Enrichment, choose_tokens
from tascade.enrich.tokens.mine import MiningRules
from tascade.enrich.tokens.stored import read_tokens
from tascade.errors import ConfigError, UnsupportedModelError
from tascade.forecast.probe import Probe, probe
from tascade.forecast.replay import FEWEST, Forecast, forecast
from tascade.forecast.rescue import gain_at
from tascade.load import ModelRef, load_model
from tascade.options import ReadOptions, laid_over
from tascade.tailor.profile import list_tokens
from tascade.tailor.savings import HeadSavings, head_savings
from tascade.util.progress import duration, shows_progress, teller

_log = logging.getLogger("tascade.data")
_ROWS = 200
_TOGETHER = 8
"""Answers that are given at once, in a pass that takes hardly longer than one's."""
_SHOWN, _SHOWN_CHARACTERS = 3, 90


@dataclass(frozen=True, slots=True)
class Inspection:
    """A forecast, and what it was made from.

    ``enrichment``: what new tokens would save once a model has learned them (``tascade tune``);
    ``None`` for a tokenizer that cannot be given any.
    ``vocabulary``: what an LM head of the task's tokens would save, and lack (``tascade tailor``);
    ``None`` for a model whose head cannot be replaced. ``held_out``: how many held-out rows there
    were, and how many each part of this was measured on. ``drafter``: how many misses of these
    drafts a small network foresees; ``None`` where that was not asked for. ``prompt_tokens``: of a
    held-out prompt, on average. ``said``: the beginnings of some of the model's own answers.
    """

    model: str
    data: str
    skipped: int
    forecast: Forecast
    cost: CostTable
    enrichment: Enrichment | None
    vocabulary: HeadSavings | None
    held_out: dict[str, int]
    drafter: Probe | None = None
    prompt_tokens: float = 0.0
    said: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """One JSON-ready object."""
        new, vocabulary = self.enrichment, self.vocabulary
        return {
            "model": self.model,
            "data": self.data,
            "skipped_rows": self.skipped,
            "held_out": self.held_out,
            "step_cost": self.cost.to_json(),
            "new_tokens": None
            if new is None
            else {"tokens": len(new.expansions), "fewer_steps": new.fewer_steps},
            "tailored_vocabulary": None if vocabulary is None else vocabulary.to_json(),
            "drafter": None if self.drafter is None else self.drafter.to_dict(),
            "said": list(self.said),
            **self.forecast.to_dict(),
        }

    def _own_answers(self) -> str:
        """How many own answers fit into the time that ``adapt --self`` takes for them.

        It takes the sooner of two ways: one by one with drafts, or together without.
        """
        f, seconds, most = self.forecast, SpecConfig().own_seconds, self.cost.limit
        answers, together = max(1, f.replayed), min(_TOGETHER, most)
        one, batch = (float(self.cost.upto(n)[-1]) for n in (1, together))
        reading = self.prompt_tokens / most * float(self.cost.upto(most)[-1])
        ways = {
            "one by one": f.forwards / answers * one,
            f"{together} at a time": f.output_tokens / answers * batch / together,
        }
        way = min(ways, key=lambda name: ways[name])
        count = round(seconds / max(reading + ways[way], 1e-6))
        count = round(count, 2 - len(str(count)))
        text = (
            f"  own answers  about {count:,} in {duration(seconds)}, {way} (`adapt --self`), if "
            "they are like these"
        )
        if f.answers == "references":
            text += " references: this model's own may be longer, and then it is fewer"
        return text + "; more in vLLM, or with --own-seconds"

    def _speed(self) -> str:
        """Tokens a second, which can be compared between precisions, as speed-ups cannot."""
        plain = 1 / float(self.cost.seconds.min())
        return (
            f"  speed        about {plain:.0f} tokens/s by plain decoding here, "
            f"{plain * self.forecast.speedup:.0f} with drafts; another --dtype has others"
        )

    def describe(self) -> str:
        """A few lines for a person."""
        text = f"{self.model} on {self.data}\n{self.forecast.describe()}\n"
        text += f"{self._speed()}\n{self._own_answers()}"
        text += "".join(
            f"\n  it says      {json.dumps(said, ensure_ascii=False)}" for said in self.said
        )
        if self.drafter is not None:
            text += self._trained_drafter(self.drafter)
        if self.enrichment is not None:
            count, fewer = len(self.enrichment.expansions), self.enrichment.fewer_steps
            text += f"\n{count} new tokens would take {fewer:.2f}x fewer steps (`tascade tune`)"
            text += f" on {self.enrichment.held_out} held-out outputs, at most: if the tuned model "
            text += "says each of them wherever it fits"
        if self.vocabulary is not None:
            text += f"\nan LM head of {self.vocabulary.brief()} (`tascade tailor`)"
        counted = [("new tokens", self.enrichment), ("LM head", self.vocabulary)]
        names = [name for name, found in counted if found is not None]
        if self.forecast.answers != "references" and names:
            text += f"\n  {' and '.join(names)}: counted on the references in the file, not on the "
            text += "model's own answers"
        return text

    def _trained_drafter(self, seen: Probe) -> str:
        bounds, first, four = self.forecast.rescues, seen.at_misses[0], seen.at_misses[1]
        half = next(bound for bound in bounds if bound.share == 0.5)
        return "\n".join(
            (
                "\na drafter trained on the task (`tascade drafter`), beside these drafts",
                f"  missed       {self.forecast.misses} tokens ended a step; one that had half of "
                f"them would be worth {half.speedup:.2f}x [{half.low:.2f}x to {half.high:.2f}x] "
                "more, at most",
                f"  foreseen     {first:.0%} by a probe on the model's states, {four:.0%} among "
                f"its four likeliest tokens: {gain_at(bounds, first):.2f}x to "
                f"{gain_at(bounds, four):.2f}x",
            )
        )


@shows_progress
def inspect(
    data: Any,
    model: ModelRef,
    *,
    held_out: Any = None,
    chat: ChatConfig | None = None,
    answers: int = 0,
    drafter: bool = False,
    progress: Progress | bool | None = None,
    **options: Unpack[ReadOptions],
) -> Inspection:
    """Predict tokens per step and speed-up on held-out rows by replaying reference outputs.

    The model is loaded to measure what its steps cost here; nothing is trained, and no answer is
    generated unless ``answers`` asks for some. What it really says may differ from the references.

    Args:
        data: training examples (see :func:`tascade.adapt`).
        model: a hub id, a folder, or a loaded ``(model, tokenizer)``.
        held_out: held-out examples; a share of ``data`` when absent.
        chat: what prompts take along into the chat template; nothing by default.
        answers: have the model answer so many held-out prompts, greedy and without drafts, and
            forecast from these.
        drafter: find out how many misses of the drafts a drafter trained on the task could foresee
            (see :func:`tascade.forecast.probe.probe`): a minute or some more.
        progress: called with (stage, done, total); bars by default (see
            :func:`tascade.util.progress.shown`).
        options: see :class:`tascade.options.ReadOptions`; answers longer than ``max_new_tokens``
            are replayed so far, and to their end without it.

    Raises:
        DataError: a row cannot be used, or there are too few to hold any out.
        ConfigError: an option that is none, or the model cannot be loaded.
    """
    tell = teller(progress)
    recipe = laid_over(Recipe(chat=chat or ChatConfig()), options)
    tell("loading the model", 0, None)
    loaded, tokenizer, name = load_model(model, dtype=recipe.dtype)
    ends = end_tokens(loaded, tokenizer)
    given = tokenizer, ends, data, held_out, recipe, tell, read_tokens(name)
    prepared = prepare(*given, least_held_out=2 * FEWEST["references"] + 4)
    chosen = spread(prepared.validation, _ROWS)
    rows = [_with_prompt(row, options.get("max_new_tokens") or None) for row in chosen]
    prepared.require_held_out(str(data))
    tell("measuring the model's steps", 0, None)
    cost = measure_cost(Target(loaded))
    own, others = _own(loaded, rows, answers, recipe, ends, tell)
    tell("replaying held-out outputs", 0, len(own or rows))
    found = forecast(
        [answer for _, answer in prepared.train],
        others if len(others) > 1 else rows,
        cost=cost,
        vocab_size=int(loaded.config.get_text_config().vocab_size),
        end_tokens=ends,
        max_nodes=recipe.spec.max_nodes,
        train_prompts=[prompt for prompt, _ in prepared.train],
        own=own,
    )
    replayed = own or rows[len(rows) // 2 :]
    seen = probe(loaded, prepared.train, replayed, found.missed, tell) if drafter else None
    tell("choosing tokens", 0, None)
    new = _new_tokens((prepared.train, chosen), (loaded, tokenizer, name))
    vocabulary = _vocabulary((loaded, tokenizer), prepared, float(cost.upto(1)[-1]), tell)
    counts = {
        "rows": prepared.held_out_of,
        "forecast": len(own) or len(rows),
        "new_tokens": 0 if new is None else new.held_out,
        "coverage": 0 if vocabulary is None else len(prepared.validation),
    }
    length = float(np.mean([len(prompt) for prompt, _ in rows]))
    said = tuple(_beginning(tokenizer, answer) for _, answer in own[:_SHOWN])
    kept = found, cost, new, vocabulary, counts, seen, length, said
    return Inspection(name, str(data), sum(r.skipped for r in prepared.reports), *kept)


def _new_tokens(rows: Any, model: tuple[Any, Any, str]) -> Enrichment | None:
    try:
        return choose_tokens(rows, model, MiningRules())
    except ConfigError:  # a tokenizer of a kind that cannot be extended
        return None


def _beginning(tokenizer: Any, answer: IntArray) -> str:
    text = str(tokenizer.decode(answer, skip_special_tokens=True))
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 1] + "…"


def _own(
    loaded: Any,
    rows: Sequence[tuple[IntArray, IntArray]],
    count: int,
    recipe: Recipe,
    ends: Sequence[int],
    tell: Progress,
) -> tuple[list[tuple[IntArray, IntArray]], list[tuple[IntArray, IntArray]]]:
    """Some of the prompts with the model's own answers; and the other rows: nothing is to be
    calibrated on the reference of a prompt whose own answer is replayed.
    """
    asked = spread([row for row in rows if len(row[0])], count)
    if not asked:
        return [], list(rows)
    prompts = [prompt for prompt, _ in asked]
    params = SamplingParams(max_new_tokens=recipe.max_new_tokens, end_tokens=tuple(ends))
    own: list[tuple[IntArray, IntArray]] = []
    stage, latest = "answering held-out prompts, tokens", time.monotonic() + recipe.spec.own_seconds
    tell("reading held-out prompts", 0, None)
    given = 0
    try:
        with closing(_answers(loaded, prompts, params)) as said:
            for at, new, tokens in said:
                given += new
                if tokens is not None:
                    own.append((prompts[at], np.asarray(tokens, np.int32)))
                ended = sum(len(answer) for _, answer in own)
                tell(stage, given, ended + (len(asked) - len(own)) * params.max_new_tokens)
                if time.monotonic() > latest and len(own) > 1:
                    break
    except KeyboardInterrupt:
        if not own:
            raise
        _log.info("stopped: the forecast goes by the %d own answers so far", len(own))
    taken = {id(row) for row in asked}
    return own, [row for row in rows if id(row) not in taken]


def _answers(
    loaded: Any, prompts: Sequence[IntArray], params: SamplingParams
) -> Generator[tuple[int, int, list[int] | None]]:
    """Which prompt, how many new tokens, and its answer at its end; several at once where the
    model's attention allows.
    """
    try:
        decoder = BatchDecoder(BatchTarget(loaded), size=_TOGETHER)
    except UnsupportedModelError:
        alone = Decoder(Target(loaded), NoDrafter())
        for at, prompt in enumerate(prompts):
            tokens = alone.generate(prompt, params).tokens
            yield at, len(tokens), tokens
        return
    with closing(decoder.stream(prompts, params)) as stream:
        for at, new, made in stream:
            yield at, len(new), made.tokens if made.seconds else None  # it has ended


def _vocabulary(
    model: tuple[Any, Any], prepared: Prepared, step_seconds: float, tell: Progress
) -> HeadSavings | None:
    """What ``tascade tailor`` would list with its defaults; ``None`` for heads that must stay."""
    tell("counting tokens", 0, None)
    if not _replaceable(model[0]):
        return None
    profile = list_tokens(model, prepared.train, prepared.validation, VocabConfig())
    return head_savings(model[0], profile, prepared.validation, step_seconds)


def _replaceable(model: Any) -> bool:
    """Whether the model's LM head can give way to a small one."""
    try:
        finisher(model)
    except UnsupportedModelError:
        return False
    return True


def _with_prompt(row: Row, limit: int | None) -> tuple[IntArray, IntArray]:
    prompt, answer = row
    return (answer[:0] if prompt is None else prompt), answer[:limit]

"""`tascade enrich`: which n-grams of a task's outputs become tokens, and what that would save."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Unpack

from tascade.answers.own import Answering
from tascade.config import Recipe
from tascade.core import IntArray, Progress, Row
from tascade.data.chat import ChatConfig
from tascade.data.encode import end_tokens, fingerprint
from tascade.data.prepare import prepare, spread
from tascade.enrich.boundaries import MIN_BOUNDARY_FREE, boundary_free_shares
from tascade.enrich.distill_data import make_distill_data
from tascade.enrich.tokens.counts import BARRIER
from tascade.enrich.tokens.curve import (
    Choice,
    StepCurve,
    best_at,
    best_curve,
    choose_among,
    step_curve,
    stop_at,
)
from tascade.enrich.tokens.extend import save_extended
from tascade.enrich.tokens.family import TokenizerFamily
from tascade.enrich.tokens.merger import TokenMerger, split_at
from tascade.enrich.tokens.mine import MiningRules, OutputCounts
from tascade.enrich.tokens.stored import FORMAT, TOKENS_FILE, VERSION
from tascade.load import ModelRef, load_model
from tascade.options import ReadOptions, laid_over
from tascade.util.files import folder_beside, install_folder, without_folders, write_atomic
from tascade.util.places import place_for
from tascade.util.progress import shows_progress, teller

_HELD_OUT_ROWS = 500
_ROUNDS = 5

Boundaries = tuple[Sequence[IntArray], Sequence[IntArray]]
"""Each answer's ascending places that no new token is to reach over: chosen from, and held out."""


@dataclass(frozen=True, slots=True)
class Enrichment:
    """New tokens for a task.

    ``expansions``: base ids of each, the most useful first; ``first``: the id of the first one;
    ``chosen``: how many were chosen from; ``curve``: predicted steps on ``held_out`` outputs;
    ``left_out``: of the model's own answers, how many prompts of each part time did not reach.
    """

    model: str
    fingerprint: str
    first: int
    expansions: tuple[tuple[int, ...], ...]
    chosen: int
    curve: StepCurve
    stopped: str
    rules: MiningRules
    own_answers: bool
    held_out: int = 0
    left_out: dict[str, int] = field(default_factory=dict)

    @property
    def fewer_steps(self) -> float:
        """Predicted: steps of the base model over steps with the new tokens."""
        return self.curve.fewer(len(self.expansions))

    def to_json(self) -> dict[str, Any]:
        """One JSON-ready object."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "model": without_folders(self.model),
            "fingerprint": self.fingerprint,
            "first": self.first,
            "tokens": len(self.expansions),
            "fewer_steps": self.fewer_steps,
            "stopped": self.stopped,
            "own_answers": self.own_answers,
            "held_out_rows": self.held_out,
            "left_out": self.left_out,
            "rules": asdict(self.rules),
            "curve": self.curve.to_json(),
            "expansions": self.expansions,
        }

    def describe(self) -> str:
        """A few lines for a person: the curve, and where it stops."""
        judged = f"judged on {self.held_out} held-out answers"
        lines = [f"{self.model}: {len(self.expansions)} new tokens, {self.stopped}; {judged}"]
        shown = self.curve.sizes[:: max(1, len(self.curve.sizes) // 8)]
        for size in sorted({*shown, len(self.expansions), self.curve.sizes[-1]}):
            mark = "  <- chosen" if size == len(self.expansions) else ""
            lines.append(f"  {size:5d} tokens: {self.curve.fewer(size):.2f}x fewer steps{mark}")
        return "\n".join(lines)


@shows_progress
def enrich(
    data: Any,
    model: ModelRef,
    *,
    held_out: Any = None,
    tokens: int = 0,
    rules: MiningRules | None = None,
    own_answers: Answering | None = None,
    out: str | Path | None = None,
    chat: ChatConfig | None = None,
    progress: Progress | bool | None = None,
    **options: Unpack[ReadOptions],
) -> Enrichment:
    """Choose new tokens from a task's training outputs; predict the steps on held-out ones.

    Nothing is trained: with the tokens alone a model says what it said before.

    Args:
        data: training examples (see :func:`tascade.adapt`).
        model: a hub id, a folder, or a loaded ``(model, tokenizer)``.
        held_out: held-out examples; a share of ``data`` when absent.
        tokens: how many tokens; 0 for as many as are worth it, at most ``rules.tokens``.
        rules: how to choose.
        own_answers: choose from the model's own answers, which this gives; that takes time.
        out: a new folder for ``tokens.json`` and the extended tokenizer.
        chat: what prompts take along into the chat template; nothing by default.
        progress: called with (stage, done, total); bars by default (see
            :func:`tascade.util.progress.shown`).
        options: see :class:`tascade.options.ReadOptions`.

    Raises:
        DataError: a row cannot be used, or there are too few.
        ConfigError: a tokenizer that cannot be given tokens, or ``out`` exists.
    """
    rules, tell = rules or MiningRules(), teller(progress)
    if tokens:
        rules = MiningRules(**{**asdict(rules), "tokens": tokens})
    if out is not None:
        place_for(out)
    recipe = laid_over(Recipe(chat=chat or ChatConfig()), options)
    loaded, tokenizer, name = load_model(model, dtype=recipe.dtype)
    TokenizerFamily(tokenizer)  # a tokenizer that cannot be given tokens is refused at once
    ends = end_tokens(loaded, tokenizer)
    prepared = prepare(tokenizer, ends, data, held_out, recipe, tell)
    prepared.require_held_out(str(data))
    rows, left_out = (prepared.train, spread(prepared.validation, _HELD_OUT_ROWS)), {}
    if own_answers is not None:
        given = (loaded, tokenizer, name), prepared, recipe, tell, own_answers
        answered = make_distill_data(*given, held_out=_HELD_OUT_ROWS)
        rows, left_out = (answered.train, answered.held_out), answered.left_out
    tell("choosing tokens", 0, None)
    made = choose_tokens(
        rows, (loaded, tokenizer, name), rules, wanted=tokens, own=bool(own_answers)
    )
    made = replace(made, left_out=left_out)
    if out is not None:
        save_enrichment(made, tokenizer, Path(out))
    return made


def choose_tokens(
    rows: tuple[Sequence[Row], Sequence[Row]],
    loaded: tuple[Any, Any, str],
    rules: MiningRules,
    *,
    wanted: int = 0,
    own: bool = False,
    boundaries: Boundaries | None = None,
) -> Enrichment:
    """Choose new tokens from answers, and predict the steps on others.

    Args:
        rows: (prompt, answer) pairs to choose from, and held-out ones.
        loaded: model, tokenizer and name.
        rules: how to choose, and how many at most.
        wanted: how many; 0 for as many as are worth it.
        own: whether the answers are the model's own.
        boundaries: places of these answers that no new token is to reach over.

    Raises:
        ConfigError: a tokenizer that cannot be given tokens.
    """
    model, tokenizer, name = loaded
    family, ends = TokenizerFamily(tokenizer), end_tokens(model, tokenizer)
    if boundaries is None:
        train, kept = (OutputCounts(_without_ends((a for _, a in part), ends)) for part in rows)
        choices = choose_among(train, kept, family.size, rules, family.spell)
    else:
        choices = [_choose_within(rows, boundaries, family, ends, rules)]
    curve = best_curve(choices)
    size, why = curve.sizes[-1], "as many as asked for"
    if not wanted:
        size, why = stop_at(curve, _row_share(model))
    choice = best_at(choices, size)
    size = min(size, len(choice.tokens))
    if size < wanted:
        why = "no other n-gram is frequent enough, or would help"
    return Enrichment(
        model=name,
        fingerprint=fingerprint(tokenizer),
        first=family.size,
        expansions=tuple(choice.tokens[:size]),
        chosen=len(choice.tokens),
        curve=choice.curve,
        stopped=why,
        rules=choice.rules,
        own_answers=own,
        held_out=len(rows[1]),
    )


def _choose_within(
    rows: tuple[Sequence[Row], Sequence[Row]],
    boundaries: Boundaries,
    family: TokenizerFamily,
    ends: Sequence[int],
    rules: MiningRules,
) -> Choice:
    """Tokens from the pieces between boundaries, without those that often reach over one.

    What is certain in one answer may be a boundary in another, where the token would stand as well.
    Such are refused, and others chosen in their place, a few times over.
    """
    answers = [answer for _, answer in rows[0]]
    cut = [
        [piece for row, at in zip(part, places, strict=True) for piece in split_at(row[1], at)]
        for part, places in zip(rows, boundaries, strict=True)
    ]
    train, kept = (
        OutputCounts(_without_ends(parts, ends), len(part))
        for parts, part in zip(cut, rows, strict=True)
    )
    refused: set[tuple[int, ...]] = set()
    settled = rules
    for _ in range(_ROUNDS):
        more = replace(settled, tokens=rules.tokens + len(refused))
        choice = best_at(choose_among(train, kept, family.size, more, family.spell), more.tokens)
        settled = choice.rules  # what generalises best is found out once
        tokens = [token for token in choice.tokens if token not in refused][: rules.tokens]
        merger = TokenMerger(tokens, family.size)
        shares = boundary_free_shares(merger, answers, boundaries[0])
        low = {t for t, share in zip(tokens, shares, strict=True) if share < MIN_BOUNDARY_FREE}
        refused |= low
        if not low:
            break
    tokens = [token for token in tokens if token not in refused]
    return Choice(
        replace(settled, tokens=rules.tokens), tokens, step_curve(tokens, family.size, kept)
    )


def _row_share(model: Any) -> float:
    """A row of the LM head, as a share of the parameters that a step reads."""
    head = model.get_output_embeddings().weight
    read = sum(part.numel() for part in model.parameters())
    if model.get_input_embeddings().weight is not head:  # of those a step reads one row
        read -= model.get_input_embeddings().weight.numel()
    return float(head.shape[1] / max(read, 1))


def _without_ends(answers: Iterable[IntArray], ends: Sequence[int]) -> list[IntArray]:
    """Answers without the end token, which no new token may hold: none may span one."""
    found = []
    for answer in answers:
        ids = answer[:-1] if len(answer) and int(answer[-1]) in ends else answer.copy()
        ids = ids.copy()
        ids[[int(token) in ends for token in ids]] = BARRIER
        found.append(ids)
    return found


def write_tokens(made: Enrichment, folder: Path) -> None:
    """Write ``tokens.json``."""
    write_atomic(folder / TOKENS_FILE, (json.dumps(made.to_json(), indent=1) + "\n").encode())


def save_enrichment(made: Enrichment, tokenizer: Any, folder: Path) -> None:
    """Write ``tokens.json`` and the extended tokenizer to a new folder, all of it or nothing."""
    with folder_beside(folder) as part:
        save_extended(tokenizer, made.expansions, made.first, part)
        write_tokens(made, part)
        place_for(folder)
        install_folder(part, folder)

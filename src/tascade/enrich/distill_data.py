"""What a model is distilled from: its own answers, to the task's prompts and to ones of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from tascade.answers.own import Answering, count_prompts, enough_own
from tascade.config import Recipe, TuneConfig
from tascade.core import IntArray, Progress, Row
from tascade.data.prepare import Prepared, spread
from tascade.enrich.boundaries import NgramModel, uncertain_positions
from tascade.enrich.prompts import free_text, own_prompts, spliced_prompts
from tascade.enrich.tokens.family import TokenizerFamily
from tascade.errors import ConfigError
from tascade.util.files import write_atomic

_NOTHING = np.empty(0, np.int32)
_PARTS = ("train", "synthetic", "replay", "held_out")
_ASKED = ("train", "synthetic", "held_out")


@dataclass(slots=True)
class DistillData:
    """Rows (prompt, answer) in base token ids, the answers the model's own (but for ``gold``
    targets, where ``train`` has the data's).

    ``train``: the training prompts; ``synthetic``: prompts the model wrote; ``replay``: text it
    wrote from a single token on, to remember by; ``held_out``: prompts to judge by, which nothing
    is learned from. ``boundaries``: of each part, the places of each answer that no new token
    reaches over (:meth:`mark_boundaries`). ``places``: which of the held-out rows given each of
    ``held_out`` is. ``left_out``: of each part, how many prompts there was no time to answer.
    """

    train: list[Row] = field(default_factory=list)
    synthetic: list[Row] = field(default_factory=list)
    replay: list[Row] = field(default_factory=list)
    held_out: list[Row] = field(default_factory=list)
    boundaries: dict[str, list[IntArray]] = field(default_factory=dict)
    places: list[int] = field(default_factory=list)
    left_out: dict[str, int] = field(default_factory=dict)

    def mark_boundaries(self, model: Any, config: TuneConfig) -> None:
        """Find the places where the model is uncertain, and those that depend on the prompt.

        (See :mod:`tascade.enrich.boundaries`; ``config``: ``min_token_prob``, ``min_ngram_prob``.)
        """
        if config.min_token_prob:
            for part in _PARTS:
                rows: list[Row] = getattr(self, part)
                self.boundaries[part] = uncertain_positions(
                    model, rows, config.min_token_prob, config.max_length
                )
        if config.min_ngram_prob:
            self._mark_prompt_dependent(config.min_ngram_prob)

    def _mark_prompt_dependent(self, min_prob: float) -> None:
        known = NgramModel([answer for _, answer in (*self.train, *self.synthetic)])
        for part in _ASKED:
            rows: list[Row] = getattr(self, part)
            marked = self.boundaries.get(part, [_NOTHING] * len(rows))
            counted = part != "held_out"
            self.boundaries[part] = [
                np.union1d(found, known.unlikely_positions(answer, min_prob, counted=counted))
                for found, (_, answer) in zip(marked, rows, strict=True)
            ]

    def save(self, file: Path) -> None:
        """Write to a safetensors file, atomically."""
        tensors = {}
        for part in _PARTS:
            rows = getattr(self, part)
            boundaries = self.boundaries.get(part, [_NOTHING] * len(rows))
            sides = {
                "prompts": [_NOTHING if row[0] is None else row[0] for row in rows],
                "answers": [row[1] for row in rows],
                "boundaries": boundaries,
            }
            for side, ids in sides.items():
                tensors[f"{part}.{side}"] = np.concatenate([_NOTHING, *ids])
                tensors[f"{part}.{side}.ends"] = np.cumsum([0, *map(len, ids)])
        tensors["held_out.places"] = np.asarray(self.places, np.int64)
        tensors["left_out"] = np.asarray([self.left_out.get(part, 0) for part in _ASKED], np.int64)
        write_atomic(file, save(tensors))

    @classmethod
    def load(cls, file: Path) -> DistillData:
        """Read what :meth:`save` wrote.

        Raises:
            ConfigError: no such file, or a damaged one.
        """
        try:
            tensors = load_file(file)
            made = cls()
            for part in _PARTS:
                sides = [
                    np.split(tensors[f"{part}.{side}"], tensors[f"{part}.{side}.ends"][1:-1])
                    for side in ("prompts", "answers", "boundaries")
                ]
                count = len(tensors[f"{part}.answers.ends"]) - 1
                setattr(made, part, list(zip(*sides[:2], strict=True))[:count])
                made.boundaries[part] = sides[2][:count]
            made.places = tensors["held_out.places"].tolist()
            made.left_out = dict(zip(_ASKED, tensors["left_out"].tolist(), strict=True))
        except (OSError, KeyError, ValueError, SafetensorError) as error:
            raise ConfigError("cannot read what to learn", got=error, where=str(file)) from error
        return made


def make_distill_data(
    loaded: tuple[Any, Any, str],
    prepared: Prepared,
    recipe: Recipe,
    tell: Progress,
    answering: Answering,
    *,
    held_out: int = 500,
    prompts: float = 0.0,
    replay: float = 0.0,
) -> DistillData:
    """Let the model answer the task's prompts, and others that it writes itself.

    A prompt that time does not reach is left out; its reference never stands for an answer.

    Args:
        loaded: model, tokenizer and name.
        prepared: the examples.
        recipe: ``max_new_tokens``, ``spec.own_seconds`` (for each part), ``tune.seed``; and
            ``tune.targets``: with ``gold`` held-out prompts alone are answered.
        tell: called with (stage, done, total).
        answering: gives the model's own answers.
        held_out: at most so many held-out prompts, spread over the file.
        prompts: how many prompts the model writes for each training prompt.
        replay: how many texts of its own it writes, for each of all these prompts.

    Raises:
        ConfigError: too few answers in the time allowed.
        TascadeError: the answers are not the model's words.
    """
    seconds = recipe.spec.own_seconds
    made = DistillData(left_out=dict.fromkeys(_ASKED, 0))
    with answering(loaded, prepared, recipe, tell) as ask:

        def answer(part: str, rows: Sequence[Row]) -> None:
            own, places = ask(rows)
            if part != "synthetic":  # which are a help and no need
                enough_own(len(own), rows, part.replace("_", "-") + " prompts", seconds)
            made.left_out[part] = count_prompts(rows) - len(own)
            said = [n for n, (_, ids) in enumerate(own) if len(ids)]
            setattr(made, part, [own[n] for n in said])
            if part == "held_out":
                made.places = [places[n] for n in said]

        known = [prompt for prompt, _ in prepared.train if prompt is not None]
        answer("held_out", spread(prepared.validation, held_out))
        if recipe.tune.targets == "gold":
            made.train = prepared.train
        else:
            answer("train", prepared.train)
            wanted, seed = round(prompts * len(known)), recipe.tune.seed
            if wanted:
                written = own_prompts(loaded[0], known, wanted, seed=seed, tell=tell)
                written += spliced_prompts(known, wanted - len(written), seed=seed)
                answer("synthetic", [(prompt, _NOTHING) for prompt in written])
    count = round(replay * (len(known) + len(made.synthetic)))
    made.replay = _replay_rows(loaded, count, recipe.tune.seed)
    return made


def _replay_rows(loaded: tuple[Any, Any, str], count: int, seed: int) -> list[Row]:
    """Texts of the model's own: the first token as the prompt, the rest as the answer."""
    if not count:
        return []
    text = free_text(loaded[0], TokenizerFamily(loaded[1]).size, rows=count, seed=seed + 1)
    return [(ids[:1], ids[1:]) for ids in text.cpu().numpy().astype(np.int32)]

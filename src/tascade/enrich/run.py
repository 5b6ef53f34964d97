"""One run of `tascade tune`, from its data on: choose, train, evaluate, export."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tascade.config import Recipe
from tascade.core import IntArray, Progress, Row
from tascade.data.prepare import spread
from tascade.decode.exclusive import exclusive
from tascade.decode.generation import sampling_params
from tascade.decode.loop import Decoder
from tascade.decode.target import Target
from tascade.draft.budget import NoDrafter
from tascade.enrich.choose import Boundaries, Enrichment, choose_tokens, write_tokens
from tascade.enrich.distill_data import DistillData
from tascade.enrich.gate import Answer, GateResult, Score, evaluate, kl_divergence, log_probs
from tascade.enrich.prompts import free_text
from tascade.enrich.tokens.extend import check_extension
from tascade.enrich.tokens.merger import TokenMerger
from tascade.enrich.tokens.mine import MiningRules
from tascade.enrich.train.export import reopen, write_about, write_model
from tascade.enrich.train.samples import make_samples
from tascade.enrich.train.train import TrainResult, train
from tascade.errors import DataError, TascadeError
from tascade.load import stored_dtype
from tascade.pack import provenance
from tascade.util.files import folder_beside, install_folder
from tascade.util.places import place_for

_COMPARED = 3


@dataclass(frozen=True, slots=True)
class Tuned:
    """What tuning made: where it lies (``None`` if the gate refused it), and how it did.

    ``control``: the model with LoRA alone, if one was asked for; it is not exported.
    ``distill_data``: how many answers each part had, and how many prompts were ``left_out`` for
    want of time.
    """

    path: Path | None
    enrichment: Enrichment
    training: TrainResult
    verdict: GateResult
    control: TrainResult | None = None
    distill_data: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """One JSON-ready object."""
        return {
            "path": None if self.path is None else self.path.name,
            "tokens": len(self.enrichment.expansions),
            "predicted_fewer_steps": self.enrichment.fewer_steps,
            "init": self.training.init,
            "probe": self.training.probe,
            "steps": len(self.training.losses),
            "distill_data": self.distill_data,
            "gate": self.verdict.to_json(),
        }


class TuningRun:
    """One tuning, from its data on."""

    def __init__(
        self,
        loaded: tuple[Any, Any, str],
        ends: tuple[int, ...],
        data: DistillData,
        recipe: Recipe,
        work: Path,
        tell: Progress,
    ) -> None:
        self.loaded, self.ends, self.data, self.work = loaded, ends, data, work
        self.recipe, self.tell = recipe, tell
        self.rows: list[Row] = [*data.train, *data.synthetic]
        self.steer, self.asked = data.held_out[::2], data.held_out[1::2]

    def finish(self, target: Path, references: Sequence[str], score: Score) -> Tuned:
        """Train, evaluate, export."""
        model, made = self.loaded[0], self._choose()
        merger, nothing = TokenMerger(made.expansions, made.first), TokenMerger((), made.first)
        text = free_text(model, made.first)
        before = log_probs(model, text, made.first)
        control = self._train(nothing, "control") if self.recipe.tune.control else None
        training = self._train(merger, "tuned")
        beside = [] if control is None else self._answers(control.model, nothing)
        with folder_beside(target) as part:
            opened = self._export(made, training, merger, part)
            verdict = evaluate(
                self._answers(opened, merger),
                [self._answer(answer, merger) for _, answer in self.asked],
                references,
                merger,
                self.recipe.tune.gate,
                score,
                drift=kl_divergence(before, log_probs(opened, text, made.first)),
                control=beside,
                left_out=self.data.left_out["held_out"],
            )
            exported = verdict.passed or not self.recipe.tune.gate.refuse
            counts = {name: len(getattr(self.data, name)) for name in self.data.left_out}
            told = {**counts, "left_out": self.data.left_out}
            path = target if exported else None
            tuned = Tuned(path, made, training, verdict, control, told)
            if exported:
                made_by = {name: text for name, text in provenance().items() if name != "command"}
                about = {"recipe": asdict(self.recipe.tune), **made_by, **tuned.to_json()}
                write_about(part, about)
                place_for(target)
                install_folder(part, target)
        return tuned

    def _choose(self) -> Enrichment:
        config = self.recipe.tune
        rules = MiningRules(tokens=config.tokens) if config.tokens else MiningRules()
        data, parts = self.data, ["train", "synthetic"]
        if len(data.synthetic) >= len(data.train):
            # Of prompts it was trained on, a model is surer than it will be of others.
            parts = ["synthetic"]
        rows = [row for part in parts for row in getattr(data, part)]
        self.tell("choosing tokens", 0, None)
        made = choose_tokens(
            (rows, self.steer),
            self.loaded,
            rules,
            wanted=config.tokens,
            own=config.targets == "own",
            boundaries=self._boundaries(parts),
        )
        if not made.expansions:
            raise DataError(
                "nothing in these answers is worth a token",
                got=f"{len(self.rows)} answers; {made.stopped}",
                wanted="runs of tokens that come often",
                fix="more examples, a lower tune.min_token_prob, or leave the vocabulary as it is",
            )
        return made

    def _boundaries(self, parts: Sequence[str]) -> Boundaries | None:
        """Those of the answers of these parts, and of the held-out ones to steer by."""
        found = self.data.boundaries
        if not self.recipe.tune.min_token_prob and not self.recipe.tune.min_ngram_prob:
            return None
        return [places for part in parts for places in found[part]], found["held_out"][::2]

    def _train(self, merger: TokenMerger, name: str) -> TrainResult:
        config = self.recipe.tune
        found = self._boundaries(["train", "synthetic"]) if len(merger) else None
        boundaries, held_boundaries = found or (None, None)
        samples = make_samples(self.rows, merger, config.max_length, boundaries)
        nothing = TokenMerger((), merger.first)
        samples += make_samples(self.data.replay, nothing, config.max_length)
        held_out = make_samples(self.steer, merger, config.max_length, held_boundaries)
        with exclusive(self.loaded[0]):
            model = copy.deepcopy(self.loaded[0])
        return train(model, merger, samples, held_out, config, self.work / name, self.tell)

    def _export(
        self, made: Enrichment, training: TrainResult, merger: TokenMerger, part: Path
    ) -> Any:
        """Write the model, open it again as anyone would, and compare.

        It is stored in the base checkpoint's precision, so that what is judged has been rounded.
        """
        tokenizer, working = self.loaded[1], self.loaded[0].dtype
        training.model.to(stored_dtype(self.loaded[0], self.loaded[2]))
        write_model(training.model, tokenizer, made.expansions, made.first, part)
        write_tokens(made, part)
        prompts = [prompt for prompt, _ in self.asked if prompt is not None]
        compared = [prompt.tolist() for prompt in spread(prompts, _COMPARED)]
        opened, extended = reopen(part, training.model, compared)
        texts = [tokenizer.decode(prompt) for prompt in prompts]
        answers = [self._answer(answer, merger).text for _, answer in self.asked]
        report = check_extension(tokenizer, extended, merger, texts, answers)
        if not report.passed:
            raise TascadeError(
                "the exported tokenizer does not read and write as the base one",
                got=report.failures,
                where=str(part),
                fix="please report this",
            )
        return opened.to(working)

    def _answer(self, ids: IntArray, merger: TokenMerger) -> Answer:
        text = self.loaded[1].decode(merger.unmerge(ids), skip_special_tokens=True)
        return Answer(ids, text)

    def _answers(self, model: Any, merger: TokenMerger) -> list[Answer]:
        decoder = Decoder(Target(model), NoDrafter(), None, self.loaded[1])
        most = self.recipe.max_new_tokens
        params = sampling_params(model, self.ends, limit=most, temperature=0)
        answers = []
        for number, (prompt, _) in enumerate(self.asked):
            self.tell("answering held-out prompts", number, len(self.asked))
            assert prompt is not None
            ids = np.array(decoder.generate(prompt, params).tokens, np.int32)
            answers.append(self._answer(ids, merger))
        return answers

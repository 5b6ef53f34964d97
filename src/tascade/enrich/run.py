"""One run of `tascade tune`, from its lessons on: choose, teach, judge, export."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tascade.config import Recipe
from tascade.core import IntArray, Progress, Row
from tascade.data.prepare import spread
from tascade.decode.exclusive import exclusive
from tascade.decode.loop import Decoder
from tascade.decode.sampling import SamplingParams
from tascade.decode.target import Target
from tascade.draft.budget import NoDrafter
from tascade.enrich.choose import Decided, Enrichment, choose_tokens, write_tokens
from tascade.enrich.distill_data import Lessons
from tascade.enrich.gate import Said, Verdict, judge
from tascade.enrich.kl import divergence, free_text, next_tokens
from tascade.enrich.tokens.check import check_extension
from tascade.enrich.tokens.merger import Merger
from tascade.enrich.tokens.mine import MiningRules
from tascade.enrich.train.distributed import Fleet
from tascade.enrich.train.export import reopen, write_about, write_model
from tascade.enrich.train.quantised import load_quantised
from tascade.enrich.train.samples import merged
from tascade.enrich.train.train import Taught, teach
from tascade.errors import DataError, TascadeError
from tascade.load import stored_dtype
from tascade.pack import provenance
from tascade.util.files import folder_beside, install_folder, write_atomic
from tascade.util.places import place_for

_COMPARED = 3
Score = Callable[[str, str], float]
"""Of an answer against its reference, from 0 to 1."""


@dataclass(frozen=True, slots=True)
class Tuned:
    """What tuning made: where it lies (``None`` if the gate refused it), and how it did.

    ``control``: the model with LoRA alone, if one was asked for; it is not exported. ``lessons``:
    how many answers each part had, and how many prompts were ``left_out`` for want of time.
    """

    path: Path | None
    enrichment: Enrichment
    taught: Taught
    verdict: Verdict
    control: Taught | None = None
    lessons: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """One JSON-ready object."""
        return {
            "path": None if self.path is None else self.path.name,
            "tokens": len(self.enrichment.expansions),
            "predicted_fewer_steps": self.enrichment.fewer_steps,
            "start": self.taught.start,
            "probe": self.taught.probe,
            "steps": len(self.taught.losses),
            "lessons": self.lessons,
            "gate": self.verdict.to_json(),
        }


class TuningRun:
    """One tuning, from its lessons on."""

    def __init__(
        self,
        loaded: tuple[Any, Any, str],
        ends: tuple[int, ...],
        lessons: Lessons,
        recipe: Recipe,
        work: Path,
        tell: Progress,
        fleet: Fleet,
    ) -> None:
        self.loaded, self.ends, self.lessons, self.work = loaded, ends, lessons, work
        self.recipe, self.tell, self.fleet = recipe, tell, fleet
        self.rows: list[Row] = [*lessons.train, *lessons.written]
        self.steer, self.asked = lessons.held_out[::2], lessons.held_out[1::2]

    def finish(self, target: Path, references: Sequence[str], score: Score) -> Tuned:
        """Train, judge, export; the last two on the fleet's first process alone."""
        model, made = self.loaded[0], self._choose()
        merger, nothing = Merger(made.expansions, made.first), Merger((), made.first)
        text = free_text(model, made.first)
        before = next_tokens(model, text, made.first)
        control = self._teach(nothing, "control") if self.recipe.tune.control else None
        taught = self._teach(merger, "tuned")
        verdict_file = self.work / "verdict.json"
        if not self.fleet.first:
            self.fleet.wait()
            verdict = Verdict.from_json(json.loads(verdict_file.read_bytes()))
            return self._tuned(target, made, taught, verdict, control)
        beside = [] if control is None else self._answers(control.model, nothing)
        with folder_beside(target) as part:
            opened = self._export(made, taught, merger, part)
            verdict = judge(
                self._answers(opened, merger),
                [self._said(answer, merger) for _, answer in self.asked],
                references,
                merger,
                self.recipe.tune.gate,
                score,
                drift=divergence(before, next_tokens(opened, text, made.first)),
                control=beside,
                left_out=self.lessons.left_out["held_out"],
            )
            tuned = self._tuned(target, made, taught, verdict, control)
            if tuned.path is not None:
                made_by = {name: text for name, text in provenance().items() if name != "command"}
                about = {"recipe": asdict(self.recipe.tune), **made_by, **tuned.to_json()}
                write_about(part, about)
                place_for(target)
                install_folder(part, target)
        write_atomic(verdict_file, json.dumps(verdict.to_json()).encode())
        self.fleet.wait()
        return tuned

    def _tuned(
        self,
        target: Path,
        made: Enrichment,
        taught: Taught,
        verdict: Verdict,
        control: Taught | None,
    ) -> Tuned:
        exported = verdict.passed or not self.recipe.tune.gate.refuse
        counts = {name: len(getattr(self.lessons, name)) for name in self.lessons.left_out}
        told = {**counts, "left_out": self.lessons.left_out}
        return Tuned(target if exported else None, made, taught, verdict, control, told)

    def _choose(self) -> Enrichment:
        config = self.recipe.tune
        rules = MiningRules(tokens=config.tokens) if config.tokens else MiningRules()
        lessons, parts = self.lessons, ["train", "written"]
        if len(lessons.written) >= len(lessons.train):
            # Of prompts it was trained on, a model is surer than it will be of others.
            parts = ["written"]
        rows = [row for part in parts for row in getattr(lessons, part)]
        decided = None
        if config.sure or config.foretold:
            cuts = [places for part in parts for places in lessons.cuts[part]]
            decided = Decided((cuts, lessons.cuts["held_out"][::2]), config.firm)
        self.tell("choosing tokens", 0, None)
        made = choose_tokens(
            (rows, self.steer),
            self.loaded,
            rules,
            wanted=config.tokens,
            own=config.targets == "own",
            decided=decided,
        )
        if not made.expansions:
            raise DataError(
                "nothing in these answers is worth a token",
                got=f"{len(self.rows)} answers; {made.stopped}",
                wanted="runs of tokens that come often",
                fix="more examples, a lower tune.sure, or leave the vocabulary as it is",
            )
        return made

    def _teach(self, merger: Merger, name: str) -> Taught:
        config = self.recipe.tune
        cuts, held_cuts = None, None
        if (config.sure or config.foretold) and len(merger):
            found = self.lessons.cuts
            cuts, held_cuts = [*found["train"], *found["written"]], found["held_out"][::2]
        samples = merged(self.rows, merger, config.longest, cuts)
        samples += merged(self.lessons.free, Merger((), merger.first), config.longest)
        held_out = merged(self.steer, merger, config.longest, held_cuts)
        base, device, full = self.loaded[0], self.loaded[0].device, None
        with exclusive(base):
            if config.load:
                base.to("cpu")  # the quantised one takes its place meanwhile
                full = copy.deepcopy(base)
                model = load_quantised(self.loaded[2], config.load, device)
            else:
                model = copy.deepcopy(base)
        parts, folder = (samples, held_out), self.work / name
        taught = teach(model, merger, *parts, config, folder, self.tell, self.fleet, full)
        base.to(device)
        taught.model.to(device)
        return taught

    def _export(self, made: Enrichment, taught: Taught, merger: Merger, part: Path) -> Any:
        """Write the model, open it again as anyone would, and compare.

        It is stored in the base checkpoint's precision, so that what is judged has been rounded.
        """
        tokenizer, working = self.loaded[1], self.loaded[0].dtype
        taught.model.to(stored_dtype(self.loaded[0], self.loaded[2]))
        write_model(taught.model, tokenizer, made.expansions, made.first, part)
        write_tokens(made, part)
        prompts = [prompt for prompt, _ in self.asked if prompt is not None]
        compared = [prompt.tolist() for prompt in spread(prompts, _COMPARED)]
        opened, extended = reopen(part, taught.model, compared)
        texts = [tokenizer.decode(prompt) for prompt in prompts]
        answers = [self._said(answer, merger).text for _, answer in self.asked]
        report = check_extension(tokenizer, extended, merger, texts, answers)
        if not report.passed:
            raise TascadeError(
                "the exported tokenizer does not read and write as the base one",
                got=report.failures,
                where=str(part),
                fix="please report this",
            )
        return opened.to(working)

    def _said(self, ids: IntArray, merger: Merger) -> Said:
        text = self.loaded[1].decode(merger.unmerge(ids), skip_special_tokens=True)
        return Said(ids, text)

    def _answers(self, model: Any, merger: Merger) -> list[Said]:
        decoder = Decoder(Target(model), NoDrafter(), None, self.loaded[1])
        most = self.recipe.max_new_tokens
        params = SamplingParams(max_new_tokens=most, end_tokens=self.ends)
        said = []
        for number, (prompt, _) in enumerate(self.asked):
            self.tell("answering held-out prompts", number, len(self.asked))
            assert prompt is not None
            ids = np.array(decoder.generate(prompt, params).tokens, np.int32)
            said.append(self._said(ids, merger))
        return said

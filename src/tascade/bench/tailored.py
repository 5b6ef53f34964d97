"""A pack's tailored heads, as methods of the bench, and counting what they lack."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from tascade.bench.methods import DecoderMethod, Request, VerifiedNodes, restorer
from tascade.core import Drafter, DraftTree, Generation
from tascade.decode.loop import Decoder, NodeBudget
from tascade.decode.loop import Request as Decoding
from tascade.decode.sampling import SamplingParams
from tascade.decode.target import Target
from tascade.decode.verify import Walk
from tascade.draft.budget import NoDrafter
from tascade.draft.measure import measure_cost
from tascade.draft.ngram.mixer_calibration import Calibration
from tascade.errors import ConfigError
from tascade.model import TaskModel
from tascade.tailor.exact import ExactHeadDecoder, Full
from tascade.tailor.tailored import GUARANTEES, Tailored, tailor_pack


class MissCounter(Decoder):
    """As :class:`Decoder`, and looks with the full head at each token's place.

    ``Generation.extra["misses"]`` counts the tokens of an answer in whose place the full head would
    have taken one that the small head has not: none, and the answer is plain decoding's.

    Args:
        target: with a small head.
        full: the full head, with what the model does to its logits.
        drafter, budget, tokenizer: as in :class:`Decoder`.
    """

    def __init__(
        self,
        target: Target,
        drafter: Drafter,
        full: Full,
        budget: NodeBudget | None = None,
        tokenizer: Any = None,
    ) -> None:
        super().__init__(target, drafter, budget, tokenizer)
        if target.head is None:
            raise ConfigError("there is nothing to miss", got="no head", wanted="a small head")
        self.head, self.full = target.head, full

    def commit(self, request: Decoding, base: int, tree: DraftTree, outcome: Walk) -> None:
        """Keep what was accepted; count what the head could not say."""
        rows = [0, *(node + 1 for node in outcome.path)][: len(outcome.tokens)]
        extra, chooser = request.result.extra, request.chooser
        extra.setdefault("misses", 0)
        for i, logits in enumerate(self.full(self.target.states[rows])):
            said = outcome.tokens[:i]
            before = request.prefix(said) if chooser.needs_prefix else _NO_PREFIX
            wanted = chooser.choose(logits, before, len(request.result.tokens) + i)
            extra["misses"] += wanted not in self.head
        super().commit(request, base, tree, outcome)


_NO_PREFIX = torch.empty(1, 0, dtype=torch.long)


HEADS = {
    "tailored-masked": "masked",
    "tailored-exact": "exact",
    "tasc-spec+tailored-exact": "exact",
}
"""Methods of a pack with a tailored vocabulary, and the head each uses."""


@dataclass(slots=True)
class TailoredMethod:
    """Our loop over a tailored head. What its head lacked is counted when it is traced.

    ``misses`` and ``tokens``, of all answers: places where the full head's token is none of the
    head's. An exact head's ``checks``, and the ``full_steps`` it took because guessing did not pay.
    """

    inner: DecoderMethod
    tailored: Tailored
    counts: dict[str, int] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Key of the method in the result."""
        return self.inner.name

    @property
    def guarantee(self) -> str:
        """That of the head."""
        return GUARANTEES[self.tailored.config.head]

    @property
    def settings(self) -> dict[str, Any]:
        """The head's size against the full one's, and what was counted."""
        head = self.tailored.head.union
        sizes = {
            "rows": head.static,
            "of_rows": head.vocab_size,
            "bytes": head.nbytes,
            "of_bytes": head.table.nbytes,
        }
        return {**self.inner.settings, "head": sizes, "counts": self.counts}

    def reset(self) -> None:
        """Reset the method within."""
        self.inner.reset()

    def run(self, request: Request) -> Generation:
        """Decode with the head."""
        return self.inner.run(request)

    def trace(self, requests: Sequence[Request]) -> VerifiedNodes | None:
        """As the method within; counts on the way."""
        decoder = self.inner.decoder
        if self.tailored.config.head == "masked":
            decoder = MissCounter(
                self.tailored.target, decoder.drafter, self.tailored.full, None, decoder.tokenizer
            )
        counting = _Counting(self.inner.name, decoder, self.inner.params)
        nodes = counting.trace(requests)
        self.counts = counting.counts
        return nodes


@dataclass(slots=True)
class _Counting(DecoderMethod):
    counts: dict[str, int] = field(default_factory=dict)

    def run(self, request: Request) -> Generation:
        """Decode, and add up what the decoder says of its head."""
        said = DecoderMethod.run(self, request)
        for key, value in {"tokens": len(said.tokens), **said.extra}.items():
            self.counts[key] = self.counts.get(key, 0) + int(value)
        return said


def tailored_methods(
    task_model: TaskModel, params: SamplingParams, names: Sequence[str]
) -> Iterator[TailoredMethod]:
    """The methods of these names, over heads that the pack's vocabulary makes."""
    for name in names:
        tailored = tailor_pack(task_model.pack, task_model.model, HEADS[name])
        assert tailored is not None
        if name.startswith("tasc-spec"):
            yield _with_drafts(name, task_model, tailored, params)
        else:
            decoder = tailored.decoder(NoDrafter(), None, task_model.tokenizer)
            yield TailoredMethod(_deferring(name, decoder, params), tailored)


def _deferring(
    name: str, decoder: Decoder, params: SamplingParams, calibration: Calibration | None = None
) -> DecoderMethod:
    """A method whose reset also forgets what its decoder has learned of misses and costs."""
    restore = restorer(decoder, calibration)

    def reset() -> None:
        restore()
        if isinstance(decoder, ExactHeadDecoder):
            decoder.schedule = decoder.schedule.fresh()

    return DecoderMethod(name, decoder, params, reset_state=reset)


def _with_drafts(
    name: str, task_model: TaskModel, tailored: Tailored, params: SamplingParams
) -> TailoredMethod:
    calibration = task_model.calibration.copy()
    drafter = task_model.new_drafter(calibration)
    budget = task_model.new_budget(measure_cost(tailored.target))
    decoder = tailored.decoder(drafter, budget, task_model.tokenizer)
    return TailoredMethod(_deferring(name, decoder, params, calibration), tailored)

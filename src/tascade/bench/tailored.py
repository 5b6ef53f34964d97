"""A pack's tailored heads, as methods of the bench."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from tascade.bench.methods import DecoderMethod, Request, restorer
from tascade.bench.trace import VerifiedNodes
from tascade.core import Generation
from tascade.decode.loop import Decoder
from tascade.decode.sampling import SamplingParams
from tascade.draft.budget import NoDrafter
from tascade.draft.ngram.mixer_calibration import Calibration
from tascade.model import TaskModel, measure_cost
from tascade.tailor.exact import DeferredDecoder
from tascade.tailor.tailored import GUARANTEES, Tailored, tailor_pack

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
            decoder = self.tailored.counter(decoder.drafter, decoder.tokenizer)
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
        if isinstance(decoder, DeferredDecoder):
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

"""The training loop: new rows first, then LoRA and rows together; a stopped run goes on."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from tascade.config import TuneConfig
from tascade.core import Progress
from tascade.enrich.train.checkpoint import has_state, load_state, save_state
from tascade.enrich.train.distributed import Fleet
from tascade.enrich.train.lora import lora_parameters, row_parameters
from tascade.enrich.train.loss import AnswerLoss
from tascade.enrich.train.samples import Sample, batches, collate
from tascade.enrich.train.seeding import seeded

_WARM_UP, _LAST, _CLIP = 0.05, 0.1, 1.0
_RATE = 0.4


@dataclass(slots=True)
class Course:
    """Where training stands: steps done, and the loss of each."""

    done: int = 0
    losses: list[float] = field(default_factory=list)


def halves(precision: str, device: torch.device) -> bool:
    """Whether matrices are multiplied in bfloat16: ``auto`` where the device is fast at it."""
    if precision != "auto":
        return precision == "bfloat16"
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return device.type == "cpu" and any(bool(getattr(torch.cpu, c, bool)()) for c in checks)


class Trainer:
    """Trains a PEFT model on samples, one step after another.

    Which samples a step takes follows from ``config.seed`` and its number alone, so that a run
    that was stopped goes on with the very steps it would have taken.

    Args:
        model: see :func:`tascade.enrich.train.lora.wrap`.
        samples: what to learn.
        loss: of a batch.
        config: how long and how fast.
        fleet: the processes that train together.
    """

    def __init__(
        self,
        model: Any,
        samples: Sequence[Sample],
        loss: AnswerLoss,
        config: TuneConfig,
        fleet: Fleet | None = None,
    ) -> None:
        self.model, self.samples, self.loss, self.config = model, samples, loss, config
        self.fleet = fleet or Fleet()
        self.course = Course()
        self.round = math.ceil(len(samples) / config.batch)
        self.lora, self.rows = lora_parameters(model), row_parameters(model)
        self.fleet.align([*self.lora, *self.rows])
        row_steps = config.row_steps if self.rows else 0
        self.row_steps = row_steps
        self.steps = row_steps + config.epochs * self.round
        groups = [{"params": part} for part in (self.lora, self.rows) if part]
        # The wider a model, the smaller a step: LoRA's usual 1e-4 is so much for the width of a 7B.
        self.rate = config.rate or _RATE / model.config.get_text_config().hidden_size
        self.optimizer = torch.optim.AdamW(groups, lr=self.rate, weight_decay=0.0)
        self._precision = torch.autocast(
            model.device.type, torch.bfloat16, enabled=halves(config.precision, model.device)
        )
        self._queue: list[list[Sample]] = []
        self._queue_of = -1

    def run(self, until: int | None = None, tell: Progress | None = None) -> None:
        """Train up to step ``until``, or to the end."""
        end = self.steps if until is None else min(until, self.steps)
        self.model.train()
        while self.course.done < end:
            self.course.losses.append(self.step(self.course.done))
            self.course.done += 1
            if tell is not None:
                tell("tuning", self.course.done, self.steps)
        self.model.eval()

    def run_saving(
        self, folder: Path, tell: Progress | None = None, *, seconds: float = 60.0
    ) -> None:
        """Train to the end, going on from the state in ``folder`` and saving one there."""
        if has_state(folder):
            self.load(folder)
        while self.course.done < self.steps:
            start = time.monotonic()
            self.run(self.course.done + 1, tell)
            while self.course.done < self.steps and time.monotonic() - start < seconds:
                self.run(self.course.done + 1, tell)
            if self.fleet.first:
                self.save(folder)

    @torch.inference_mode()
    def held_out_loss(self, samples: Sequence[Sample]) -> float:
        """Mean loss of samples that nothing was learned from."""
        self.model.eval()
        size, with_base = self.config.batch, self.config.kl > 0
        parts = [samples[at : at + size] for at in range(0, len(samples), size)]
        losses = [
            float(self.loss(self.model, collate(part, with_base=with_base).to(self.model.device)))
            for part in parts
        ]
        return math.fsum(a * len(b) for a, b in zip(losses, parts, strict=True)) / len(samples)

    def step(self, number: int) -> float:
        """One step; returns its loss."""
        alone = number < self.row_steps
        for parameter in self.lora:
            parameter.requires_grad_(not alone)
        rates = self._rates(number)
        for group, rate in zip(self.optimizer.param_groups, rates, strict=False):
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        with seeded(self.config.seed * 1_000_003 + number, self.model.device):
            total = self._learn(self.fleet.part(self._take(number)))
        self.fleet.sum_gradients([*self.lora, *self.rows])
        torch.nn.utils.clip_grad_norm_([*self.lora, *self.rows], _CLIP)
        self.optimizer.step()
        return total

    def _learn(self, samples: Sequence[Sample]) -> float:
        """Gradients of this process's part of a batch; returns the loss of the whole."""
        device, own = self.model.device, sum(len(sample.answer) for sample in samples)
        share = own / self.fleet.total(own, device)
        if not samples:
            return self.fleet.total(0.0, device)
        batch = collate(samples, with_base=self.loss.config.kl > 0)
        with self._precision:
            loss = share * self.loss(self.model, batch.to(device))
        loss.backward()  # type: ignore[no-untyped-call]
        return self.fleet.total(float(loss.detach()), device)

    def save(self, folder: Path) -> None:
        """Write what is needed to go on from here, in place of what the folder holds."""
        save_state(folder, self._named(), self.optimizer, self._about())

    def load(self, folder: Path) -> None:
        """Go on from a saved state.

        Raises:
            ConfigError: it was left by a run with other settings, data or model.
        """
        about = load_state(folder, self._named(), self.optimizer, self._about())
        self.course = Course(int(about["done"]), [float(loss) for loss in about["losses"]])

    def _named(self) -> dict[str, torch.nn.Parameter]:
        return {str(i): p for i, p in enumerate([*self.lora, *self.rows])}

    def _about(self) -> dict[str, Any]:
        settings = asdict(self.config) | {"samples": len(self.samples), "steps": self.steps}
        for name in ("gate", "control"):  # what happens afterwards
            settings.pop(name)
        return {"settings": settings, "done": self.course.done, "losses": self.course.losses}

    def _take(self, number: int) -> list[Sample]:
        which, at = divmod(number, self.round)
        if which != self._queue_of:
            plan = self.config
            self._queue = list(batches(self.samples, plan.batch, plan.seed * 10_007 + which))
            self._queue_of = which
        return self._queue[at % len(self._queue)]

    def _rates(self, number: int) -> tuple[float, float]:
        """Learning rates of LoRA and rows at a step."""
        plan = self.config
        if number < self.row_steps:
            return 0.0, plan.row_rate * min(1.0, (number + 1) / (0.1 * self.row_steps + 1))
        total = max(1, self.steps - self.row_steps)
        done = (number - self.row_steps + 1) / total
        if done < _WARM_UP:
            share = done / _WARM_UP
        else:
            turn = (done - _WARM_UP) / (1.0 - _WARM_UP)
            share = _LAST + 0.5 * (1.0 - _LAST) * (1.0 + math.cos(math.pi * turn))
        return self.rate * share, self.rate * plan.row_factor * share

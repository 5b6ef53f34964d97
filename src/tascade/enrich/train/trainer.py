"""The training loop: new rows first, then LoRA and rows together; a stopped run goes on."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from tascade.config import TuneConfig
from tascade.core import Progress
from tascade.enrich.train.checkpoint import has_state, load_state, save_state
from tascade.enrich.train.lora import lora_parameters, row_parameters
from tascade.enrich.train.samples import Batch, Sample, batches, collate, passes, seeded

EMBEDDING_WARMUP_STEPS = 100
EMBEDDING_LR, EMBEDDING_LR_FACTOR = 5e-3, 5.0
"""New rows learn alone for so many steps, at this rate; then with LoRA, at so many times LoRA's.

As in the experiments before the first release; never varied in benchmarks/tune_pilot.json.
"""
_WARM_UP, _LAST, _CLIP = 0.05, 0.1, 1.0
_RATE = 0.4  # LoRA's usual 1e-4 is so much for the width of a 7B; benchmarks/tune_pilot.json


@dataclass(slots=True)
class TrainState:
    """Where training stands: steps done, and the loss of each."""

    done: int = 0
    losses: list[float] = field(default_factory=list)


def use_bf16(device: torch.device) -> bool:
    """Whether matrices are multiplied in bfloat16: where the device is fast at it."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return device.type == "cpu" and any(bool(getattr(torch.cpu, c, bool)()) for c in checks)


def answer_loss(model: Any, batch: Batch) -> torch.Tensor:
    """Cross-entropy of the answers' tokens, its mean."""
    known = batch.targets >= 0
    return functional.cross_entropy(batch.logits(model)[known].float(), batch.targets[known])


class Trainer:
    """Trains a PEFT model on samples, one step after another.

    Which samples a step takes follows from ``config.seed`` and its number alone, so that a run
    that was stopped goes on with the very steps it would have taken.

    Args:
        model: see :func:`tascade.enrich.train.lora.wrap`.
        samples: what to learn.
        config: how long and how fast.
        warmup_steps: with the rows alone; :data:`EMBEDDING_WARMUP_STEPS` by default.
    """

    def __init__(
        self,
        model: Any,
        samples: Sequence[Sample],
        config: TuneConfig,
        warmup_steps: int | None = None,
    ) -> None:
        self.model, self.samples, self.config = model, samples, config
        self.state = TrainState()
        self.round = math.ceil(len(samples) / config.batch)
        self.lora, self.rows = lora_parameters(model), row_parameters(model)
        warmup = EMBEDDING_WARMUP_STEPS if warmup_steps is None else warmup_steps
        self.warmup_steps = warmup if self.rows else 0
        self.steps = self.warmup_steps + config.epochs * self.round
        groups = [{"params": part} for part in (self.lora, self.rows) if part]
        # The wider a model, the smaller a step.
        self.rate = config.learning_rate or _RATE / model.config.get_text_config().hidden_size
        self.optimizer = torch.optim.AdamW(groups, lr=self.rate, weight_decay=0.0)
        self._precision = torch.autocast(
            model.device.type, torch.bfloat16, enabled=use_bf16(model.device)
        )
        self._queue: list[list[Sample]] = []
        self._queue_of = -1

    def run(self, until: int | None = None, tell: Progress | None = None) -> None:
        """Train up to step ``until``, or to the end."""
        end = self.steps if until is None else min(until, self.steps)
        self.model.train()
        while self.state.done < end:
            self.state.losses.append(self.step(self.state.done))
            self.state.done += 1
            if tell is not None:
                tell("tuning", self.state.done, self.steps)
        self.model.eval()

    def run_saving(
        self, folder: Path, tell: Progress | None = None, *, seconds: float = 60.0
    ) -> None:
        """Train to the end, going on from the state in ``folder`` and saving one there."""
        if has_state(folder):
            self.load(folder)
        while self.state.done < self.steps:
            start = time.monotonic()
            self.run(self.state.done + 1, tell)
            while self.state.done < self.steps and time.monotonic() - start < seconds:
                self.run(self.state.done + 1, tell)
            self.save(folder)

    @torch.inference_mode()
    def held_out_loss(self, samples: Sequence[Sample]) -> float:
        """Mean loss of samples that nothing was learned from."""
        self.model.eval()
        size, device = self.config.batch, self.model.device
        parts = [samples[at : at + size] for at in range(0, len(samples), size)]
        losses = [float(answer_loss(self.model, collate(part).to(device))) for part in parts]
        return math.fsum(a * len(b) for a, b in zip(losses, parts, strict=True)) / len(samples)

    def step(self, number: int) -> float:
        """One step; returns its loss."""
        alone = number < self.warmup_steps
        for parameter in self.lora:
            parameter.requires_grad_(not alone)
        rates = self._rates(number)
        for group, rate in zip(self.optimizer.param_groups, rates, strict=False):
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        device = self.model.device
        samples = self._batch_of_step(number)
        total, told = sum(len(sample.answer) for sample in samples), 0.0
        with seeded(self.config.seed * 1_000_003 + number, device):
            for part in passes(samples) if device.type == "cpu" else [samples]:
                share = sum(len(sample.answer) for sample in part) / total
                with self._precision:
                    loss = share * answer_loss(self.model, collate(part).to(device))
                loss.backward()  # type: ignore[no-untyped-call]
                told += float(loss.detach())
        torch.nn.utils.clip_grad_norm_([*self.lora, *self.rows], _CLIP)
        self.optimizer.step()
        return told

    def save(self, folder: Path) -> None:
        """Write what is needed to go on from here, in place of what the folder holds."""
        save_state(folder, self._named(), self.optimizer, self._about())

    def load(self, folder: Path) -> None:
        """Go on from a saved state.

        Raises:
            ConfigError: it was left by a run with other settings, data or model.
        """
        about = load_state(folder, self._named(), self.optimizer, self._about())
        self.state = TrainState(int(about["done"]), [float(loss) for loss in about["losses"]])

    def _named(self) -> dict[str, torch.nn.Parameter]:
        return {str(i): p for i, p in enumerate([*self.lora, *self.rows])}

    def _about(self) -> dict[str, Any]:
        settings = asdict(self.config) | {"samples": len(self.samples), "steps": self.steps}
        for name in ("gate", "control"):  # what happens afterwards
            settings.pop(name)
        return {"settings": settings, "done": self.state.done, "losses": self.state.losses}

    def _batch_of_step(self, number: int) -> list[Sample]:
        which, at = divmod(number, self.round)
        if which != self._queue_of:
            plan = self.config
            self._queue = list(batches(self.samples, plan.batch, plan.seed * 10_007 + which))
            self._queue_of = which
        return self._queue[at % len(self._queue)]

    def _rates(self, number: int) -> tuple[float, float]:
        """Learning rates of LoRA and rows at a step."""
        if number < self.warmup_steps:
            return 0.0, EMBEDDING_LR * min(1.0, (number + 1) / (0.1 * self.warmup_steps + 1))
        total = max(1, self.steps - self.warmup_steps)
        done = (number - self.warmup_steps + 1) / total
        if done < _WARM_UP:
            share = done / _WARM_UP
        else:
            turn = (done - _WARM_UP) / (1.0 - _WARM_UP)
            share = _LAST + 0.5 * (1.0 - _LAST) * (1.0 + math.cos(math.pi * turn))
        return self.rate * share, self.rate * EMBEDDING_LR_FACTOR * share

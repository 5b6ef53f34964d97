"""Choosing the next token: greedy, or a draw whose noise is fixed by seed, position and token."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import torch

from tascade.core import IntArray, TokenLogprob
from tascade.decode.lm_head import SmallLogits
from tascade.errors import ConfigError

if TYPE_CHECKING:
    from tascade.decode.generation import GenerationRules

Processor = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""A Transformers logits processor: (input_ids [1, T], scores [1, V]) -> scores [1, V]."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How a request is decoded.

    ``temperature`` 0 means greedy. ``stop`` strings end the text just before them. ``seed`` fixes
    every draw: the same seed gives the same words with any drafter, or none. ``logprobs`` asks for
    each token's log-probability, and that of so many most likely ones beside it; ``None`` for none.
    ``skip_special_tokens``: whether the text leaves them out; stop strings are found either way.
    ``max_length``: most tokens of prompt and answer together, 0 for any. ``rules``: what the
    checkpoint asks for beside these.

    Numbers of NumPy are numbers; ``None`` is an option's default.

    Raises:
        ConfigError: an option of another type, or out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    max_new_tokens: int = 256
    max_length: int = 0
    stop: tuple[str, ...] = ()
    end_tokens: tuple[int, ...] = ()
    ignore_end: bool = False
    logprobs: int | None = None
    skip_special_tokens: bool = True
    rules: GenerationRules | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        for option in fields(self):
            if option.name != "rules":
                value = _typed(option.name, getattr(self, option.name), option.default)
                object.__setattr__(self, option.name, value)
        checks = (
            ("temperature", 0 <= self.temperature < math.inf, "0 (greedy) or more"),
            ("top_k", self.top_k >= 0, "0 (off) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1 (off)"),
            ("min_p", 0 <= self.min_p < 1, "0 (off) or more, below 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "above 0 (1 is off)"),
            ("max_new_tokens", self.max_new_tokens >= 1, "1 or more"),
            ("max_length", self.max_length >= 0, "0 (any) or more"),
            ("stop", all(self.stop), "non-empty strings"),
            ("logprobs", self.logprobs is None or self.logprobs >= 0, "0 or more, or none"),
        )
        for name, sound, wanted in checks:
            if not sound:
                raise ConfigError(
                    f"{name} is out of range", got=getattr(self, name), wanted=wanted, where=name
                )


def _typed(name: str, value: Any, default: Any) -> Any:
    """An option's value as its own type: nothing is rounded, and nothing is made of text."""
    if value is None:
        return default
    wanted: type = int if name == "logprobs" else type(default)
    try:
        if wanted is tuple:
            inner = str if name == "stop" else int
            many = (value,) if isinstance(value, str | int) else value
            return tuple(_as(inner, one) for one in many)
        return _as(wanted, value)
    except TypeError:
        kinds = {int: "a whole number", float: "a number", bool: "true or false"}
        wish = {"stop": "text, or a list of texts", "end_tokens": "token ids"}
        raise ConfigError(
            f"{name} is of another type",
            got=f"{value!r:.80} ({type(value).__name__})",
            wanted=wish.get(name) or kinds[wanted],
            where=name,
        ) from None


def _as(kind: type, value: Any) -> Any:
    is_flag = isinstance(value, bool) or type(value).__name__ == "bool"
    if is_flag != (kind is bool) or (kind is str) != isinstance(value, str):
        raise TypeError
    if kind is float and not hasattr(value, "__float__"):
        raise TypeError
    return operator.index(value) if kind is int else kind(value)


def argmax_rows(logits: torch.Tensor) -> list[int]:
    """The largest logit's index in every row of ``logits`` [N, V], the first one in a tie."""
    if logits.device.type == "cpu":  # torch is 16 times slower here in half precision
        found: list[int] = logits.float().numpy().argmax(-1).tolist()
        return found
    return [int(i) for i in logits.argmax(-1).tolist()]


def argmax_of(logits: torch.Tensor | SmallLogits) -> Callable[[int], int]:
    """Tells the largest logit's index in a row of ``logits`` [N, V], the first one in a tie.

    A walk through a draft tree visits few of its rows. A CPU looks at those alone: 64 rows of
    151,936 logits in bfloat16 take 25 ms, the eight that are visited 0.8 ms. A GPU takes all rows
    at once, since each look at one of them would wait for the device.
    """

    def some(rows: slice) -> list[int]:
        if isinstance(logits, torch.Tensor):
            return argmax_rows(logits[rows])
        return logits.argmax_rows(rows)

    if logits.device.type == "cpu":
        return lambda row: some(slice(row, row + 1))[0]
    return some(slice(None)).__getitem__


class Sampler:
    """Turns logits into the token that plain decoding takes at that place.

    The choice depends on the logits, the tokens before and the position alone, never on how the
    logits were computed: a speculative run therefore takes the very tokens a plain run takes.
    """

    def __init__(
        self,
        params: SamplingParams,
        processors: Sequence[Processor] = (),
        prompt: IntArray | None = None,
    ) -> None:
        self.params = params
        self.given = tuple(processors)
        self.sampled = params.temperature > 0
        self.needs_prefix = bool(processors) or params.repetition_penalty != 1.0
        self._processors = [*processors, *_warpers(params)]
        if params.rules is not None and prompt is not None:
            self._processors = params.rules.processors(prompt, params, self.given)
            self.needs_prefix = True

    @property
    def is_argmax(self) -> bool:
        """Whether the choice is the largest raw logit."""
        return not self.sampled and not self._processors

    def scores(self, logits: torch.Tensor, prefix: torch.Tensor) -> torch.Tensor:
        """Processed scores [V] for one row of ``logits`` [V]; ``prefix``: [1, T] ids before it."""
        row = logits.float()[None]
        if self._processors and row.data_ptr() == logits.data_ptr():
            row = row.clone()  # some write in place, and others read these logits
        for process in self._processors:
            row = process(prefix, row)
        return row[0]

    def choose(self, logits: torch.Tensor, prefix: torch.Tensor, position: int) -> int:
        """The next token id. ``logits``: [V]; ``position``: index of the token in the output."""
        row = self.scores(logits, prefix)
        if not self.sampled:
            return int(row.argmax())
        kept = torch.nonzero(row > torch.finfo(row.dtype).min)[:, 0]
        noisy = row[kept].double() + gumbel(self.params.seed, position, kept)
        return int(kept[noisy.argmax()])


def log_probability(logits: torch.Tensor, token: int, top: int) -> TokenLogprob:
    """What the model itself gave ``token``: from its raw ``logits`` [V], before any processing."""
    values = torch.log_softmax(logits.float(), -1)
    best = torch.topk(values, min(top, len(values))) if top else None
    others = zip(best.indices.tolist(), best.values.tolist(), strict=True) if best else ()
    return TokenLogprob(token, float(values[token]), tuple(others))


def _warpers(params: SamplingParams) -> list[Any]:
    from transformers.generation import logits_process as lp

    out: list[Any] = []
    if params.repetition_penalty != 1.0:
        out.append(lp.RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    if params.temperature <= 0:
        return out
    if params.temperature != 1.0:
        out.append(lp.TemperatureLogitsWarper(float(params.temperature)))
    if params.top_k > 0:
        out.append(lp.TopKLogitsWarper(params.top_k))
    if params.top_p < 1.0:
        out.append(lp.TopPLogitsWarper(params.top_p))
    if params.min_p > 0.0:
        out.append(lp.MinPLogitsWarper(params.min_p))
    return out


def gumbel(seed: int, position: int, ids: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise, one value for each (seed, position, id). ``ids``: [K] int64.

    The largest of ``scores + noise`` is a draw from ``softmax(scores)`` (the Gumbel-max trick).
    Each value is a hash (splitmix64, Steele et al. 2014), so it does not depend on what else is
    asked for, in which order, or on which device.
    """
    key = _mix64(torch.tensor([_signed(seed)], dtype=torch.int64, device=ids.device))
    key = _mix64(key ^ _signed(position * 0x9E3779B97F4A7C15))
    bits = _mix64(key + ids * _signed(0xD1342543DE82EF95))
    uniform = (_shift(bits, 11).double() + 0.5) * 2.0**-53
    return -torch.log(-torch.log(uniform))


def _mix64(x: torch.Tensor) -> torch.Tensor:
    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ _shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift(x, 31)


def _shift(x: torch.Tensor, by: int) -> torch.Tensor:
    return (x >> by) & ((1 << (64 - by)) - 1)


def _signed(x: int) -> int:
    x &= (1 << 64) - 1
    return x - (1 << 64) if x >= 1 << 63 else x

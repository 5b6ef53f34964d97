"""tascade inside Transformers: users keep their own call to ``model.generate``.

    fast = speculative_generate(task_model)
    model.generate(**inputs, max_new_tokens=200, custom_generate=fast)

``generate`` prepares everything as always (generation config, logits processors, stopping
criteria) and hands it to the function; the tokens then come from tascade's loop. Greedy output is
token for token what ``generate`` gives without it. Sampled output follows the same distribution,
with tascade's own draws: the same ``seed`` gives the same words with any drafter, or none.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any, Protocol

import numpy as np
import torch
from transformers import GenerationMixin
from transformers.generation import logits_process, stopping_criteria
from transformers.generation.utils import GenerateDecoderOnlyOutput

from tascade.core import Generation
from tascade.decode.generation import NOT_DONE
from tascade.decode.loop import Decoder
from tascade.decode.sampling import Processor, SamplingParams
from tascade.decode.stop import ExtraStop
from tascade.errors import ConfigError
from tascade.tailor.exact import ExactHeadDecoder

_RETURNED = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
_KNOWN_INPUTS = (
    "attention_mask",
    "position_ids",
    "cache_position",
    "past_key_values",
    "use_cache",
    "logits_to_keep",
)
"""Model inputs that ``generate`` itself prepares for plain text."""

_WHOLE_BATCH = (
    "PrefixConstrainedLogitsProcessor",
    "EncoderRepetitionPenaltyLogitsProcessor",
    "EncoderNoRepeatNGramLogitsProcessor",
    "SynthIDTextWatermarkLogitsProcessor",
)
"""Processors that hold something for each row of the batch, so cannot be run on one row."""


class HasDecoder(Protocol):
    """What a :class:`tascade.TaskModel` has."""

    @property
    def decoder(self) -> Decoder:
        """The speculative loop."""
        ...


@dataclass(frozen=True, slots=True)
class _Row:
    """One prompt of the batch: ``ids`` [1, T] as given, ``lead`` [1, P] its left padding."""

    ids: torch.Tensor
    lead: torch.Tensor

    @property
    def prompt(self) -> list[int]:
        tokens: list[int] = self.ids[0, self.lead.shape[1] :].tolist()
        return tokens


@dataclass(frozen=True, slots=True)
class _Plan:
    """What ``generate`` was asked for, in the loop's terms."""

    params: Callable[[int], SamplingParams]
    processor: Processor | None
    criteria: stopping_criteria.StoppingCriteriaList


def speculative_generate(task_model: Decoder | HasDecoder) -> Callable[..., Any]:
    """Make the function to pass as ``model.generate(..., custom_generate=...)``.

    Beside the options of ``generate`` the call then takes ``seed=``, which fixes the draws of
    ``do_sample=True`` (without it ``torch.manual_seed`` governs them). A batch is decoded row by
    row; row ``r`` is drawn with ``seed + r``, and stopping criteria and logits processors are
    shown one row at a time. ``stop_strings`` uses the task model's tokenizer and must be an
    argument of ``generate``, not part of a ``GenerationConfig``.

    Args:
        task_model: a ``TaskModel``, or a :class:`~tascade.decode.loop.Decoder`, of the very model
            whose ``generate`` is called.

    Raises:
        ConfigError: not such an object; when called, another model or an option that cannot be
            honoured, which it names.
    """
    decoder = (
        task_model if isinstance(task_model, Decoder) else getattr(task_model, "decoder", None)
    )
    if not isinstance(decoder, Decoder):
        raise ConfigError(
            "no decoder to generate with", got=type(task_model).__name__, wanted="a TaskModel"
        )

    def tascade_generate(
        model: Any,
        input_ids: torch.Tensor,
        logits_processor: logits_process.LogitsProcessorList,
        stopping_criteria: stopping_criteria.StoppingCriteriaList,
        generation_config: Any,
        seed: int | None = None,
        stop_strings: str | list[str] | None = None,
        **model_kwargs: Any,
    ) -> Any:
        streamer = _callers("streamer", model_kwargs)
        if _callers("assistant_model", model_kwargs) is not None:
            raise _refusal("assistant_model", "an assistant model", "none")
        _check_model(decoder, model)
        _check_options(generation_config)
        rows = _rows(input_ids, model_kwargs)
        criteria = _with_stop_strings(stopping_criteria, stop_strings, decoder)
        if len(rows) > 1:
            _check_batch(logits_processor, criteria, streamer)
        plan = _plan(generation_config, logits_processor, criteria, input_ids.shape[1], seed)
        results = [_decode(decoder, plan, row, r, streamer) for r, row in enumerate(rows)]
        if streamer is not None:
            streamer.end()
        sequences = _join(input_ids, results, generation_config)
        if generation_config.return_dict_in_generate:
            return GenerateDecoderOnlyOutput(sequences=sequences)
        return sequences

    return tascade_generate


def _callers(name: str, model_kwargs: dict[str, Any]) -> Any:
    """An argument that ``generate`` was given but does not hand to a callable.

    Up to at least 5.23 it drops ``streamer`` and ``assistant_model`` when ``custom_generate`` is a
    function, so they are read where ``generate`` keeps them: a streamer that is never ended would
    leave its reader waiting for ever.
    """
    passed = model_kwargs.pop(name, None)
    code = inspect.unwrap(GenerationMixin.generate).__code__
    frame: FrameType | None = sys._getframe(1)
    while passed is None and frame is not None:
        if frame.f_code is code:
            return frame.f_locals.get(name)
        frame = frame.f_back
    return passed


def _refusal(option: str, got: object, wanted: str, fix: str = "") -> ConfigError:
    return ConfigError(
        f"speculative_generate cannot honour {option}",
        got=got,
        wanted=wanted,
        where=option,
        fix=fix or "leave it out, or call generate without custom_generate",
    )


def _check_model(decoder: Decoder, model: Any) -> None:
    if decoder.target.model is not model:
        raise ConfigError(
            "generate was called on another model than the task model's",
            got=f"{type(model).__name__} (another object)",
            wanted=f"the {type(decoder.target.model).__name__} the task model was made with",
            where="custom_generate",
            fix="call task_model.model.generate(...), or make a task model with this model",
        )


def _check_options(config: Any) -> None:
    for option, neutral in NOT_DONE.items():
        value = getattr(config, option, None)
        if value not in neutral:
            raise _refusal(option, value, " or ".join(map(str, neutral)))
    if getattr(config, "cache_implementation", None) == "quantized":
        raise _refusal("cache_implementation", "quantized", "any other cache, or none named")
    if config.return_dict_in_generate:
        for option in _RETURNED:
            if getattr(config, option, None):
                raise _refusal(option, True, "False")


def _check_batch(processors: Any, criteria: Any, streamer: Any) -> None:
    """Refuse what rows that are decoded one after the other cannot do as one batch does."""
    if streamer is not None:
        raise _refusal("streamer", "a batch of several rows", "one row")
    for processor in processors:
        if type(processor).__name__ in _WHOLE_BATCH:
            raise _refusal("logits_processor", type(processor).__name__, "one row at a time")
    ragged = any(type(c) is not stopping_criteria.MaxLengthCriteria for c in criteria)
    if ragged and not any(hasattr(c, "eos_token_id") for c in criteria):
        raise _refusal(
            "stopping_criteria",
            "rows that may stop at different places, and no end token",
            "an end token, after which rows are padded",
            "pass eos_token_id and pad_token_id, or one row at a time",
        )


def _rows(input_ids: torch.Tensor, inputs: dict[str, Any]) -> list[_Row]:
    """The batch [B, T] as rows. Refuses inputs that plain token ids behind padding do not give."""
    for name, value in inputs.items():
        if value is not None and name not in _KNOWN_INPUTS:
            raise _refusal(name, "a model input", "input_ids and attention_mask alone")
    cache = inputs.get("past_key_values")
    if cache is not None and (getattr(cache, "_is_user_defined", False) or cache.get_seq_length()):
        raise _refusal("past_key_values", "a cache of the caller's", "none")
    mask = inputs.get("attention_mask")
    mask = torch.ones_like(input_ids) if mask is None else mask.to(input_ids.device).long()
    padding = (mask == 0).sum(1)
    width = input_ids.shape[1]
    left = torch.arange(width, device=mask.device)[None] >= padding[:, None]
    if mask.shape != input_ids.shape or width == 0 or not torch.equal(mask, left.long()):
        raise _refusal("attention_mask", "gaps or padding on the right", "padding on the left only")
    if bool((padding == width).any()):
        raise _refusal("attention_mask", "a row without a token", "at least one token a row")
    given = inputs.get("position_ids")
    if given is not None:
        usual = (mask.cumsum(1) - 1).clamp(min=0)
        if not torch.equal(given.to(mask.device).expand_as(usual), usual):
            raise _refusal("position_ids", "positions of the caller's", "none")
    return [
        _Row(input_ids[r : r + 1], input_ids[r : r + 1, :p]) for r, p in enumerate(padding.tolist())
    ]


def _with_stop_strings(criteria: Any, stop: str | list[str] | None, decoder: Decoder) -> Any:
    if stop is None:
        return criteria
    if decoder.tokenizer is None:
        raise _refusal("stop_strings", "a decoder without a tokenizer", "a tokenizer")
    rule = stopping_criteria.StopStringCriteria(decoder.tokenizer, stop)
    return stopping_criteria.StoppingCriteriaList([*criteria, rule])


def _plan(config: Any, processors: Any, criteria: Any, width: int, seed: int | None) -> _Plan:
    """Length and end tokens become the loop's own; other criteria are asked after each token.

    The processors ``generate`` prepared hold the penalties and warpers already: ours stay neutral,
    and temperature 1 only says that the token is drawn.
    """
    limits, ends, others = [config.max_length], [], []
    for rule in criteria:
        if type(rule) is stopping_criteria.MaxLengthCriteria:
            limits.append(rule.max_length)
        elif type(rule) is stopping_criteria.EosTokenCriteria:
            ends += rule.eos_token_id.tolist()
        else:
            others.append(rule)
    most = max(1, min(limit for limit in limits if limit is not None) - width)
    if config.do_sample and seed is None:
        seed = int(torch.randint(2**63 - 1, (1,)).item())

    def params(row: int) -> SamplingParams:
        return SamplingParams(
            temperature=1.0 if config.do_sample else 0.0,
            seed=(seed or 0) + row,
            max_new_tokens=most,
            end_tokens=tuple(ends),
        )

    rules = stopping_criteria.StoppingCriteriaList(others)
    return _Plan(params, processors if len(processors) else None, rules)


def _decode(decoder: Decoder, plan: _Plan, row: _Row, number: int, streamer: Any) -> Generation:
    def put(tokens: list[int]) -> None:
        for token in tokens:
            streamer.put(torch.tensor([token]))

    params = plan.params(number)
    with decoder.target.lock:
        _check_ends(decoder, row, params)
        return decoder.generate(
            row.prompt,
            params,
            [] if plan.processor is None else [_behind(row.lead, plan.processor)],
            None if streamer is None else put,
            _extra_stop(row, plan.criteria),
        )


def _check_ends(decoder: Decoder, row: _Row, params: SamplingParams) -> None:
    """Refuse an end token that a masked head cannot say: answers would silently run on."""
    head = decoder.target.head
    if head is None or isinstance(decoder, ExactHeadDecoder):
        return
    decoder.target.begin(np.asarray(row.prompt, np.int32))
    if lacking := [end for end in params.end_tokens if end >= 0 and end not in head]:
        raise _refusal(
            "eos_token_id",
            f"{lacking}, neither in the task's list nor in the prompt",
            "end tokens that the masked head has",
            'use head="exact", or end tokens that the pack was made with',
        )


def _behind(lead: torch.Tensor, process: Processor) -> Processor:
    """The processor as ``generate`` runs it: it sees the row's left padding too."""

    def padded(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return process(torch.cat([lead, ids.to(lead.device)], 1), scores)

    return process if lead.shape[1] == 0 else padded


def _extra_stop(row: _Row, criteria: Any) -> ExtraStop | None:
    def stop(output: Sequence[int]) -> bool:
        new = torch.tensor([output], dtype=row.ids.dtype, device=row.ids.device)
        return bool(criteria(torch.cat([row.ids, new], 1), None).any())

    return stop if len(criteria) else None


def _join(input_ids: torch.Tensor, results: Sequence[Generation], config: Any) -> torch.Tensor:
    """Prompts and outputs side by side, short rows padded on the right: [B, T + longest]."""
    longest = max(len(result.tokens) for result in results)
    ends = config.eos_token_id
    pad = config.pad_token_id
    if pad is None:
        pad = ends[0] if isinstance(ends, list) else ends
    if pad is None and any(len(result.tokens) < longest for result in results):
        raise _refusal("pad_token_id", None, "an id to fill short rows with", "pass pad_token_id")
    padded = [[*r.tokens, *[pad] * (longest - len(r.tokens))] for r in results]
    output = torch.tensor(padded, dtype=input_ids.dtype, device=input_ids.device)
    return torch.cat([input_ids, output], 1)

"""What a checkpoint's ``generation_config.json`` asks for, as ``model.generate`` honours it.

Explicit options win over the file, and the file over this library's defaults. Processors are those
that Transformers builds from the file, in its order.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch

from tascade.config import DEFAULT_NEW_TOKENS
from tascade.core import IntArray
from tascade.decode.aliases import answers_to, own_names
from tascade.decode.sampling import SamplingParams
from tascade.errors import ConfigError

NOT_DONE: dict[str, tuple[object, ...]] = {
    "num_beams": (None, 1),
    "num_return_sequences": (None, 1),
    "num_beam_groups": (None, 1),
    "constraints": (None,),
    "force_words_ids": (None,),
    "penalty_alpha": (None, 0, 0.0),
    "dola_layers": (None,),
    "prompt_lookup_num_tokens": (None,),
    "assistant_early_exit": (None,),
    "use_mtp": (None, False),
    "guidance_scale": (None, 1, 1.0),
}
"""Fields of ``GenerationConfig`` that no loop here does, with the values that switch them off."""
REFUSED = NOT_DONE | {"max_time": (None,), "token_healing": (None, False)}
"""And those that ``model.generate`` does before or around a loop, where it is not called."""
OWN = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_new_tokens")
"""Fields that are sampling options of this library under the same names."""
PROCESSED = (
    "encoder_repetition_penalty",
    "encoder_no_repeat_ngram_size",
    "no_repeat_ngram_size",
    "bad_words_ids",
    "sequence_bias",
    "suppress_tokens",
    "begin_suppress_tokens",
    "min_length",
    "min_new_tokens",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "exponential_decay_length_penalty",
    "remove_invalid_values",
    "renormalize_logits",
    "watermarking_config",
    "top_h",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
)
"""Fields that Transformers makes logits processors of."""
OTHERS = ("do_sample", "max_length", "stop_strings", "eos_token_id")
"""Fields that are honoured in ways of their own."""
IGNORED = (
    "pad_token_id", "bos_token_id", "decoder_start_token_id", "use_cache", "cache_implementation",
    "cache_config", "max_cache_len", "disable_compile", "compile_config", "prefill_chunk_size",
    "low_memory", "output_attentions", "output_hidden_states", "output_scores", "output_logits",
    "return_dict_in_generate", "early_stopping", "length_penalty", "diversity_penalty",
    "is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule",
    "assistant_confidence_threshold", "max_matching_ngram_size", "assistant_lookbehind",
    "target_lookbehind", "assistant_ensemble_weight", "speculation_type",
    "continuous_batching_config", "transformers_version",
)  # fmt: skip
"""Fields that change no answer of a loop without beams: for caches, outputs and assistants."""
_UNNEEDED = tuple(
    name for name in IGNORED if not name.startswith("output_") and name != "return_dict_in_generate"
)
"""Those of them that a caller may pass: they change nothing of what is returned either."""
_GREEDY = ("repetition_penalty", "max_new_tokens")
_SAMPLED_TOP_K = 50
"""What Transformers draws from where a checkpoint samples and does not say from how many."""


class GenerationRules:
    """The generation config of a model, with what a caller says otherwise.

    Args:
        model: whose ``generation_config`` it is.
        options: fields of :data:`PROCESSED` that are to be others.
    """

    def __init__(self, model: Any, options: Mapping[str, Any] | None = None) -> None:
        self._model = model
        config = getattr(model, "generation_config", None)
        if config is None:
            from transformers import GenerationConfig

            config = GenerationConfig()
        if options:
            config = copy.copy(config)  # the model's own stays as it is
        for name, value in (options or {}).items():
            setattr(config, name, value)
        self.config = config

    def check(self) -> None:
        """Refuse what cannot be honoured.

        Raises:
            ConfigError: naming the field.
        """
        config = self.config
        for name, neutral in REFUSED.items():
            value = getattr(config, name, None)
            if value not in neutral:
                _refuse(name, value, " or ".join(str(n) for n in neutral if n is not None))
        mark = getattr(config, "watermarking_config", None)
        if type(mark).__name__ == "SynthIDTextWatermarkingConfig":
            _refuse("watermarking_config", "SynthID, which keeps a state", "a green-list watermark")

    def defaults(self) -> dict[str, Any]:
        """Sampling options that the file sets, under this library's names."""
        config = self.config
        names = OWN if config.do_sample else _GREEDY
        said = {n: v for n in names if (v := getattr(config, n, None)) is not None}
        if config.do_sample:
            said = {"temperature": 1.0, "top_k": _SAMPLED_TOP_K} | said
        if config.max_length is not None and config.max_new_tokens is None:
            said["max_length"] = config.max_length
        if stops := getattr(config, "stop_strings", None):
            said["stop"] = (stops,) if isinstance(stops, str) else tuple(stops)
        return said

    @property
    def needs_processors(self) -> bool:
        """Whether it asks for more than this library's own sampling options."""
        found = (getattr(self.config, name, None) for name in PROCESSED)
        return any(value is not None and value is not False for value in found)

    def processors(
        self, prompt: IntArray, params: SamplingParams, given: Sequence[Any]
    ) -> list[Any]:
        """Logits processors for one request, those of the caller among them.

        Args:
            prompt: [T] its token ids.
            params: its options.
            given: the caller's.

        Raises:
            ConfigError: a field that Transformers refuses.
        """
        config, device = copy.copy(self.config), self._model.device
        config.do_sample = params.temperature > 0
        config.temperature = params.temperature or None
        config.top_k, config.top_p = params.top_k, params.top_p
        config.min_p = params.min_p or None
        config.repetition_penalty = params.repetition_penalty
        config.max_length = len(prompt) + params.max_new_tokens
        ends = () if params.ignore_end else params.end_tokens
        config._eos_token_tensor = torch.tensor(ends, device=device) if ends else None
        ids = torch.as_tensor(prompt, dtype=torch.long, device=device)[None]
        try:
            made = self._model._get_logits_processor(
                config,
                input_ids_seq_length=len(prompt),
                encoder_input_ids=ids,
                logits_processor=list(given),
                device=device,
                model_kwargs={},
            )
        except (ValueError, TypeError, AttributeError) as error:
            raise ConfigError(
                "the model's generation config cannot be honoured",
                got=error,
                wanted="values that model.generate takes",
                where="generation_config",
            ) from error
        return list(made)


def sampling_params(
    model: Any, end_tokens: Sequence[int], limit: int, **options: Any
) -> SamplingParams:
    """How a model is asked: what the caller says, then its checkpoint, then the defaults.

    Args:
        model: whose ``generation_config`` is honoured.
        end_tokens: the model's.
        limit: most new tokens where neither caller nor checkpoint give one.
        options: fields of :class:`SamplingParams`, ``do_sample``, and those fields of
            ``GenerationConfig`` that Transformers makes logits processors of, or that change no
            answer. ``None`` is the checkpoint's. Names of OpenAI and Transformers that mean the
            same are taken (:data:`tascade.decode.aliases.SAME`).

    Raises:
        ConfigError: an unknown option, one of another type or out of range, or a field of the
            checkpoint's that cannot be honoured.
    """
    given = own_names({name: value for name, value in options.items() if value is not None})
    given = {name: value for name, value in given.items() if not _changes_nothing(name, value)}
    changed = {n: given.pop(n) for n in PROCESSED if n in given}
    sample = _truth("do_sample", given.pop("do_sample", None))
    rules = GenerationRules(model, changed | ({"do_sample": True} if sample else {}))
    rules.check()
    said = rules.defaults()
    if sample is False or given.get("temperature") == 0:
        said = {n: v for n, v in said.items() if n in (*_GREEDY, "stop", "max_length")}
        given["temperature"] = 0.0
    if "max_new_tokens" in given:  # as in Transformers, the other limit then says nothing
        said.pop("max_length", None)
    if "max_new_tokens" in said and limit != DEFAULT_NEW_TOKENS:  # a recipe's own limit holds too
        said["max_new_tokens"] = min(int(said["max_new_tokens"]), limit)
    merged = {"max_new_tokens": limit, "end_tokens": end_tokens, **said, **given}
    known = {f.name for f in fields(SamplingParams)} - {"rules"}
    if unknown := sorted(set(merged) - known):
        raise ConfigError(
            "unknown sampling option",
            got=", ".join(unknown),
            wanted=", ".join(sorted([*known, "do_sample", *PROCESSED])),
            fix=answers_to(unknown) or _near(unknown, known | {"do_sample", *PROCESSED}),
        )
    return SamplingParams(**merged, rules=rules if rules.needs_processors else None)


def _near(unknown: Sequence[str], known: Iterable[str]) -> str:
    """What was probably meant by the first of these names."""
    near = difflib.get_close_matches(unknown[0], sorted(known), 1)
    return f"did you mean {near[0]}?" if near else ""


def _changes_nothing(name: str, value: object) -> bool:
    """Whether an option of Transformers asks for nothing that is not done anyway."""
    return name in _UNNEEDED or value in REFUSED.get(name, ())


def _truth(name: str, value: object) -> bool | None:
    if value is None or isinstance(value, bool):
        return value
    raise ConfigError(
        f"{name} is of another type", got=f"{value!r:.80}", wanted="true or false", where=name
    )


def _refuse(name: str, got: object, wanted: str) -> None:
    raise ConfigError(
        f"the model's generation config asks for {name}, which tascade does not do",
        got=got,
        wanted=wanted or "nothing",
        where=f"generation_config.{name}",
        fix=f"set model.generation_config.{name} = None, or remove it from generation_config.json",
    )

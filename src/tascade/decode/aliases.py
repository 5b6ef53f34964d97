"""What a request's options are called elsewhere: taken where they mean the same, else answered."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from tascade.errors import ConfigError

SAME = {
    "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
    "eos_token_id": "end_tokens",
    "ignore_eos": "ignore_end",
}
"""Names of OpenAI, Transformers and vLLM, and this library's for the same."""
_EACH = "call generate once for each, with seed=0, seed=1, ..."
_STREAM = "for piece in tm.stream(prompt): ..."
_RUN = "tm.run(prompt) returns tokens, text, logprobs and timings"
_UNLIKE = "there is repetition_penalty=..., which is another measure"
ANSWERS = {
    "num_return_sequences": _EACH,
    "n": _EACH,
    "best_of": _EACH,
    "num_beams": "beams are model.generate's: one answer at a time is decoded here",
    "stop_strings": "stop=[...], which the text ends before",
    "top_logprobs": "logprobs=5 asks for as many",
    "logits_processor": "processors=[...]",
    "stopping_criteria": "stop=[...] or end_tokens=[...]; or leave the loop over tm.stream(prompt)",
    "stream": _STREAM,
    "streamer": _STREAM,
    "return_dict_in_generate": _RUN,
    "output_scores": _RUN,
    "output_logits": _RUN,
    "output_attentions": _RUN,
    "output_hidden_states": _RUN,
    "messages": "the prompt is the first argument: tm.generate(messages)",
    "inputs": "the prompt is the first argument, as text or messages",
    "input_ids": "the prompt is text or messages; tm.steps(ids, tm.params()) takes token ids",
    "attention_mask": "a prompt is decoded without padding, and needs none",
    "generation_config": "set model.generation_config, or pass its fields",
    "assistant_model": "TaskModel.from_pretrained(pack, assistant=...)",
    "frequency_penalty": _UNLIKE,
    "presence_penalty": _UNLIKE,
    "logit_bias": "sequence_bias=[[[token], bias], ...]",
    "tools": "chat.tools in the recipe that the pack is made with",
}
"""What to write instead of options that have no counterpart of the same meaning."""


def own_names(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options under this library's names; those that are unknown keep theirs.

    Raises:
        ConfigError: one option under two names.
    """
    found: dict[str, Any] = {}
    given: dict[str, str] = {}
    for name, value in options.items():
        own = SAME.get(name, name)
        if own in found:
            raise ConfigError(
                "one option under two names",
                got=f"{given[own]} and {name}",
                wanted=own,
                where=name,
            )
        found[own], given[own] = value, name
    return found


def answers_to(names: Iterable[str]) -> str:
    """What to write instead of these names, as far as there is an answer."""
    return "; ".join(f"{name}: {ANSWERS[name]}" for name in names if name in ANSWERS)

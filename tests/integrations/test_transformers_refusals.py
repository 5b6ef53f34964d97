"""generate() with the hook names what it cannot honour, rather than ignore it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import DynamicCache, StoppingCriteriaList
from transformers.generation import MaxTimeCriteria
from transformers.generation.streamers import BaseStreamer

from tascade.decode.loop import Decoder
from tascade.decode.target import Target
from tascade.draft.budget import NoDrafter
from tascade.errors import ConfigError
from tascade.integrations.transformers import speculative_generate
from tascade.testing import tiny_model

PROMPT = [5, 9, 2, 7, 5, 9, 2, 7, 5]


class Silent(BaseStreamer):
    def put(self, value: torch.Tensor) -> None:
        pass

    def end(self) -> None:
        pass


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny_model("llama", seed=3)


@pytest.fixture(scope="module")
def fast(llama: Any) -> Callable[..., Any]:
    return speculative_generate(Decoder(Target(llama), NoDrafter()))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("num_beams", 3),
        ("prompt_lookup_num_tokens", 4),
        ("guidance_scale", 2.0),
        ("penalty_alpha", 0.6),
    ],
)
def test_options_it_cannot_honour_are_named(
    llama: Any, fast: Any, option: str, value: object
) -> None:
    with pytest.raises(ConfigError, match=option):
        llama.generate(
            torch.tensor([PROMPT]), max_new_tokens=4, custom_generate=fast, **{option: value}
        )


def test_several_sequences_for_a_prompt_are_refused(llama: Any, fast: Any) -> None:
    with pytest.raises(ConfigError, match="num_return_sequences"):
        llama.generate(
            torch.tensor([PROMPT]),
            max_new_tokens=4,
            do_sample=True,
            num_return_sequences=2,
            custom_generate=fast,
        )


@pytest.mark.parametrize("option", ["output_scores", "output_logits", "output_hidden_states"])
def test_outputs_it_does_not_keep_are_refused(llama: Any, fast: Any, option: str) -> None:
    options = {option: True, "return_dict_in_generate": True}
    with pytest.raises(ConfigError, match=option):
        llama.generate(torch.tensor([PROMPT]), max_new_tokens=4, custom_generate=fast, **options)


def test_an_assistant_or_a_cache_of_the_callers_is_refused(llama: Any, fast: Any) -> None:
    ids = torch.tensor([PROMPT])
    with pytest.raises(ConfigError, match="assistant_model"):
        llama.generate(ids, max_new_tokens=4, custom_generate=fast, assistant_model=llama)
    with pytest.raises(ConfigError, match="past_key_values"):
        llama.generate(ids, max_new_tokens=4, custom_generate=fast, past_key_values=DynamicCache())


def test_padding_on_the_right_or_gaps_are_refused(llama: Any, fast: Any) -> None:
    ids = torch.tensor([PROMPT])
    for mask in ([1] * 8 + [0], [1, 0] + [1] * 7, [0] * 9):
        with pytest.raises(ConfigError, match="attention_mask"):
            llama.generate(
                ids,
                attention_mask=torch.tensor([mask]),
                max_new_tokens=4,
                custom_generate=fast,
                pad_token_id=0,
            )


def test_a_batch_is_refused_what_it_needs_whole(llama: Any, fast: Any) -> None:
    call = {"inputs": torch.tensor([PROMPT, PROMPT]), "max_new_tokens": 4, "custom_generate": fast}
    with pytest.raises(ConfigError, match="streamer"):
        llama.generate(**call, streamer=Silent())
    with pytest.raises(ConfigError, match="stopping_criteria"):
        llama.generate(**call, stopping_criteria=StoppingCriteriaList([MaxTimeCriteria(60.0)]))
    with pytest.raises(ConfigError, match="logits_processor"):
        llama.generate(**call, prefix_allowed_tokens_fn=lambda row, ids: [1, 2])


def test_embeddings_and_foreign_positions_are_refused(llama: Any, fast: Any) -> None:
    ids = torch.tensor([PROMPT])
    with pytest.raises(ConfigError, match="inputs_embeds"):
        llama.generate(
            inputs_embeds=llama.get_input_embeddings()(ids), max_new_tokens=4, custom_generate=fast
        )
    with pytest.raises(ConfigError, match="position_ids"):
        llama.generate(
            ids,
            position_ids=torch.arange(5, 5 + len(PROMPT))[None],
            max_new_tokens=4,
            custom_generate=fast,
        )


def test_another_model_is_refused(llama: Any, fast: Any) -> None:
    other = tiny_model("llama", seed=9)
    with pytest.raises(ConfigError, match="another model"):
        other.generate(torch.tensor([PROMPT]), max_new_tokens=4, custom_generate=fast)


def test_stop_strings_need_a_tokenizer(llama: Any, fast: Any) -> None:
    with pytest.raises(ConfigError, match="stop_strings"):
        llama.generate(
            torch.tensor([PROMPT]), max_new_tokens=4, stop_strings="x", custom_generate=fast
        )

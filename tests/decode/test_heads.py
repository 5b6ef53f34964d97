"""The slot that stands where a model's LM head was."""

from __future__ import annotations

import pytest
import torch

from tascade.decode.lm_head import HeadOverride


@pytest.mark.parametrize("requests", [1, 3])
def test_a_head_gets_the_last_states_without_their_prompts_stride(requests: int) -> None:
    given: list[tuple[int, ...]] = []
    head = torch.nn.Linear(6, 9)
    head.register_forward_pre_hook(lambda _, args: given.append(args[0].stride()))
    states = torch.randn(requests, 5, 6)
    slot = HeadOverride(head)
    with torch.inference_mode():
        logits = slot(states[:, -1:])
        torch.testing.assert_close(logits, head(states[:, -1:].clone()))
    assert given[0] == (6, 6, 1)
    assert torch.equal(slot.states, states[:, -1:])

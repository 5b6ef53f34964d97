"""Log-probabilities are the raw distribution's, and the same with drafts as without."""

import numpy as np
import pytest
import torch

from tascade.decode.loop import Decoder
from tascade.decode.sampling import SamplingParams, log_probability
from tascade.decode.target import Target
from tascade.draft.budget import NoDrafter
from tascade.errors import ConfigError
from tascade.testing import OracleDrafter, tiny_model

PROMPT = [5, 9, 2, 7, 7, 1]
CLOSE = 2e-4


@pytest.fixture(scope="module")
def target():
    return Target(tiny_model("llama"))


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("branching", [0.0, 2.0])
def test_speculative_logprobs_are_those_of_plain_decoding(target, temperature, branching):
    params = SamplingParams(max_new_tokens=40, logprobs=3, temperature=temperature, seed=4)
    plain = Decoder(target, NoDrafter()).generate(PROMPT, params)
    drafter = OracleDrafter(plain.tokens, wrong_every=5, branching=branching)
    fast = Decoder(target, drafter).generate(PROMPT, params)
    assert fast.tokens == plain.tokens
    assert fast.forwards < plain.forwards
    assert [entry.token for entry in fast.logprobs] == fast.tokens
    for ours, theirs in zip(fast.logprobs, plain.logprobs, strict=True):
        assert ours.logprob == pytest.approx(theirs.logprob, abs=CLOSE)
        assert [v for _, v in ours.top] == pytest.approx([v for _, v in theirs.top], abs=CLOSE)
        if theirs.top[0][1] - theirs.top[1][1] > CLOSE:
            assert ours.top[0][0] == theirs.top[0][0]


def test_logprobs_are_the_models_own(target):
    """One forward of the bare model over everything says the same, whatever the temperature."""
    params = SamplingParams(max_new_tokens=12, logprobs=1, temperature=1.7, top_k=5, seed=1)
    result = Decoder(target, NoDrafter()).generate(PROMPT, params)
    with torch.inference_mode():
        logits = target.model(torch.tensor([PROMPT + result.tokens])).logits[0].float()
    scores = torch.log_softmax(logits, -1)
    expected = [float(scores[len(PROMPT) - 1 + i, token]) for i, token in enumerate(result.tokens)]
    assert [e.logprob for e in result.logprobs] == pytest.approx(expected, abs=CLOSE)
    best = scores[len(PROMPT) - 1 : -1].max(-1).values.tolist()
    assert [e.top[0][1] for e in result.logprobs] == pytest.approx(best, abs=CLOSE)


def test_none_are_kept_unless_asked_for(target):
    result = Decoder(target, NoDrafter()).generate(PROMPT, SamplingParams(max_new_tokens=4))
    assert result.logprobs == []
    with pytest.raises(ConfigError, match="logprobs"):
        SamplingParams(logprobs=-1)


def test_no_alternatives_and_more_than_there_are():
    logits = torch.tensor(np.log([0.5, 0.25, 0.25]))
    bare = log_probability(logits, 1, 0)
    assert bare.top == ()
    assert bare.logprob == pytest.approx(np.log(0.25))
    assert len(log_probability(logits, 0, 20).top) == 3

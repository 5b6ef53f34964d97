"""Peers in the bench: equal to plain decoding, reset between repeats, absent without harm."""

import sys

import numpy as np
import pytest

from tascade.bench.methods import DecoderMethod, Request, Skipped
from tascade.bench.peers import (
    ARCTIC_SETTINGS,
    ArcticDrafter,
    ArcticSettings,
    HfMethod,
    arctic_methods,
    hf_generate,
    hf_prompt_lookup,
)
from tascade.decode.loop import Decoder
from tascade.decode.sampling import SamplingParams
from tascade.decode.target import Target
from tascade.draft.budget import NoDrafter
from tascade.testing import tiny_model

PROMPTS = [[5, 6, 7, 5, 6, 7, i] for i in range(5)]
PARAMS = SamplingParams(max_new_tokens=24)


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@pytest.fixture(scope="module")
def plain(model):
    decoder = Decoder(Target(model), NoDrafter())
    return [decoder.generate(p, PARAMS).tokens for p in PROMPTS]


def ids(tokens) -> np.ndarray:
    return np.array(tokens, np.int32)


# --- Arctic -------------------------------------------------------------------------------------


def test_without_arctic_every_setting_is_skipped_with_its_reason(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "arctic_inference.suffix_decoding", None)
    methods = list(arctic_methods(Target(model), [[1, 2]], PARAMS))
    assert [m.name for m in methods] == list(ARCTIC_SETTINGS)
    for method in methods:
        assert isinstance(method, Skipped)
        assert "arctic_inference" in method.reason
        assert method.settings["warm_outputs"] == 1


class TestArctic:
    @pytest.fixture(autouse=True)
    def _needs_arctic(self):
        pytest.importorskip("arctic_inference.suffix_decoding")

    def test_same_output_as_plain_decoding_and_warm(self, model, plain):
        methods = list(arctic_methods(Target(model), plain, PARAMS))
        assert len(methods) == 3
        for method in methods:
            assert isinstance(method, DecoderMethod)
            runs = [method.run(Request(p, "")) for p in PROMPTS]
            assert [run.tokens for run in runs] == plain
            assert sum(run.tokens_per_step for run in runs) / len(runs) > 2

    def test_settings_reach_the_peer(self):
        document = list(range(10, 60))
        lengths = {}
        for name, settings in ARCTIC_SETTINGS.items():
            drafter = ArcticDrafter([document] * 3, settings)
            drafter.start(ids([1]))
            drafter.commit(ids(document[:8]), 0, ())
            lengths[name] = len(drafter.propose(64))
        assert lengths == {
            "arctic-suffix": 8,  # one for each matched token
            "arctic-suffix-64-2-32": 16,
            "arctic-suffix-24-4-32": 19,  # match and draft share the depth of 24
        }

    def test_no_draft_beyond_the_cap(self):
        document = list(range(10, 60))
        drafter = ArcticDrafter([document] * 3, ArcticSettings(24, 4.0, 32), max_new_tokens=12)
        drafter.start(ids([1]))
        drafter.commit(ids(document[:8]), 0, ())
        assert len(drafter.propose(64)) == 3  # and the target's own token is the twelfth
        assert len(drafter.propose(2)) == 2
        drafter.commit(ids(document[8:11]), 0, ())
        assert len(drafter.propose(64)) == 0

    def test_reset_forgets_requests_and_keeps_the_task(self):
        drafter = ArcticDrafter([[1, 2, 3, 4]] * 3)

        def draft(context):
            drafter.start(ids([90]))
            drafter.commit(ids(context), 0, ())
            return drafter.propose(16).tokens.tolist()

        for _ in range(2):
            assert draft([1, 2]) == [3, 4]
            assert draft([41, 42]) == []
            drafter.commit(ids([43, 44]), 0, ())
            assert draft([41, 42]) == [43, 44]  # learned from the request before
            drafter.reset()
            assert draft([41, 42]) == []
            assert draft([1, 2]) == [3, 4]
            drafter.reset()

    def test_survival_never_rises(self):
        drafter = ArcticDrafter([[1, 2, 3, 4, 5]] * 3 + [[1, 2, 3, 6, 7]] * 2)
        drafter.start(ids([90]))
        drafter.commit(ids([1, 2]), 0, ())
        tree = drafter.propose(16)
        assert tree.is_chain
        assert (np.diff(tree.survival) <= 0).all()
        assert 0 < tree.survival[-1] < 1

    def test_a_long_request_outgrows_its_buffer(self):
        drafter = ArcticDrafter([])
        drafter.start(ids([1]))
        drafter.commit(ids(list(range(1000))), 0, ())
        drafter.commit(ids([3, 4]), 0, ())
        assert drafter.propose(4).tokens.tolist()[:1] == [5]


# --- Transformers -------------------------------------------------------------------------------


def test_generate_equals_plain_decoding(model, plain):
    method = hf_generate(model, PARAMS)
    assert isinstance(method, HfMethod)
    for prompt, wanted in zip(PROMPTS, plain, strict=True):
        run = method.run(Request(prompt, ""))
        assert run.tokens == wanted
        assert run.forwards == run.stepped_tokens == len(wanted) - 1
        assert 0 < run.prefill_seconds < run.seconds
        assert run.finish_reason == "length"
    assert method.trace([]) is None


def test_prompt_lookup_equals_plain_decoding(model, plain):
    method = hf_prompt_lookup(model, PARAMS)
    assert method.settings["prompt_lookup_num_tokens"] == 10
    for prompt, wanted in zip(PROMPTS, plain, strict=True):
        assert method.run(Request(prompt, "")).tokens == wanted


def test_nothing_is_counted_after_the_end_token(model, plain):
    end = plain[0][6]
    params = SamplingParams(max_new_tokens=24, end_tokens=(end,))
    wanted = plain[0][: plain[0].index(end) + 1]
    assert Decoder(Target(model), NoDrafter()).generate(PROMPTS[0], params).tokens == wanted
    for make in (hf_generate, hf_prompt_lookup):
        run = make(model, params).run(Request(PROMPTS[0], ""))
        assert run.tokens == wanted
        assert run.finish_reason == "stop"


def test_hooks_are_gone_after_a_run(model):
    hf_generate(model, PARAMS).run(Request(PROMPTS[0], ""))
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


@pytest.mark.parametrize("options", [{"temperature": 0.8}, {"repetition_penalty": 1.1}])
def test_what_generate_cannot_do_alike_is_skipped(model, options):
    assert isinstance(hf_generate(model, SamplingParams(**options)), Skipped)

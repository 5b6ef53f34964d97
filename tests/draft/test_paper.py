"""The paper's own drafter: tables, back-off, mixing, equality with plain decoding."""

import time

import numpy as np
import pytest

from tascade.bench.paper_drafter import PaperDrafter
from tascade.core import Drafter, Source
from tascade.decode.loop import AllNodes, Decoder
from tascade.decode.sampling import SamplingParams
from tascade.decode.target import Target
from tascade.draft.budget import NoDrafter
from tascade.errors import ConfigError
from tascade.testing import tiny_model

END = 9


def ids(*tokens: int) -> np.ndarray:
    return np.array(tokens, np.int32)


def tokens_of(drafter: PaperDrafter, limit: int = 64) -> list[int]:
    return drafter.propose(limit).tokens.tolist()


def test_is_a_drafter():
    assert isinstance(PaperDrafter([]), Drafter)


def test_as_published_an_output_begins_behind_the_prompt():
    drafter = PaperDrafter([[1, 2, 3, END]] * 5 + [[7, 2, 4, END]] * 9, end_tokens=[END])
    drafter.start(ids(50, 1))
    assert tokens_of(drafter)[0] == 2  # what followed the prompt's last token in the outputs


def test_longest_context_wins_and_the_chain_ends_at_an_end_token():
    outputs = [[1, 2, 3, END]] * 5 + [[7, 2, 4, END]] * 9
    drafter = PaperDrafter(outputs, end_tokens=[END], marker=True)
    drafter.start(ids(50))
    drafter.commit(ids(1), 0, ())
    assert tokens_of(drafter) == [2, 3, END]  # after 2 alone, 4 is more frequent
    drafter.start(ids(50))
    assert tokens_of(drafter) == [7, 2, 4, END]  # from the first tokens of the outputs
    drafter.commit(ids(60, 2), 0, ())
    assert tokens_of(drafter)[0] == 4


def test_rare_ngrams_are_pruned():
    outputs = [[1, 2]] * 4 + [[3, 3, 3]] * 5
    drafter = PaperDrafter(outputs, length=1)
    drafter.start(ids(50))
    drafter.commit(ids(1), 0, ())
    assert tokens_of(drafter) == [3]  # no hit: the most frequent token
    drafter = PaperDrafter(outputs, length=1, p_min=4)
    drafter.start(ids(50))
    drafter.commit(ids(1), 0, ())
    assert tokens_of(drafter) == [2]


def test_request_and_outputs_are_mixed_at_the_weight():
    outputs = [[1, 2]] * 20 + [[1, 3]] * 5
    for weight, wanted in ((0.75, 2), (0.5, 3)):
        # outputs: 2 at 0.8, 3 at 0.2; request: 3 at 1
        drafter = PaperDrafter(outputs, weight=weight, length=1)
        drafter.start(ids(1, 3, 8))
        drafter.commit(ids(1), 0, ())
        tree = drafter.propose(1)
        assert tree.tokens.tolist() == [wanted]
        share = max(weight * 0.8, weight * 0.2 + 1 - weight)
        assert tree.survival.tolist() == pytest.approx([share])
        assert tree.source.tolist() == [Source.CORPUS if wanted == 2 else Source.BOTH]


def test_mixture_can_prefer_what_neither_source_likes_best():
    outputs = [[1, 2]] * 11 + [[1, 3]] * 9  # 0.55, 0.45
    drafter = PaperDrafter(outputs, weight=0.5, length=1, n_max=1)
    drafter.start(ids(1, 4, 1, 4, 1, 3))  # 4 at 2/3, 3 at 1/3
    drafter.commit(ids(1), 0, ())
    assert drafter.propose(1).tokens.tolist() == [3]


def test_drafts_from_the_request_where_there_are_no_outputs():
    drafter = PaperDrafter([], length=3)
    drafter.start(ids(5, 6, 7, 8, 5))
    tree = drafter.propose(8)
    assert tree.tokens.tolist() == [6, 7, 8]
    assert set(tree.source.tolist()) == {Source.CONTEXT}
    drafter.start(ids(5))
    assert len(drafter.propose(8)) == 0


def test_start_forgets_the_request_before():
    outputs = [[1, 2, 3, 4]] * 5
    drafter = PaperDrafter(outputs, length=4)
    drafter.start(ids(1, 9, 1, 9))
    drafter.commit(ids(1, 9), 0, ())
    drafter.start(ids(50))
    fresh = PaperDrafter(outputs, length=4)
    fresh.start(ids(50))
    assert tokens_of(drafter) == tokens_of(fresh)


def test_limit_and_length_hold_and_survival_never_rises():
    drafter = PaperDrafter([[1, 1, 1, 1, 1, 1, 1, 1]] * 5, length=6)
    drafter.start(ids(50))
    assert len(drafter.propose(64)) == 6
    assert len(drafter.propose(2)) == 2
    assert len(drafter.propose(0)) == 0
    assert (np.diff(drafter.propose(64).survival) <= 0).all()


@pytest.mark.parametrize("wrong", [{"n_max": 0}, {"length": 0}, {"p_min": 0}, {"weight": 1.5}])
def test_options_out_of_range_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        PaperDrafter([], **wrong)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_same_output_as_plain_decoding(temperature):
    target = Target(tiny_model("llama"))
    params = SamplingParams(max_new_tokens=40, temperature=temperature, seed=3)
    plain = Decoder(target, NoDrafter())
    prompts = [[5, 6, 7, i] for i in range(4)]
    wanted = [plain.generate(p, params).tokens for p in prompts]
    fast = Decoder(target, PaperDrafter(wanted, p_min=1), AllNodes())
    got = [fast.generate(p, params) for p in prompts]
    assert [g.tokens for g in got] == wanted
    assert sum(g.tokens_per_step for g in got) / len(got) > 2


def test_a_draft_is_cheap():
    rng = np.random.default_rng(0)
    outputs = [rng.integers(0, 12, 40).tolist() for _ in range(300)]
    drafter = PaperDrafter(outputs)
    drafter.start(rng.integers(0, 12, 200).astype(np.int32))
    seconds = []
    for _ in range(200):
        start = time.perf_counter()
        drafter.propose(64)
        seconds.append(time.perf_counter() - start)
    assert np.median(seconds) < 500e-6  # 30 us on a quiet machine

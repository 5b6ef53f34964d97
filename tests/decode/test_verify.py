"""The walk along a tree, with scripted logits."""

import numpy as np
import pytest
import torch

from tascade.core import EMPTY_TREE, DraftTree
from tascade.decode import sampling as sample
from tascade.decode.loop import Decoder, best_chain
from tascade.decode.sampling import Chooser, SamplingParams
from tascade.decode.target import Target
from tascade.decode.verify import walk
from tascade.draft.budget import NoDrafter
from tascade.draft.ngram.drafter import MixDrafter
from tascade.errors import ConfigError, TascadeError
from tascade.testing import OracleDrafter, tiny_model

#      root -> 1 -> 2 -> 3
#           -> 4 -> 2
TREE = DraftTree(
    np.asarray([1, 4, 2, 2, 3], np.int32),
    np.asarray([-1, -1, 0, 1, 2], np.int32),
    np.asarray([0.6, 0.4, 0.3, 0.2, 0.1], np.float32),
    np.asarray([1, 2, 1, 3, 4], np.int8),
)


def says(*tokens):
    """Logits [1 + N, 6] whose argmax are these tokens."""
    return torch.nn.functional.one_hot(torch.tensor(tokens), 6).float()


def no_prefix(extra):
    raise AssertionError("greedy needs no prefix")


def take(tree, logits, is_last=lambda new: False):
    return walk(tree, logits, Chooser(SamplingParams()), 0, no_prefix, is_last)


def test_an_empty_tree_yields_the_targets_token():
    out = take(EMPTY_TREE, says(5))
    assert (out.tokens, out.path, out.sources, out.stopped) == ([5], [], [0], False)


def test_the_whole_path_and_one_more():
    out = take(TREE, says(1, 2, 0, 3, 0, 5))
    assert (out.tokens, out.path) == ([1, 2, 3, 5], [0, 2, 4])
    assert out.sources == [1, 1, 4, 0]


def test_the_other_branch():
    out = take(TREE, says(4, 0, 2, 0, 1, 0))
    assert (out.tokens, out.path, out.sources) == ([4, 2, 1], [1, 3], [2, 3, 0])


def test_a_token_of_another_branch_is_not_followed():
    out = take(TREE, says(2, 0, 0, 0, 0, 0))
    assert (out.tokens, out.path) == ([2], [])


def test_stopping_inside_the_tree():
    out = take(TREE, says(1, 2, 0, 3, 0, 5), lambda new: len(new) == 2)
    assert (out.tokens, out.path, out.stopped) == ([1, 2], [0, 2], True)


def test_ties_go_to_the_lowest_id_with_and_without_scores():
    flat = torch.zeros(6, 6)
    plain = take(TREE, flat)
    scored = walk(
        TREE,
        flat,
        Chooser(SamplingParams(), [lambda ids, scores: scores]),
        0,
        lambda extra: torch.zeros(1, 1, dtype=torch.long),
        lambda new: False,
    )
    assert plain.tokens == scored.tokens == [0]


def test_processors_see_the_tokens_walked_over():
    seen = []

    def prefix(extra):
        seen.append(list(extra))
        return torch.tensor([[9, *extra]])

    chooser = Chooser(SamplingParams(repetition_penalty=1.5))
    logits = torch.cat([says(1, 2, 0, 3, 0, 5), torch.zeros(6, 4)], 1)
    walk(TREE, logits, chooser, 0, prefix, lambda new: False)
    assert seen == [[], [1], [1, 2], [1, 2, 3]]


def test_best_chain_follows_the_likeliest_child():
    chain = best_chain(TREE)
    assert chain.tokens.tolist() == [1, 2, 3]
    assert chain.is_chain
    assert chain.survival.tolist() == TREE.survival[[0, 2, 4]].tolist()
    assert len(best_chain(EMPTY_TREE)) == 0


def test_hosts_that_take_chains_alone():
    target = Target(tiny_model("mistral"))
    params = SamplingParams(max_new_tokens=40)
    plain = Decoder(target, NoDrafter()).generate([1, 2, 3], params).tokens
    target.supports_trees = False
    drafters = [NoDrafter(), OracleDrafter(plain, 5, branching=0.0), MixDrafter(None)]
    for drafter in drafters:
        result = Decoder(target, drafter).generate([1, 2, 3], params)
        assert result.tokens == plain
    trees = OracleDrafter(plain, 5, branching=1.0)
    trees.commit = lambda *outcome: trees.seen.extend(outcome[0].tolist())
    assert Decoder(target, trees).generate([1, 2, 3], params).tokens == plain


def test_a_stream_taken_over_by_another_is_an_error():
    decoder = Decoder(Target(tiny_model("llama")), NoDrafter())
    first = decoder.stream([1, 2], SamplingParams())
    next(first)
    decoder.generate([3], SamplingParams(max_new_tokens=2))
    with pytest.raises(TascadeError, match="another request"):
        next(first)


def test_an_empty_prompt_is_refused():
    with pytest.raises(ConfigError, match="prompt is empty"):
        Decoder(Target(tiny_model("llama")), NoDrafter()).generate([], SamplingParams())


def test_long_prompts_decode_the_same_with_drafts(monkeypatch):
    monkeypatch.setattr("tascade.decode.target.PREFILL_DRAFT_LIMIT", 40)
    monkeypatch.setattr("tascade.decode.loop.PREFILL_DRAFT_LIMIT", 40)
    monkeypatch.setattr("tascade.decode.mask._TRIANGLE", 50)
    prompt = [i * 7 % 96 for i in range(70)]
    ids = torch.tensor([prompt])
    ones = torch.ones_like(ids)
    params = SamplingParams(max_new_tokens=40)
    for family in ("llama", "mistral", "gemma3"):
        model = tiny_model(family)
        plain = Decoder(Target(model), NoDrafter()).generate(prompt, params).tokens
        own = model.generate(ids, attention_mask=ones, do_sample=False, max_new_tokens=40)
        assert own[0, 70:].tolist() == plain
        oracle = OracleDrafter(plain, 5)
        assert Decoder(Target(model), oracle).generate(prompt, params).tokens == plain


def test_a_walk_looks_at_the_rows_it_visits_alone(monkeypatch):
    looked_at = []
    whole = sample.argmax_rows
    monkeypatch.setattr(
        sample, "argmax_rows", lambda rows: looked_at.append(len(rows)) or whole(rows)
    )
    out = take(TREE, says(1, 2, 0, 5, 0, 0))
    assert out.tokens == [1, 2, 5]
    assert sum(looked_at) == 3

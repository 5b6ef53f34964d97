"""A trained drafter: what is said is plain decoding's; what it sees is what it was taught on."""

from __future__ import annotations

from functools import cache
from itertools import zip_longest
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tascade.core import Drafter, DraftTree, IntArray, Source
from tascade.decode.loop import AllNodes, Decoder
from tascade.decode.prefixes import Prefixes
from tascade.decode.sampling import SamplingParams
from tascade.decode.target import Target
from tascade.draft.budget import Budget, NoDrafter
from tascade.draft.costs import CostTable
from tascade.draft.neural.joint import JointOdds, JointTree
from tascade.draft.neural.merged import MergedDrafter
from tascade.draft.neural.network import DraftNetwork, DraftShape
from tascade.draft.neural.trained import DEPTH, TrainedDrafter
from tascade.draft.neural.training import (
    Batch,
    DraftVocabulary,
    Pair,
    Sample,
    acceptance,
    read_states,
    train,
)
from tascade.draft.ngram.drafter import NgramDrafter
from tascade.testing import FAMILIES, tiny_model

VOCAB = 96
IDS = torch.arange(0, VOCAB, 2)
GREEDY = SamplingParams(max_new_tokens=40)
DRAWN = SamplingParams(max_new_tokens=40, temperature=0.9, seed=5)


@cache
def model(family: str, dtype: torch.dtype = torch.float32) -> Any:
    return tiny_model(family, 0).to(dtype)


def prompt(length: int, seed: int = 0) -> IntArray:
    return np.random.default_rng((seed, length)).integers(0, VOCAB, length).astype(np.int32)


@cache
def plain(family: str, dtype: torch.dtype, length: int, drawn: bool) -> list[int]:
    target = Target(model(family, dtype))
    params = DRAWN if drawn else GREEDY
    return Decoder(target, NoDrafter()).generate(prompt(length), params).tokens


def network(family: str, dtype: torch.dtype = torch.float32, seed: int = 1) -> DraftNetwork:
    torch.manual_seed(seed)
    config = model(family).config.get_text_config()
    return DraftNetwork(DraftShape.of(config, len(IDS))).to(dtype).eval()


class Asking(Budget):
    """Finds every call worth its time."""

    def worth_a_call(self, *_: Any) -> bool:
        return True


def always(target: Target, trained: TrainedDrafter) -> Drafter:
    """Merged with a drafter that knows the request alone, and asked in every step."""
    return MergedDrafter(NgramDrafter(None), trained, Asking(CostTable.flat(64)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_plain_decodings(family: str, dtype: torch.dtype) -> None:
    target = Target(model(family, dtype))
    target.begin()
    if dtype == torch.bfloat16 and target.counts is None:
        pytest.skip("no row counts agree on this machine")
    trained = TrainedDrafter(network(family, dtype), IDS, target)
    for length in (1, 7, 40):
        for drawn, params in ((False, GREEDY), (True, DRAWN)):
            for drafter in (trained, always(target, trained)):
                made = Decoder(target, drafter, AllNodes(30)).generate(prompt(length), params)
                same = made.tokens == plain(family, dtype, length, drawn)
                # In half precision a branch beside the likeliest may tie (see test_half_precision).
                assert same or dtype == torch.bfloat16
                if dtype == torch.float32:
                    assert sum(step.drafted for step in made.steps) > len(made.steps)


class Noting(TrainedDrafter):
    """Notes what the network put out at every depth, and where."""

    seen: list[tuple[int, torch.Tensor, list[int]]]

    def _try(self) -> float:
        self.seen = []  # set anew after the first passes, which draft nothing
        return super()._try()

    def _likeliest(self, outputs: torch.Tensor) -> list[tuple[list[int], list[float]]]:
        found = super()._likeliest(outputs)
        if hasattr(self, "_context"):
            self.seen.append((len(self._context) - 40, outputs, found[0][0]))
        return found


class Along(Noting):
    """Goes along what the model will say, up to a wrong token every third time."""

    wanted: list[int]
    paths: list[tuple[int, list[int]]]

    def propose(self, limit: int, floor: float = 0.0) -> DraftTree:
        said = len(self._context) - 40
        path = self.wanted[said : said + min(6, limit)]
        if len(self.paths) % 3 == 2:
            path = [*path[:2], 7, 8][:limit]
        if limit <= 0 or not path or not self.fits():
            return super().propose(0)
        self.paths.append((said, path))
        self.look_along(path)
        return DraftTree.chain(path, [0.9**depth for depth in range(len(path))])


def test_the_network_sees_what_it_was_taught_on() -> None:
    """Rows read as decoding goes, after rejections too, are those of one pass over the answer."""
    for family in ("llama", "gemma2", "gpt_neox"):
        target, net = Target(model(family)), network(family)
        trained = Noting(net, IDS, target)
        wanted = plain(family, torch.float32, 40, False)
        pairs: list[Pair] = [(prompt(40), np.asarray(wanted, np.int32))]
        batch = Batch.of(read_states(model(family), pairs, Prefixes(()), lambda *_: None), DEPTH)
        words = model(family).get_input_embeddings()
        seen: list[tuple[int, torch.Tensor, list[int]]] = []
        trained.seen = seen
        Decoder(target, trained, AllNodes(20)).generate(prompt(40), GREEDY)
        assert len(seen) > 40
        for at in {place for place, _, _ in seen if place < len(wanted)}:
            levels = [(output, drafted[0]) for place, output, drafted in seen if place == at]
            row = torch.tensor([[40 + at - 2]])
            ids = torch.tensor([[drafted for _, drafted in levels[:-1]]])
            follow = [words(batch.words(0)), *words(ids).unbind(1)]
            given = [follow[0], *(part[:, None] for part in follow[1:])]
            hidden = torch.where(torch.arange(batch.taps.shape[1]) <= row, 0.0, -torch.inf)
            made = net.unroll(given, batch.taps, row, hidden[:, None, None])
            for (output, _), taught in zip(levels, made, strict=True):
                torch.testing.assert_close(output[0], taught[0, 0], atol=2e-2, rtol=2e-2)


def test_along_a_path_it_says_what_it_was_taught_and_no_word_changes() -> None:
    for family in ("llama", "gemma2", "gpt_neox"):
        target, net = Target(model(family)), network(family)
        wanted = plain(family, torch.float32, 40, False)
        trained = Along(net, IDS, target)
        trained.seen, trained.paths, trained.wanted = [], [], list(wanted)
        made = Decoder(target, trained, AllNodes(20)).generate(prompt(40), GREEDY)
        assert made.tokens == wanted
        assert len(made.steps) < len(wanted) / 2
        pairs: list[Pair] = [(prompt(40), np.asarray(wanted, np.int32))]
        batch = Batch.of(read_states(model(family), pairs, Prefixes(()), lambda *_: None), DEPTH)
        words = model(family).get_input_embeddings()
        assert len(trained.seen) == len(trained.paths) > 5
        for (place, outputs, _), (said, path) in zip(trained.seen, trained.paths, strict=True):
            assert place == said
            row = torch.tensor([[40 + place - 2]])
            given = [words(batch.words(0)), *words(torch.tensor(path))[:, None, None]]
            hidden = torch.where(torch.arange(batch.taps.shape[1]) <= row, 0.0, -torch.inf)
            taught = net.unroll(given, batch.taps, row, hidden[:, None, None], along=True)
            same = torch.cat([part[0] for part in taught])
            torch.testing.assert_close(outputs, same, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("seed", [1, 3, 4])
def test_a_drafter_of_random_weights_is_soon_asked_no_more(seed: int) -> None:
    """By a clock of its own: a call takes as long as a fifth of a step for each look at it."""
    now, calls = [0.0], list[int]()

    def clock() -> float:
        now[0] += 0.1
        return now[0]

    class Told(TrainedDrafter):
        def look(self, limit: int, floor: float, step: float = np.inf) -> None:
            calls.append(len(self._context))
            super().look(limit, floor, step)

    target, budget = Target(model("llama")), Budget(CostTable.flat(64))
    trained = Told(network("llama"), IDS, target, clock=clock)
    drafter = MergedDrafter(NgramDrafter(None, use_context=False), trained, budget)
    params = SamplingParams(max_new_tokens=600, temperature=3.0, seed=seed)
    made = Decoder(target, drafter, budget).generate(prompt(40), params)
    assert made.tokens == Decoder(target, NoDrafter()).generate(prompt(40), params).tokens
    assert calls
    assert sum(at > 40 + 64 for at in calls) <= 12  # of more than five hundred steps
    assert now[0] < 0.03 * len(made.steps)


def test_streams_take_turns_and_kept_prefixes_are_recalled() -> None:
    shared = prompt(30, 9)
    prompts = [np.concatenate((shared, prompt(9, seed))) for seed in range(3)]
    target = Target(model("llama"), prefixes=Prefixes([shared.tolist()]))
    bare = Target(model("llama"))
    wanted = [Decoder(bare, NoDrafter()).generate(p, GREEDY).tokens for p in prompts]
    trained = TrainedDrafter(network("llama"), IDS, target)
    decoder = Decoder(target, always(target, trained), AllNodes(20))
    for _ in range(2):  # computed, and recalled
        assert [decoder.generate(p, GREEDY).tokens for p in prompts] == wanted
    streams = [decoder.stream(p, GREEDY, returns=True) for p in prompts]
    last = list(zip_longest(*streams))
    for place, tokens in enumerate(wanted):
        made = [turn[place] for turn in last if turn[place] is not None]
        assert made[-1][1].tokens == tokens


def test_it_learns_what_follows_and_the_same_from_the_same_rows() -> None:
    rng = np.random.default_rng(0)
    rule = rng.permutation(40).astype(np.int32)
    pairs: list[Pair] = []
    for _ in range(60):
        answer = rng.integers(0, 40, 24).astype(np.int32)
        for at in range(1, 24):
            answer[at] = rule[answer[at - 1]]
        pairs.append((prompt(6, int(answer[0])), answer))
    wide = {"hidden_size": 256, "intermediate_size": 640, "num_attention_heads": 4}
    over = tiny_model("llama", 0, **wide)
    vocabulary = DraftVocabulary.of([answer for _, answer in pairs], 64)
    assert set(vocabulary.ids.tolist()) <= set(range(40))
    samples: list[Sample] = read_states(
        over, pairs, Prefixes([[*pairs[0][0][:3]]]), lambda *_: None
    )
    assert {sample.start for sample in samples} >= {6}
    taught, held_out = samples[:48], samples[48:]
    words, told = over.get_input_embeddings(), []
    net = train(over, taught, vocabulary, lambda *said: told.append(said), rounds=60)
    assert [done for _, done, _ in told] == list(range(told[-1][2] or 0))
    shares, each = acceptance(net, held_out, words, vocabulary)
    assert min(shares) > 0.8
    assert [len(hits) for hits in each] == [23] * 12
    shape = DraftShape.of(over.config, len(vocabulary.ids))
    untaught, _ = acceptance(DraftNetwork(shape), held_out, words, vocabulary)
    assert untaught[0] < 0.2
    again, twice = (train(over, taught, vocabulary, lambda *_: None, rounds=2) for _ in "ab")
    for one, other in zip(again.parameters(), twice.parameters(), strict=True):
        assert torch.equal(one, other)


trees = st.lists(
    st.tuples(st.integers(-1, 11), st.integers(0, 3), st.floats(0.05, 0.95)), max_size=12
)


def grown(drawn: list[tuple[int, int, float]]) -> DraftTree:
    paths: dict[tuple[int, ...], float] = {(): 1.0}
    for parent, token, share in drawn:
        above = list(paths)[(parent + 1) % len(paths)]
        if (*above, token) not in paths:
            paths[*above, token] = paths[above] * share
    order = sorted((p for p in paths if p), key=lambda p: (-paths[p], len(p)))
    place = {path: at for at, path in enumerate(order)} | {(): -1}
    return DraftTree(
        np.asarray([path[-1] for path in order], np.int32),
        np.asarray([place[path[:-1]] for path in order], np.int32),
        np.asarray([paths[path] for path in order], np.float32),
        np.zeros(len(order), np.int8),
    )


def paths_of(tree: DraftTree) -> dict[tuple[int, ...], float]:
    found: list[tuple[int, ...]] = []
    for token, parent in zip(tree.tokens.tolist(), tree.parents.tolist(), strict=True):
        found.append((*(found[parent] if parent >= 0 else ()), token))
    assert len(set(found)) == len(found)
    return dict(zip(found, tree.survival.tolist(), strict=True))


levels = st.lists(
    st.lists(st.tuples(st.integers(0, 5), st.floats(0.01, 0.99)), min_size=1, max_size=4),
    max_size=6,
)


@settings(deadline=None)
@given(trees, levels, trees, st.integers(1, 24), st.lists(st.integers(0, 5), max_size=6))
def test_a_joint_tree_has_every_path_once_and_the_best_of_them(
    drawn: list[tuple[int, int, float]],
    said: list[list[tuple[int, float]]],
    behind: list[tuple[int, int, float]],
    limit: int,
    follows: list[int],
) -> None:
    outputs, odds = grown(drawn), JointOdds()
    places = [(list(dict(level)), list(dict(level).values())) for level in said]
    followed = [words[0] for words, _ in places]
    joint = JointTree(outputs, places, followed, odds)
    network = {
        (*followed[:depth], word) for depth, (words, _) in enumerate(places) for word in words
    }
    assert set(paths_of(joint.best(500))) == set(paths_of(outputs)) | network
    left = list(joint.departures())
    for _, path in left:
        assert tuple(path) in network - set(paths_of(outputs))
        assert tuple(path[:-1]) in {(), *paths_of(outputs)}
    joint.extend([(at, grown(behind)) for at, _ in left])
    whole = paths_of(joint.best(500))
    grafted = {(*path, *more) for _, path in left for more in paths_of(grown(behind))}
    assert set(whole) == set(paths_of(outputs)) | network | grafted
    for path, chance in whole.items():
        assert 0.0 <= chance <= (whole[path[:-1]] if path[:-1] else 1.0) + 1e-6
    for path in {(), *whole}:
        below = [share for p, share in whole.items() if p[:-1] == path and p]
        assert sum(below) <= (whole[path] if path else 1.0) + 1e-4
    cut = joint.best(limit)
    assert len(cut) == min(limit, len(whole))
    survival = cut.survival.tolist()
    assert survival == sorted(survival, reverse=True)
    assert all(parent < at for at, parent in enumerate(cut.parents.tolist()))
    assert paths_of(cut).items() <= whole.items()
    joint.learn(np.asarray(follows, np.int32))


def test_the_joint_odds_learn_whom_to_believe() -> None:
    """One of the two is right as often as it says, the other as often whatever it says."""
    for teller in (0, 1):
        rng, odds = np.random.default_rng(teller), JointOdds()
        for _ in range(3000):
            says = rng.uniform(0.05, 0.95, 2)
            _, first, second = odds.of(Source.BOTH, *says)
            odds.learn(Source.BOTH, first, second, rng.random() < says[teller])
        for says in ((0.8, 0.2), (0.2, 0.8), (0.2, 0.2), (0.8, 0.8)):
            assert abs(odds.of(Source.BOTH, *says)[0] - says[teller]) < 0.15


def test_a_guess_beside_a_sure_path_is_believed_no_more() -> None:
    odds = JointOdds()
    sure = DraftTree.chain([5, 6], [0.9, 0.85])
    places = [([7, 5], [0.7, 0.2]), ([6, 8], [0.5, 0.3])]
    for _ in range(200):
        joint = JointTree(sure, places, [5, 6], odds)
        joint.learn(np.asarray([5, 6], np.int32))
    best = JointTree(sure, places, [5, 6], odds).best(2)
    assert paths_of(best).keys() == {(5,), (5, 6)}
    for _ in range(400):  # and where it is the outputs that are wrong, its tokens are
        joint = JointTree(sure, places, [5, 6], odds)
        joint.learn(np.asarray([7], np.int32))
    assert (7,) in paths_of(JointTree(sure, places, [5, 6], odds).best(1))

"""What is drawn follows softmax, alone and in pairs; and a verifier that bends the law is caught.

The target is a table: the logits after a token depend on that token alone, so the law of any two
neighbouring tokens is known exactly.
"""

from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats

import tascade.decode.sampling as sample_module
from tascade.core import DraftTree
from tascade.decode import loop as loop_module
from tascade.decode.loop import Decoder
from tascade.decode.sampling import Sampler, SamplingParams
from tascade.draft.budget import NoDrafter
from tascade.testing import ScriptedDrafter

V = 6
DRAWS = 20_000
SURE = 0.001


def logits_table() -> torch.Tensor:
    rng = np.random.default_rng(7)
    return torch.tensor(rng.normal(0, 1.2, (V, V)), dtype=torch.float32)


class TableTarget:
    """What :class:`Decoder` asks of a target, with ``table[token]`` for a model."""

    supports_trees = True
    rows, positions, context, counts = 2**31 - 1, None, None, None
    device = torch.device("cpu")
    lock = nullcontext()
    step = nullcontext

    def __init__(self):
        self.table = logits_table()
        self.length = 0

    def begin(self, prompt=None, hold=None):
        self.length, self.hold = 0, hold

    def end(self, hold):
        pass

    def room(self, base, unread):
        return None

    def recall(self, prompt):
        return 0

    def unread(self, request):
        return request.result.tokens[-1:]

    def forward(self, tokens, tree=None):
        self.length += len(tokens) + (0 if tree is None else len(tree))
        drafted = [] if tree is None else tree.tokens.tolist()
        return self.table[[tokens[-1], *drafted]]

    def keep(self, base, slots):
        self.length = base + len(slots)


def tree(tokens, parents):
    n = len(tokens)
    return DraftTree(
        np.asarray(tokens, np.int32),
        np.asarray(parents, np.int32),
        np.linspace(1, 0.5, n, dtype=np.float32),
        np.zeros(n, np.int8),
    )


SHAPES = {
    "none": tree([], []),
    "chain": tree([0, 3], [-1, 0]),
    "tree": tree([0, 3, 5, 1, 0, 2], [-1, -1, 0, 0, 1, 1]),
}
START = 2


def draw(shape, temperature, draws=DRAWS):
    """``draws`` requests of two tokens, each with a seed of its own: [draws, 2]."""
    script = [SHAPES[shape]] * 2
    drafter = ScriptedDrafter(script) if len(SHAPES[shape]) else NoDrafter()
    decoder = Decoder(TableTarget(), drafter)
    out = np.empty((draws, 2), np.int64)
    for seed in range(draws):
        params = SamplingParams(temperature=temperature, seed=seed, max_new_tokens=2)
        out[seed] = decoder.generate([START], params).tokens
    return out


def law(temperature):
    """Probability of each pair: [V, V]."""
    chances = torch.softmax(logits_table().double() / temperature, -1).numpy()
    return chances[START][:, None] * chances


def p_value(counts, chances):
    """Chi-square of counts against chances; rare cells are pooled."""
    expected = chances.ravel() * counts.sum()
    rare = expected < 8
    seen = np.append(counts.ravel()[~rare], counts.ravel()[rare].sum())
    wanted = np.append(expected[~rare], expected[rare].sum())
    keep = wanted > 0
    return stats.chisquare(seen[keep], wanted[keep]).pvalue


def p_values(pairs, temperature):
    joint = law(temperature)
    counts = np.zeros((V, V))
    np.add.at(counts, (pairs[:, 0], pairs[:, 1]), 1)
    return {
        "first": p_value(counts.sum(1), joint.sum(1)),
        "second": p_value(counts.sum(0), joint.sum(0)),
        "pair": p_value(counts, joint),
    }


@pytest.fixture(scope="module", params=[pytest.param(0.5, marks=pytest.mark.slow), 1.0])
def plain(request):
    return request.param, draw("none", request.param)


def test_plain_draws_follow_softmax(plain):
    temperature, pairs = plain
    assert min(p_values(pairs, temperature).values()) > SURE


@pytest.mark.parametrize("shape", ["chain", "tree"])
def test_drafted_draws_are_the_plain_draws(plain, shape):
    """Not only of the same law: the same tokens, so the law holds for them too."""
    temperature, pairs = plain
    n = DRAWS // 8
    assert np.array_equal(draw(shape, temperature, n), pairs[:n])


def test_positions_of_one_long_request_follow_softmax():
    """One seed, many positions: pairs of neighbours by the token before."""
    decoder = Decoder(TableTarget(), ScriptedDrafter([SHAPES["tree"]] * 4000))
    params = SamplingParams(temperature=1.0, seed=3, max_new_tokens=6000)
    tokens = np.asarray([START, *decoder.generate([START], params).tokens])
    chances = torch.softmax(logits_table().double(), -1).numpy()
    for before in range(V):
        after = tokens[1:][tokens[:-1] == before]
        assert p_value(np.bincount(after, minlength=V), chances[before]) > SURE


# --- planted bugs: the test above must be able to fail --------------------------------------


def biased_walk(tree, logits, *rest, **named):
    """Lends the drafted children a little probability."""
    logits = logits.clone()
    for token, parent in zip(tree.tokens.tolist(), tree.parents.tolist(), strict=True):
        logits[parent + 1, token] += 0.15
    return TRUE_WALK(tree, logits, *rest, **named)


TRUE_WALK = loop_module.walk
TRUE_GUMBEL = sample_module.gumbel


def plant_bias(patch):
    patch.setattr(loop_module, "walk", biased_walk)


def plant_shared_noise(patch):
    patch.setattr(sample_module, "gumbel", lambda seed, at, ids: TRUE_GUMBEL(seed, 0, ids))


def plant_skipped_temperature(patch):
    patch.setattr(Sampler, "scores", lambda self, logits, prefix: logits.float())


def plant_second_choice(patch):
    """Draws anew, from what is left, when the draft was rejected: the classic mistake."""

    def choose(self, logits, prefix, position):
        token = SOUND_CHOOSE(self, logits, prefix, position)
        drafted = set(SHAPES["tree"].tokens[:2].tolist())
        if position == 0 and token not in drafted:
            again = SimpleNamespace(params=self.params, scores=self.scores, sampled=True)
            return SOUND_CHOOSE(again, logits, prefix, position + 1000)
        return token

    patch.setattr(Sampler, "choose", choose)


SOUND_CHOOSE = Sampler.choose


@pytest.mark.parametrize(
    ("plant", "shows_in"),
    [
        (plant_second_choice, "first"),
        pytest.param(plant_bias, "first", marks=pytest.mark.slow),
        pytest.param(plant_shared_noise, "pair", marks=pytest.mark.slow),
        pytest.param(plant_skipped_temperature, "first", marks=pytest.mark.slow),
    ],
)
def test_a_planted_bug_is_caught(monkeypatch, plant, shows_in):
    temperature = 0.5
    plant(monkeypatch)
    pairs = draw("tree", temperature, DRAWS // 4)
    assert p_values(pairs, temperature)[shows_in] < SURE / 100


def test_shared_noise_hides_from_the_first_token(monkeypatch):
    """Why pairs are tested: each token alone still follows its law."""
    plant_shared_noise(monkeypatch)
    values = p_values(draw("none", 1.0, 5000), 1.0)
    assert values["first"] > SURE
    assert values["pair"] < SURE / 100

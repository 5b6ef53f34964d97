"""A second model drafts, with its own head or a small one: the words stay the target's."""

from __future__ import annotations

import dataclasses
import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from tailored_parts import every
from typer.testing import CliRunner

import tascade
from all_pairs import sampled
from tascade.cli import verbs as cli
from tascade.config import VocabConfig
from tascade.core import DraftTree, Source
from tascade.decode.lm_head import head_override
from tascade.decode.loop import AllNodes, Decoder
from tascade.decode.sampling import SamplingParams
from tascade.decode.target import Target
from tascade.draft.budget import Budget, NoDrafter
from tascade.draft.costs import CostTable
from tascade.draft.neural.combined import CorpusFirst, assisted
from tascade.draft.neural.draft_model import AssistantDrafter
from tascade.draft.ngram.drafter import NgramDrafter
from tascade.errors import ConfigError
from tascade.index.corpus import CorpusIndex
from tascade.model import TaskModel
from tascade.tailor.head import RequestHead
from tascade.tailor.offload.table import RowTable
from tascade.tailor.tailored import GUARANTEES
from tascade.testing import (
    FAMILIES,
    ScriptedDrafter,
    byte_tokenizer,
    tiny_model,
    toy_examples,
)

VOCAB = 96
NODES = 4
GREEDY = SamplingParams(max_new_tokens=20)
SAMPLED = SamplingParams(max_new_tokens=20, temperature=1.2, seed=3, logprobs=1)


@cache
def model(family: str, seed: int = 0):
    return tiny_model(family, seed)


@cache
def prompts(count: int = 3, longest: int = 30) -> tuple[tuple[int, ...], ...]:
    rng = np.random.default_rng(5)
    drawn = [rng.integers(0, VOCAB, int(rng.integers(1, longest))) for _ in range(count)]
    return tuple(tuple(ids.tolist()) for ids in drawn)


@cache
def plain(family: str, prompt: tuple[int, ...], params: SamplingParams):
    return Decoder(Target(model(family)), NoDrafter()).generate(prompt, params)


def static(share: float = 0.3) -> list[int]:
    """Token ids whose choice has nothing to do with what is said."""
    return np.random.default_rng(7).permutation(VOCAB)[: round(share * VOCAB)].tolist()


def small(assistant) -> RequestHead:
    full = head_override(assistant).full
    table = RowTable.from_tensor(full.weight.detach().cpu())
    return RequestHead(table, static(), bias=full.bias, device=assistant.device)


class Watched(AssistantDrafter):
    """Keeps what was proposed behind which text, and what the assistant was run on."""

    def __init__(self, assistant, head=None, **options) -> None:
        self.proposed: list[tuple[tuple[int, ...], list[int]]] = []
        self.text: tuple[int, ...] = ()
        super().__init__(Target(assistant, head), **options)

    def start(self, prompt):
        super().start(prompt)
        self.text = tuple(prompt.tolist())

    def draft(self, limit, floor, step=np.inf):
        tree = super().draft(limit, floor, step)
        if len(tree):
            self.proposed.append((self.text, tree.tokens.tolist()))
        return tree

    def commit(self, tokens, verified, path):
        super().commit(tokens, verified, path)
        self.text += tuple(tokens.tolist())


def another(family: str) -> Watched:
    others = [name for name in FAMILIES if name != family]
    return Watched(model(others[FAMILIES.index(family) % len(others)], 1))


ASSISTANTS = {
    "another": another,
    "perfect": lambda family: Watched(model(family)),
    "small-headed": lambda family: Watched(model(family), small(model(family))),
}


def speculate(family: str, drafter, prompt, params=GREEDY, processors=()):
    decoder = Decoder(Target(model(family)), drafter, AllNodes(NODES))
    return decoder.generate(prompt, params, processors)


# --- what is said -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "kind", "temperature"), sampled(FAMILIES, [*ASSISTANTS], [0.0, 1.2])
)
def test_any_assistant_leaves_the_words_as_they_are(family, kind, temperature):
    drafter = ASSISTANTS[kind](family)
    drafted = accepted = 0
    params = dataclasses.replace(SAMPLED if temperature else GREEDY, max_new_tokens=14)
    for prompt in prompts(2, 20):
        got = speculate(family, drafter, prompt, params)
        assert got.tokens == plain(family, prompt, params).tokens
        drafted += sum(step.drafted for step in got.steps)
        accepted += sum(step.accepted for step in got.steps)
    assert drafted > 8
    if kind == "perfect" and not params.temperature:
        assert accepted == drafted
        assert got.tokens_per_step > 0.9 * NODES
        assert got.sources.count(Source.OTHER) == sum(step.accepted for step in got.steps)
    else:
        assert accepted < drafted  # else rejections were not tested


def test_a_tree_of_the_corpus_and_a_chain_of_the_assistant_take_turns(tmp_path):
    wanted = {prompt: plain("llama", prompt, GREEDY).tokens for prompt in prompts(6)}
    known = list(wanted)[::2]
    index = CorpusIndex.build(
        tmp_path / "index", [wanted[p] for p in known], vocab_size=VOCAB, fingerprint="tiny"
    )
    clock = Clock()
    drafter, budget = assisted(clock.drafter(model("llama"), 0.1), NgramDrafter(index), steps())
    decoder = Decoder(Target(model("llama")), drafter, budget)
    said = {p: decoder.generate(p, GREEDY) for p in [*wanted, *wanted]}
    assert {p: result.tokens for p, result in said.items()} == wanted
    from_corpus = [sum(s in (Source.CORPUS, Source.BOTH) for s in said[p].sources) for p in known]
    assert sum(from_corpus) > 8 * len(known)
    unknown = [p for p in wanted if p not in known]
    assert sum(said[p].sources.count(Source.OTHER) for p in unknown) > 12 * len(unknown)


# --- the cache ----------------------------------------------------------------------------------


def argmax_share(drafter: Watched) -> float:
    """How often a perfect assistant's first node is the target's argmax, as it should be always.

    The target is sampled, so that its drafts are often rejected.
    """
    right = []
    for prompt in prompts(4):
        drafter.proposed.clear()
        speculate("llama", drafter, prompt, SAMPLED)
        best = [p.top[0][0] for p in plain("llama", prompt, SAMPLED).logprobs]
        right += [ids[0] == best[len(text) - len(prompt)] for text, ids in drafter.proposed]
    assert len(right) > 40
    return sum(right) / len(right)


def test_after_rejections_the_assistant_still_sees_the_right_text():
    assert argmax_share(Watched(model("llama"))) > 0.98


def test_a_cache_that_is_not_rewound_is_caught(monkeypatch):
    drafter = Watched(model("llama"))

    def stale(base, slots):
        if base > drafter.target.length:  # rewinding is what is left out
            drafter.target.cache.keep(base, slots)

    monkeypatch.setattr(drafter.target, "keep", stale)
    assert argmax_share(drafter) < 0.7


class TwoOf(AllNodes):
    """Verifies two of the nodes it asked for."""

    def choose(self, survival):
        return min(len(survival), 2)


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("kind", ASSISTANTS)
def test_nothing_is_run_twice(kind, params):
    drafter, ran = ASSISTANTS[kind]("qwen3"), []
    forward = drafter.target.forward

    def counted(tokens, tree=None):
        before = (drafter._context + drafter._chain)[: drafter.target.length]
        ran.extend(tuple(before + list(tokens[: i + 1])) for i in range(len(tokens)))
        return forward(tokens, tree)

    drafter.target.forward = counted
    for prompt in prompts(2):
        ran.clear()
        # Fewer are verified than drafted: what then comes true all the same is kept too.
        decoder = Decoder(Target(model("qwen3")), drafter, TwoOf(NODES))
        assert decoder.generate(prompt, params).tokens == plain("qwen3", prompt, params).tokens
        assert len(ran) == len(set(ran)) > len(prompt)


def test_a_prompt_that_begins_like_the_last_is_run_from_where_it_differs():
    drafter, lengths = Watched(model("llama")), []
    forward = drafter.target.forward
    drafter.target.forward = lambda ids, tree=None: lengths.append(len(ids)) or forward(ids, tree)
    shared = tuple(range(40))
    for tail in (1, 2, 3):
        prompt = (*shared, 50 + tail, 60)
        lengths.clear()
        got = speculate("llama", drafter, prompt)
        assert got.tokens == plain("llama", prompt, GREEDY).tokens
        assert sum(step.accepted == step.drafted for step in got.steps) == len(got.steps)
        assert lengths[0] == (42 if tail == 1 else 2)


# --- the head -----------------------------------------------------------------------------------


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_a_small_head_proposes_what_is_listed_asked_and_said(params):
    said = 0
    for family in FAMILIES[::3]:
        drafter = ASSISTANTS["small-headed"](family)
        for prompt in prompts(2):
            drafter.proposed.clear()
            speculate(family, drafter, prompt, params)
            for text, ids in drafter.proposed:
                assert set(ids) <= {*static(), *text}
                said += bool(set(ids) - {*static(), *prompt})
    assert said > 0  # the answer's own tokens are in it


def test_a_small_head_costs_drafts_only_where_it_lacks_a_token():
    kept = {kind: 0 for kind in ("perfect", "small-headed")}
    for kind in kept:
        drafter = ASSISTANTS[kind]("llama")
        for prompt in prompts():
            got = speculate("llama", drafter, prompt)
            kept[kind] += sum(step.accepted for step in got.steps)
    assert 0 < kept["small-headed"] < kept["perfect"]


def test_ids_that_one_of_the_two_models_has_not():
    wide, narrow = tiny_model("llama", 1, vocab_size=128), tiny_model("llama", 1, vocab_size=64)
    drafter = Watched(wide, vocab_size=VOCAB)
    unbound = Watched(wide)
    for prompt in prompts():
        assert speculate("llama", drafter, prompt).tokens == plain("llama", prompt, GREEDY).tokens
        unbound.start(np.asarray(prompt, np.int32))
        unbound.propose(40)
    assert max(token for _, ids in unbound.proposed for token in ids) >= VOCAB
    assert 64 < max(token for _, ids in drafter.proposed for token in ids) < VOCAB
    drafter, few = Watched(narrow, vocab_size=VOCAB), tuple(range(8))
    assert speculate("llama", drafter, few).tokens == plain("llama", few, GREEDY).tokens
    assert drafter.proposed
    assert all(max(text) < 64 for text, _ in drafter.proposed)
    assert max(drafter.text) >= 64


# --- from request to request --------------------------------------------------------------------


def proposals(drafter: Watched, prompt) -> list[tuple[tuple[int, ...], list[int]]]:
    drafter.proposed = []
    speculate("llama", drafter, prompt)
    return drafter.proposed


@pytest.mark.parametrize("kind", ASSISTANTS)
def test_a_request_leaves_nothing_behind(kind, monkeypatch):
    first, second, third = prompts()
    drafter = ASSISTANTS[kind]("llama")
    wanted = proposals(ASSISTANTS[kind]("llama"), first)
    decoder = Decoder(Target(model("llama")), drafter, AllNodes(NODES))
    steps = decoder.stream(second, GREEDY)
    next(steps)
    steps.close()  # cancelled half way
    assert proposals(drafter, first) == wanted

    def breaks(*args, **kwargs):
        raise RuntimeError("a mistake")

    with pytest.raises(RuntimeError, match="mistake"):
        decoder.generate(third, GREEDY, [breaks])
    assert proposals(drafter, first) == wanted
    layer = drafter.target.model.get_decoder().layers[1]
    with monkeypatch.context() as patch:  # the assistant's first layer has its keys by then
        patch.setattr(layer, "forward", breaks)
        drafter.start(np.asarray(second, np.int32))
        with pytest.raises(RuntimeError, match="mistake"):
            drafter.propose(3)
    assert proposals(drafter, first) == wanted


def gpt2(positions: int):
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"n_positions": positions, "n_embd": 32, "n_layer": 1, "n_head": 2}
    ids = {"vocab_size": VOCAB, "bos_token_id": None, "eos_token_id": None}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **sizes, **ids)).eval()


def turning(positions: int):
    """A model whose rotary frequencies turn when a position is past the edge."""
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    return tiny_model("llama", 1, max_position_embeddings=positions, rope_parameters=rope)


@pytest.mark.parametrize(
    "assistant",
    [gpt2(40), tiny_model("llama", 1, max_position_embeddings=40), turning(40)],
    ids=["table", "rope", "dynamic rope"],
)
@pytest.mark.parametrize("length", [30, 40, 41, 60])
def test_an_assistant_made_for_less_text_stops_drafting(assistant, length):
    drafter, prompt = Watched(assistant), tuple(range(length))
    got = speculate("llama", drafter, prompt)
    assert got.tokens == plain("llama", prompt, GREEDY).tokens
    last = max((len(text) + len(ids) for text, ids in drafter.proposed), default=0)
    assert last == (41 if length <= 40 else 0)  # what follows 40 tokens can be said, no more


def test_nothing_is_drafted_behind_an_end_token():
    prompt = prompts()[0]
    ends = tuple(plain("llama", prompt, GREEDY).tokens[6:8])
    drafter = Watched(model("llama"), end_tokens=ends)
    speculate("llama", drafter, prompt)
    assert any(set(ends) & set(ids) for _, ids in drafter.proposed)
    assert not any(set(ends) & set(ids[:-1]) for _, ids in drafter.proposed)


def test_a_guessing_head_may_have_an_assistant_too():
    from tascade.tailor.exact import ExactHeadDecoder

    llama = model("llama")
    full = head_override(llama).full
    target, drafter = Target(llama, small(llama)), Watched(model("llama"))
    decoder = ExactHeadDecoder(target, drafter, full, every(5), AllNodes(NODES))
    for prompt in prompts():
        got = decoder.generate(prompt, GREEDY)
        assert got.tokens == plain("llama", prompt, GREEDY).tokens
        assert got.extra["misses"] > 0


# --- what it costs ------------------------------------------------------------------------------


class Clock:
    """Time that passes only while an assistant runs, so many seconds a pass and a token."""

    def __init__(self) -> None:
        self.now = self.passes = 0.0

    def __call__(self) -> float:
        return self.now

    def drafter(self, assistant, token: float, prompt: float = 0.0) -> AssistantDrafter:
        drafter = AssistantDrafter(Target(assistant), clock=self)
        forward = drafter.target.forward

        def timed(ids, tree=None):
            self.now += token + prompt * (len(ids) > 8)
            return forward(ids, tree)

        drafter.target.forward = timed
        return drafter


def steps() -> Budget:
    """A target whose step takes a second, and a little more for more tokens."""
    return Budget(CostTable((1, 2, 4, 8, 16, 32, 64), (1.0, 1.01, 1.03, 1.07, 1.15, 1.3, 1.6)))


def serve(assistant, token: float, prompt: float = 0.0, rounds: int = 16):
    """(seconds of the assistant, seconds of the target, tokens) for each request."""
    clock = Clock()
    drafter = clock.drafter(assistant, token, prompt)
    joined, budget = assisted(drafter, NgramDrafter(None, use_context=False), steps())
    decoder = Decoder(Target(model("llama")), joined, budget)
    out = []
    for text in prompts(rounds):
        before = clock.now
        got = decoder.generate(text, GREEDY)
        assert got.tokens == plain("llama", text, GREEDY).tokens
        target = sum(float(budget.cost.upto(1 + step.drafted)[-1]) for step in got.steps)
        out.append((clock.now - before, target, len(got.tokens)))
    return out


def seconds_lost(served) -> float:
    """Beside plain decoding, which takes a second a token."""
    return sum(own + target - tokens for own, target, tokens in served)


def test_an_assistant_that_pays_is_used():
    served = serve(model("llama"), 0.1)
    assert seconds_lost(served) < -0.5 * sum(tokens for *_, tokens in served)


@pytest.mark.parametrize(
    ("seed", "token", "prompt"),
    [(1, 0.3, 0.3), (1, 2.0, 2.0), (0, 1.0, 1.0), (0, 3.0, 3.0), (0, 0.2, 40.0)],
    ids=["useless", "useless and slow", "as slow as the target", "slower", "a dear prompt"],
)
def test_an_assistant_that_does_not_pay_is_left(seed, token, prompt):
    served = serve(model("llama", seed), token, prompt)
    most = 16 + 2 * (token + prompt)  # what may be put at risk, and what is lost in finding out
    tokens = sum(tokens for *_, tokens in served)
    assert seconds_lost(served) < most + 0.02 * tokens
    late = served[len(served) // 2 :]
    assert sum(own for own, *_ in late) < max(0.06 * sum(t for *_, t in late), token + prompt)


def test_drafted_nodes_of_a_useless_assistant_fall_to_nearly_none():
    drafter = Watched(model("llama", 1), clock=Clock())
    joined, budget = assisted(drafter, NgramDrafter(None, use_context=False), steps())
    assert isinstance(joined, CorpusFirst)
    decoder = Decoder(Target(model("llama")), joined, budget)
    verified = []
    for prompt in prompts(16):
        verified.append(sum(step.drafted for step in decoder.generate(prompt, GREEDY).steps))
    assert verified[0] > 0
    assert sum(verified[8:]) <= 0.03 * 8 * GREEDY.max_new_tokens


def test_a_budget_alone_leaves_a_useless_assistant_too():
    drafter = Watched(model("llama", 1))  # its time counts as nothing, as that of a look-up would
    decoder = Decoder(Target(model("llama")), drafter, steps())
    for prompt in prompts(12):
        drafter.proposed.clear()
        decoder.generate(prompt, GREEDY)
    assert len(drafter.proposed) <= 2


def test_a_calls_time_is_not_taken_for_that_of_look_ups():
    chosen = {}
    for called in (False, True):
        budget = steps()
        for _ in range(300):
            budget.plan()
            if called:
                budget.called(0.95, np.empty(0, np.float32))
            budget.observe(4, 1.03, 0.96)
        chosen[called] = budget.choose(np.full(4, 0.2, np.float32))
    assert chosen == {False: 0, True: 4}


def test_of_a_tree_and_a_chain_what_promises_more_is_verified():
    drafter = Watched(model("llama", 1), clock=Clock())
    drafter.confidence.of = lambda chance: 0.3
    for survival, taken in ((0.9, "tree"), (0.1, "chain")):
        tree = DraftTree.chain([90, 91], [survival, survival], Source.CORPUS)
        budget = Budget(CostTable.flat())
        joined = CorpusFirst(ScriptedDrafter([tree]), drafter, budget)
        joined.start(np.arange(5, dtype=np.int32))
        budget.plan()
        found = joined.propose(2)
        assert (found.source[0] == Source.CORPUS) == (taken == "tree")


def test_an_assistant_that_comes_to_pay_is_used_again():
    clock = Clock()
    useless, perfect = clock.drafter(model("llama", 1), 0.1), clock.drafter(model("llama"), 0.1)
    joined, budget = assisted(useless, NgramDrafter(None, use_context=False), steps())
    decoder = Decoder(Target(model("llama")), joined, budget)
    for prompt in prompts(16):
        decoder.generate(prompt, GREEDY)
    assert decoder.generate(prompts()[0], GREEDY).tokens_per_step < 1.2
    useless.target = perfect.target
    for prompt in prompts(16):
        got = decoder.generate(prompt, GREEDY)
    assert got.tokens_per_step > 3


# --- a pack and its assistant -------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model, a smaller one of its tokenizer, one of another, and a pack with a list."""
    root = tmp_path_factory.mktemp("assistant")
    tokenizer = byte_tokenizer()
    options = {"vocab_size": 320, "eos_token_id": 256, "initializer_range": 0.5}
    for name, seed, layers in (("model", 0, 2), ("small", 1, 1)):
        tiny_model("llama", seed, num_hidden_layers=layers, **options).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    foreign = byte_tokenizer()
    foreign.add_tokens(["<|more|>"])
    tiny_model("llama", 1, **options).save_pretrained(root / "foreign")
    foreign.save_pretrained(root / "foreign")
    recipe = tascade.Recipe(max_new_tokens=24, vocab=VocabConfig(head="draft-only"))
    recipe = dataclasses.replace(recipe, spec=tascade.SpecConfig(calibration_rows=2))
    rows = [{"prompt": e.prompt, "completion": e.completion} for e in toy_examples(40)]
    made = tascade.adapt(root / "model", rows, out=root / "pack", recipe=recipe)
    assert made.tailored is made.assistant is None
    return {name: root / name for name in ("model", "small", "foreign", "pack")}


def test_a_pack_with_an_assistant_says_the_plain_models_words(folders):
    listed = {
        t for t, *_ in json.loads((folders["pack"] / "vocabulary.json").read_text())["tokens"]
    }
    for head, size in (("draft-only", len(listed)), ("full", 0)):
        task_model = TaskModel.from_pretrained(
            folders["pack"], assistant=str(folders["small"]), head=head
        )
        drafter = task_model.assistant
        assert (
            (0 if drafter.target.head is None else drafter.target.head.union.static) == size < 320
        )
        assert task_model.tailored is None
        assert GUARANTEES[head] == "lossless"
        held = {name for name, _ in drafter.target.model.named_parameters()}
        assert any("embed_tokens" in name for name in held) == (head == "full")
        decoder, spent = task_model.decoder, 0
        assert decoder.drafter.name == "tasc-spec+assistant"
        for row in toy_examples(5, seed=9):
            ids, before = task_model.encode(row.prompt), len(drafter._ran)
            for options in ({}, {"temperature": 0.9, "seed": 4}):
                params = task_model.params(**options)
                wanted = task_model.plain.generate(ids, params).tokens
                assert decoder.generate(ids, params).tokens == wanted
            spent += len(drafter._ran) != before
        assert spent  # it did draft


def test_a_loaded_model_may_be_its_own_assistant(folders):
    from tascade.load import load_model

    pair = load_model(folders["model"])[:2]
    task_model = TaskModel.from_pretrained(folders["pack"], pair, assistant=pair)
    assert task_model.assistant.target.head.union.static < task_model.assistant.target.vocab_size
    prompt = toy_examples(1, seed=11)[0].prompt
    wanted = task_model.plain.generate(task_model.encode(prompt), task_model.params())
    assert task_model.run(prompt).tokens == wanted.tokens


def test_what_cannot_draft_is_refused(folders):
    for head in ("", "draft-only"):  # the pack's own head is draft-only
        with pytest.raises(
            ConfigError, match=r"needs a model that drafts[\s\S]*assistant="
        ) as error:
            TaskModel.from_pretrained(folders["pack"], head=head)
        assert "full, exact or masked" in error.value.fix
    with pytest.raises(ConfigError, match=r"another tokenizer[\s\S]*same family"):
        TaskModel.from_pretrained(folders["pack"], assistant=folders["foreign"])
    with pytest.raises(ConfigError, match="cannot load the model"):
        TaskModel.from_pretrained(folders["pack"], assistant=folders["pack"] / "nothing")


def test_the_verb_takes_an_assistant(folders):
    run = CliRunner()
    words = ["generate", str(folders["pack"]), "Ticket 1: the badge was lost.", "--json"]
    told = run.invoke(cli.app, [*words, "--head", "full"], catch_exceptions=False)
    more = ["--assistant", str(folders["small"]), "--head", "draft-only"]
    assisted_ = run.invoke(cli.app, [*words, *more], catch_exceptions=False)
    assert told.exit_code == assisted_.exit_code == 0
    assert json.loads(told.stdout)["text"] == json.loads(assisted_.stdout)["text"] != ""
    alone = run.invoke(cli.app, words)
    assert isinstance(alone.exception, ConfigError)
    assert "--assistant" in str(alone.exception)


def test_a_stream_of_drafts_stays_in_the_assistants_precision():
    half = tiny_model("llama").to(torch.bfloat16)  # the two need not agree in precision
    drafter = Watched(half, small(half))
    for prompt in prompts():
        assert speculate("llama", drafter, prompt).tokens == plain("llama", prompt, GREEDY).tokens
    assert drafter.proposed

"""One loaded model for several TaskModels, threads and streams: all get plain decoding's words."""

from __future__ import annotations

import copy
import gc
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tascade
from tascade import SpecConfig, TaskModel
from tascade.config import VocabConfig
from tascade.core import Generation
from tascade.decode.exclusive import exclusive
from tascade.decode.loop import Decoder
from tascade.decode.target import Target
from tascade.draft.budget import NoDrafter
from tascade.errors import TascadeError
from tascade.integrations.transformers import speculative_generate
from tascade.testing import byte_tokenizer, tiny_model, toy_examples

PROMPTS = [f"Ticket {i}: the {thing} is slow" for i, thing in enumerate("abcdef")]
OPTIONS: list[dict[str, Any]] = [
    {"max_new_tokens": 5, "ignore_end": True},
    {"max_new_tokens": 4, "ignore_end": True, "temperature": 1.1, "seed": 4},
    {"max_new_tokens": 4, "ignore_end": True, "temperature": 0.7, "top_k": 9, "seed": 9},
]
HEADS = ("full", "exact", "masked")


@dataclass
class House:
    """A model, a TaskModel of it for each head, and what plain decoding says."""

    models: dict[str, TaskModel]
    alone: Decoder
    known: dict[Any, list[int]] = field(default_factory=dict)

    def wanted(self, head: str, prompt: str, options: dict[str, Any]) -> list[int]:
        key = head == "masked", prompt, tuple(sorted(options.items()))
        if key not in self.known:
            ids, params = self.models["full"].encode(prompt), self.models["full"].params(**options)
            rule = [self.only_listed(ids)] if head == "masked" else []
            self.known[key] = self.alone.generate(ids, params, rule).tokens
        return self.known[key]

    def only_listed(self, ids: Any) -> Any:
        made = self.models["masked"].tailored
        assert made is not None
        kept = sorted({*made.head.union.ids[: made.head.union.static].tolist(), *ids.tolist()})

        def rule(_: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            masked = torch.full_like(scores, -torch.inf)
            masked[:, kept] = scores[:, kept]
            return masked

        return rule

    def text(self, tokens: list[int]) -> str:
        ids = [token for token in tokens if token not in self.models["full"].ends]
        return str(self.models["full"].tokenizer.decode(ids, skip_special_tokens=True))


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> House:
    pack = tmp_path_factory.mktemp("packs") / "toy"
    model, tokenizer = tiny_model("llama", vocab_size=260), byte_tokenizer()
    rows = [{"prompt": e.prompt, "completion": e.completion} for e in toy_examples(60)]
    recipe = tascade.Recipe(
        max_new_tokens=8, spec=SpecConfig(calibration_rows=2), vocab=VocabConfig(head="exact")
    )
    tascade.adapt((model, tokenizer), rows, out=pack, recipe=recipe)
    models = {h: TaskModel.from_pretrained(pack, (model, tokenizer), head=h) for h in HEADS}
    alone = Decoder(Target(copy.deepcopy(model)), NoDrafter(), None, tokenizer)
    return House(models, alone)


def elsewhere(call: Callable[[], Any]) -> Any:
    """What a call gives in a thread of its own."""
    made: list[Any] = []
    thread = threading.Thread(target=lambda: made.append(call()), daemon=True)
    thread.start()
    thread.join(120)
    assert not thread.is_alive(), "it hangs"
    return made[0] if made else None


# --- streams ------------------------------------------------------------------------------------


def closed(stream: Iterator[Any]) -> None:
    stream.close()  # type: ignore[attr-defined]


def thrown_into(stream: Iterator[Any]) -> None:
    with pytest.raises(ValueError, match="reader"):
        stream.throw(ValueError("the reader broke off"))  # type: ignore[attr-defined]


WAYS: dict[str, Callable[[list[Iterator[Any]]], None]] = {
    "closed": lambda held: closed(held.pop()),
    "closed in another thread": lambda held: elsewhere(lambda: closed(held.pop())),
    "dropped": lambda held: held.clear(),
    "dropped in another thread": lambda held: elsewhere(held.clear),
    "broken off": lambda held: thrown_into(held.pop()),
    "broken off in another thread": lambda held: elsewhere(lambda: thrown_into(held.pop())),
    "kept": lambda held: None,
}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("way", WAYS)
def test_a_stream_that_is_not_read_to_its_end_stops_nobody(
    house: House, way: str, head: str
) -> None:
    made, options = house.models[head], OPTIONS[0]
    held: list[Iterator[Any]] = [iter(made.stream(PROMPTS[0], **options))]
    elsewhere(lambda: next(held[0]))
    WAYS[way](held)
    gc.collect()
    for prompt in PROMPTS[:2]:
        for other in HEADS:
            run = partial(house.models[other].run, prompt, **options)
            assert elsewhere(run).tokens == house.wanted(other, prompt, options)
            assert run().tokens == house.wanted(other, prompt, options)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("head", HEADS)
def test_each_step_of_a_stream_may_be_taken_by_another_thread(
    house: House, head: str, options: dict[str, Any]
) -> None:
    stream = iter(house.models[head].stream(PROMPTS[1], **options))
    parts = []
    while (part := elsewhere(lambda: next(stream, None))) is not None:
        parts.append(part)
    assert "".join(parts) == house.text(house.wanted(head, PROMPTS[1], options))


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("head", HEADS)
def test_requests_between_a_streams_steps_change_neither(
    house: House, head: str, options: dict[str, Any]
) -> None:
    """In one thread; those of the same TaskModel, of another one, and a batch."""
    made, said = house.models[head], Generation([])
    for _, said in made.steps(made.encode(PROMPTS[2]), made.params(**options)):
        between = house.models[HEADS[len(said.tokens) % 3]].run(PROMPTS[3], **options)
        wanted = house.wanted(HEADS[len(said.tokens) % 3], PROMPTS[3], options)
        assert between.tokens == wanted
        assert made.run(PROMPTS[4], **options).tokens == house.wanted(head, PROMPTS[4], options)
        assert made.generate([PROMPTS[5]] * 2, batch_size=2, **options) == [
            house.text(house.wanted(head, PROMPTS[5], options))
        ] * 2  # fmt: skip
    assert said.tokens == house.wanted(head, PROMPTS[2], options)


@pytest.mark.parametrize("options", OPTIONS)
def test_streams_side_by_side_are_right(house: House, options: dict[str, Any]) -> None:
    asked = [(head, prompt) for head in HEADS for prompt in PROMPTS[:3]]
    streams = [iter(house.models[head].stream(prompt, **options)) for head, prompt in asked]
    parts: list[list[str]] = [[] for _ in asked]
    live = list(range(len(asked)))
    while live:
        for i in list(live):
            part = next(streams[i], None)
            if part is None:
                live.remove(i)
            else:
                parts[i].append(part)
    texts = [house.text(house.wanted(*request, options)) for request in asked]
    assert ["".join(part) for part in parts] == texts


def test_a_closed_stream_keeps_no_cache_and_an_open_one_its_own(house: House) -> None:
    made = house.models["full"]
    target, options = made.decoder.target, OPTIONS[0]
    first, second = (made.stream(prompt, **options) for prompt in PROMPTS[:2])
    next(first)
    cache = target.cache
    next(second)
    assert target.cache is not cache
    second.close()  # type: ignore[attr-defined]
    assert target.hold is None
    assert "".join(first) in house.text(house.wanted("full", PROMPTS[0], options))
    assert target.cache is cache


def test_what_a_step_calls_cannot_begin_a_request(house: House) -> None:
    made, options = house.models["exact"], OPTIONS[0]

    def asks(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        made.run(PROMPTS[1], **options)
        return scores

    with pytest.raises(TascadeError, match="within a step"):
        made.run(PROMPTS[0], [asks], **options)
    assert made.run(PROMPTS[0], **options).tokens == house.wanted("exact", PROMPTS[0], options)


def test_what_is_called_between_steps_can(house: House) -> None:
    made, options = house.models["full"], OPTIONS[0]
    ids, params = made.encode(PROMPTS[0]), made.params(**options)

    def told(_: list[int]) -> None:
        assert made.run(PROMPTS[1], **options).tokens == house.wanted("full", PROMPTS[1], options)

    for decoder in (made.decoder, made.plain):
        said = decoder.generate(ids, params, on_tokens=told).tokens
        assert said == house.wanted("full", PROMPTS[0], options)


# --- threads ------------------------------------------------------------------------------------


class Worker:
    """Sends requests of every kind to one model, and compares."""

    def __init__(self, house: House, seed: int, count: int) -> None:
        self.house, self.rng, self.count = house, np.random.default_rng(seed), count
        self.done, self.wrong, self.left = 0, list[Any](), list[Iterator[Any]]()

    def __call__(self) -> None:
        ways = [self.run, self.stream, self.leave, self.batch, self.plain, self.hook, self.decoder]
        while self.done < self.count:
            way = ways[int(self.rng.integers(len(ways)))]
            head = HEADS[int(self.rng.integers(3))]
            options = OPTIONS[int(self.rng.integers(3))]
            try:
                self.done += way(head, PROMPTS[int(self.rng.integers(6))], options)
            except Exception as error:
                self.wrong.append((way.__name__, head, repr(error)))
                self.done += 1

    def check(self, got: Any, wanted: Any, *about: Any) -> None:
        if got != wanted:
            self.wrong.append((*about, got, wanted))

    def run(self, head: str, prompt: str, options: dict[str, Any]) -> int:
        got = self.house.models[head].run(prompt, **options).tokens
        self.check(got, self.house.wanted(head, prompt, options), "run", head)
        return 1

    def decoder(self, head: str, prompt: str, options: dict[str, Any]) -> int:
        made = self.house.models[head]
        got = made.decoder.generate(made.encode(prompt), made.params(**options)).tokens
        self.check(got, self.house.wanted(head, prompt, options), "decoder", head)
        return 1

    def plain(self, head: str, prompt: str, options: dict[str, Any]) -> int:
        made = self.house.models[head]
        got = made.plain.generate(made.encode(prompt), made.params(**options)).tokens
        self.check(got, self.house.wanted("full", prompt, options), "plain", head)
        return 1

    def stream(self, head: str, prompt: str, options: dict[str, Any]) -> int:
        got = "".join(self.house.models[head].stream(prompt, **options))
        self.check(got, self.house.text(self.house.wanted(head, prompt, options)), "stream", head)
        return 1

    def leave(self, head: str, prompt: str, options: dict[str, Any]) -> int:
        stream = iter(self.house.models[head].stream(prompt, **options))
        begun = next(stream)
        whole = self.house.text(self.house.wanted(head, prompt, options))
        self.check(whole.startswith(begun), True, "left", head)
        self.left.append(stream)  # the other thread ends it
        return 1

    def batch(self, head: str, prompt: str, options: dict[str, Any]) -> int:
        asked = [prompt, *PROMPTS[:3]]
        got = self.house.models[head].generate(asked, batch_size=3, **options)
        wanted = [self.house.text(self.house.wanted(head, p, options)) for p in asked]
        self.check(got, wanted, "batch", head)
        return len(asked)

    def hook(self, head: str, prompt: str, options: dict[str, Any]) -> int:
        made = self.house.models[head]
        ids = torch.from_numpy(made.encode(prompt)).long()[None]
        out = made.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            custom_generate=speculative_generate(made),
            max_new_tokens=5,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        wanted = self.house.wanted(head, prompt, {"max_new_tokens": 5, "ignore_end": True})
        self.check(out[0, ids.shape[1] :].tolist(), wanted, "hook", head)
        return 1


def test_a_thousand_requests_of_two_threads_over_one_model_are_plain_decodings(
    house: House,
) -> None:
    for head in HEADS:
        for prompt in PROMPTS:
            for options in (*OPTIONS, {"max_new_tokens": 5, "ignore_end": True}):
                house.wanted(head, prompt, options)
    workers = [Worker(house, seed, 500) for seed in (1, 2)]
    threads = [threading.Thread(target=worker, daemon=True) for worker in workers]
    often = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    try:
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            for worker, other in zip(workers, reversed(workers), strict=True):
                while other.left:
                    stream = other.left.pop()
                    if worker.rng.integers(2):
                        stream.close()  # type: ignore[attr-defined]
                    del stream
            threads[0].join(0.01)
    finally:
        sys.setswitchinterval(often)
    assert sum(worker.done for worker in workers) >= 1000
    assert [worker.wrong for worker in workers] == [[], []]


def test_the_owners_own_calls_see_the_full_head_meanwhile(house: House) -> None:
    """While a request with a small head runs, another thread uses the model by itself."""
    made, wanted = house.models["masked"], house.models["full"].model
    ids = torch.arange(9)[None]
    before = wanted(input_ids=ids).logits
    seen: list[bool] = []

    def looks(_: torch.Tensor) -> torch.Tensor:
        seen.append(torch.equal(elsewhere(lambda: wanted(input_ids=ids).logits), before))
        return torch.zeros(1, 1, 4)

    from tascade.decode.lm_head import install_slot

    slot = install_slot(made.model)
    with exclusive(made.model), slot.using(looks):
        assert made.model(input_ids=ids, logits_to_keep=1).logits.shape[-1] == 4
    assert seen == [True]
    assert torch.equal(wanted(input_ids=ids).logits, before)


def test_one_lock_for_each_model_that_any_thread_may_release() -> None:
    one, two = tiny_model("llama"), tiny_model("llama")
    entered = exclusive(one)
    entered.__enter__()
    with exclusive(one), exclusive(two):
        pass  # re-entrant, and another model is another matter
    elsewhere(lambda: entered.__exit__(None, None, None))

    def use() -> str:
        with exclusive(one):
            return "free"

    assert elsewhere(use) == "free"


def test_a_models_lock_goes_with_it(tmp_path: Path) -> None:
    from tascade.decode import exclusive as module

    before = len(module._locks)
    model = tiny_model("llama")
    with exclusive(model):
        assert len(module._locks) == before + 1
    del model
    gc.collect()
    assert len(module._locks) <= before


def test_an_assistant_may_be_the_model_of_another(house: House) -> None:
    """Each is the other's assistant, in two threads: neither waits for ever."""
    from tascade.draft.neural.load import open_assistant

    model, tokenizer = house.models["full"].model, house.models["full"].tokenizer
    second = copy.deepcopy(model)
    pack = house.models["full"].pack
    pairs = []
    for big, small in ((model, second), (second, model)):
        drafts = open_assistant((small, tokenizer), pack)
        pairs.append(TaskModel(big, tokenizer, pack, head="full", assistant=drafts))
    got: dict[int, list[Any]] = {0: [], 1: []}

    def work(which: int) -> None:
        for prompt in PROMPTS * 2:
            got[which].append(pairs[which].run(prompt, **OPTIONS[0]).tokens)

    threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    wanted = [house.wanted("full", prompt, OPTIONS[0]) for prompt in PROMPTS * 2]
    assert got == {0: wanted, 1: wanted}


def test_closing_is_what_a_with_block_does(house: House) -> None:
    made = house.models["exact"]
    with closing(made.steps(made.encode(PROMPTS[0]), made.params(**OPTIONS[0]))) as steps:
        next(steps)
    assert made.decoder.target.hold is None

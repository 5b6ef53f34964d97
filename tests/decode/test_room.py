"""Caches keep room for the next request, not for the longest that ever came."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tascade.decode.batch import BatchDecoder
from tascade.decode.batch_target import BatchTarget
from tascade.decode.cache import RewindableCache
from tascade.decode.loop import AllNodes, Decoder
from tascade.decode.sampling import SamplingParams
from tascade.decode.target import Target
from tascade.draft.budget import NoDrafter
from tascade.draft.neural.draft_model import AssistantDrafter
from tascade.testing import OracleDrafter, tiny_model

LONG, SHORT = [i * 7 % 96 for i in range(20_000)], list(range(1, 40))
FEW, MANY = SamplingParams(max_new_tokens=2), SamplingParams(max_new_tokens=30)


def model() -> Any:
    return tiny_model("llama", max_position_embeddings=32768)


def held(cache: Any) -> int:
    """Bytes that a cache keeps from being freed."""
    tensors = [*getattr(cache, "_stacks", ())]
    for layer in cache.layers:
        tensors += [layer.keys, layer.values] if layer.is_initialized else []
    found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(found.values())


def places(cache: Any) -> list[int]:
    return [layer.keys.data_ptr() for layer in cache.layers]


def test_a_long_request_does_not_hold_its_room_for_the_short_ones_after_it() -> None:
    target = Target(model())
    said = Decoder(target, NoDrafter()).generate(SHORT, MANY).tokens
    decoder = Decoder(target, OracleDrafter(said, 5))
    assert decoder.generate(SHORT, MANY).tokens == said
    usual, before = held(target.cache), places(target.cache)
    assert decoder.generate(SHORT, MANY).tokens == said
    assert places(target.cache) == before  # the same buffers are used again
    decoder.generate(LONG, FEW)
    assert held(target.cache) > 20 * usual
    assert decoder.generate(SHORT, MANY).tokens == said
    assert held(target.cache) <= usual
    assert decoder.generate(SHORT, MANY).tokens == said


def test_nor_does_one_that_is_left_halfway() -> None:
    target = Target(model())
    decoder = Decoder(target, NoDrafter())
    wanted = decoder.generate(SHORT, MANY).tokens
    usual = held(target.cache)
    stream = decoder.stream(LONG[:5000], MANY)
    next(stream)
    del stream
    assert decoder.generate(SHORT, MANY).tokens == wanted
    assert held(target.cache) <= usual


def test_what_is_kept_when_room_is_given_back_stays_what_it_was() -> None:
    cache = RewindableCache()
    states = torch.randn(1, 2, 3000, 4)
    cache.update(states, -states, 0)
    cache.truncate(700)
    cache.give_back()
    assert held(cache) == 2 * 700 * 8 * 4
    keys, values = cache.update(states[:, :, 700:710], -states[:, :, 700:710], 0)
    assert torch.equal(keys, states[:, :, :710])
    assert torch.equal(values, -states[:, :, :710])


def test_an_assistant_keeps_no_long_prompt_either() -> None:
    target, second = Target(model()), Target(model())
    drafter = AssistantDrafter(second)
    decoder = Decoder(target, drafter, AllNodes(4))
    decoder.generate(SHORT, MANY)
    usual = held(second.cache)
    decoder.generate(LONG[:5000], MANY)
    assert held(second.cache) > 8 * usual
    wanted = Decoder(Target(model()), NoDrafter()).generate(SHORT, MANY).tokens
    assert decoder.generate(SHORT, MANY).tokens == wanted
    assert held(second.cache) <= usual


@pytest.mark.parametrize("place", [0, 3])
def test_a_batch_gives_back_what_one_long_request_made_for_all(place: int) -> None:
    decoder = BatchDecoder(BatchTarget(model()), size=4)
    cache, short = decoder.target.cache, [SHORT[i:] for i in range(6)]
    wanted = [made.tokens for made in decoder.generate(short, MANY)]
    usual = held(cache)
    again = places(cache)
    assert [made.tokens for made in decoder.generate(short, MANY)] == wanted
    assert places(cache) == again
    asked, each = [*short], [MANY] * 6
    asked.insert(place, LONG)
    each.insert(place, FEW)
    most, last = 0, 0
    told: dict[int, list[int]] = {}
    for which, _, made in decoder.stream(asked, each):
        most, last, told[which] = max(most, held(cache)), held(cache), made.tokens
    assert most > 40 * usual
    assert last == usual  # the short ones went on for a while
    del told[place]
    assert [told[i] for i in sorted(told)] == wanted
    assert [made.tokens for made in decoder.generate(short, MANY)] == wanted
    assert held(cache) == usual


def test_a_batch_that_ends_with_a_long_request_keeps_nothing_of_it() -> None:
    decoder = BatchDecoder(BatchTarget(model()), size=4)
    decoder.generate([*[SHORT] * 3, LONG[:3000]], FEW)
    assert held(decoder.target.cache) == 0
    assert len(decoder.generate([SHORT], MANY)[0].tokens) == 30

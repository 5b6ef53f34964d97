"""Learning in the real engine: the answers, all of them, and no word of the users'."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from vllm_engine import engine, watched

from tascade.draft.corpus import CorpusIndex
from tascade.draft.learned import COPIES
from vllm import SamplingParams

WHOLE = SamplingParams(temperature=0.0, max_tokens=96)
USERS_WORDS = list(range(2000, 2020))


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("learned") / "corpus"


@pytest.fixture(scope="module")
def llm(ticket_pack: Path, learned: Path) -> Any:
    return engine(ticket_pack, budget=False, learn=learned)


def answers(llm: Any, prompts: list[list[int]], params: Any = WHOLE) -> list[tuple[int, ...]]:
    """The answers that ended by themselves, end token included; the others empty."""
    requests = [{"prompt_token_ids": prompt} for prompt in prompts]
    outputs = [request.outputs[0] for request in llm.generate(requests, params, use_tqdm=False)]
    return [tuple(o.token_ids) if o.finish_reason == "stop" else () for o in outputs]


def documents(llm: Any, folder: Path) -> Counter[tuple[int, ...]]:
    llm.collective_rpc("tascade_flush")
    return Counter(tuple(tokens.tolist()) for _, tokens in CorpusIndex.open(folder).documents())


def test_only_answers_are_learned_and_each_of_them(
    llm: Any, learned: Path, prompts: list[dict[str, list[int]]]
) -> None:
    first = [prompt["prompt_token_ids"] for prompt in prompts[0:72:3]]
    said = answers(llm, first)
    assert watched(llm)["drafted_ends"] > 5  # else this could not have failed
    # In each chat's next turn the prompt is the last one, its answer and the user's words.
    turns = [
        prompt + list(answer) + USERS_WORDS[i % 7 :]
        for i, (prompt, answer) in enumerate(zip(first, said, strict=True))
        if answer
    ]
    assert len(turns) > 12
    for turn in turns[:4]:  # one at a time: in the row of the one before
        said += answers(llm, [turn])
    said += answers(llm, turns)
    wanted = {answer: min(n, COPIES) for answer, n in Counter(said).items() if answer}
    assert documents(llm, learned) == wanted


def test_an_answer_that_ignores_its_end_is_learned_once_up_to_it(
    llm: Any, learned: Path, prompts: list[dict[str, list[int]]]
) -> None:
    before = documents(llm, learned)
    prompt = prompts[0]["prompt_token_ids"] + [5, 6, 7]
    [answer] = answers(llm, [prompt])
    assert answer
    between = documents(llm, learned)
    assert between - before == Counter([answer])
    answers(llm, [prompt], SamplingParams(temperature=0.0, max_tokens=400, ignore_eos=True))
    assert documents(llm, learned) - between == Counter([answer])

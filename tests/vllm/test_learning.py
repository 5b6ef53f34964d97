"""Learning in the real engine: the answers, all of them, and no word of the users'."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from vllm_engine import engine, watched

from tascade.index.corpus import CorpusIndex
from tascade.index.learned import COPIES
from vllm import SamplingParams

WHOLE = SamplingParams(temperature=0.0, max_tokens=96)
USERS_WORDS = list(range(2000, 2020))


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("learned") / "corpus"


@pytest.fixture(scope="module")
def llm(ticket_pack: Path, learned: Path) -> Any:
    return engine(ticket_pack, budget=False, learn=learned)


def answers(
    llm: Any, prompts: list[list[int]], params: Any = WHOLE
) -> list[tuple[bool, tuple[int, ...]]]:
    """For each prompt: whether its answer ended by itself, and the answer, end token included."""
    requests = [{"prompt_token_ids": prompt} for prompt in prompts]
    outputs = [request.outputs[0] for request in llm.generate(requests, params, use_tqdm=False)]
    return [(o.finish_reason == "stop", tuple(o.token_ids)) for o in outputs]


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
        for i, (prompt, (ended, answer)) in enumerate(zip(first, said, strict=True))
        if ended
    ]
    assert len(turns) > 12
    for turn in turns[:4]:  # one at a time: in the row of the one before
        said += answers(llm, [turn])
    said += answers(llm, turns)
    wanted = Counter(answer for ended, answer in said if ended)
    found = documents(llm, learned)
    assert {answer: found[answer] for answer in wanted} == {
        answer: min(n, COPIES) for answer, n in wanted.items()
    }
    # Besides, answers that max_tokens cut in the very step in which their end token was sampled.
    cut = {answer for ended, answer in said if not ended}
    most = WHOLE.max_tokens + 12
    for document in found.keys() - wanted.keys():
        assert document[: WHOLE.max_tokens] in cut
        assert len(document) <= most


def test_an_answer_that_ignores_its_end_is_learned_once_up_to_it(
    llm: Any, learned: Path, prompts: list[dict[str, list[int]]]
) -> None:
    before = documents(llm, learned)
    prompt = prompts[0]["prompt_token_ids"] + [5, 6, 7]
    [(ended, answer)] = answers(llm, [prompt])
    assert ended
    between = documents(llm, learned)
    assert between - before == Counter([answer])
    answers(llm, [prompt], SamplingParams(temperature=0.0, max_tokens=400, ignore_eos=True))
    assert documents(llm, learned) - between == Counter([answer])

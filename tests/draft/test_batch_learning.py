"""What a batch's drafter tells of finished answers: what was sampled for them, and nothing else."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from tascade.draft.ngram.batch import BatchDrafter
from tascade.draft.ngram.sources import Task
from tascade.index.corpus import CorpusIndex

END = 1
ROWS, LENGTH, MOST = 4, 96, 4
WORDS = np.arange(10, 14)
"""Few words for all, so that contents meet often; users have words of their own besides."""
USERS = 100
CONVERSATIONS = 2_000

Tokens = tuple[int, ...]


@dataclass(eq=False)
class Request:
    """A request: ``said`` is what the runner sampled for it, with what the scheduler drops.

    ``chunks``: steps that its prompt takes; ``gaps``: how much it had said where it went on unseen;
    ``resumed``: where it came back after a preemption.
    """

    prompt: Tokens
    left: int
    ignores_end: bool
    chunks: int
    said: list[int] = field(default_factory=list)
    gaps: list[int] = field(default_factory=list)
    resumed: list[int] = field(default_factory=list)

    @property
    def tokens(self) -> Tokens:
        return (*self.prompt, *self.said)

    @property
    def answer(self) -> Tokens:
        """What the user gets: up to the first end token, unless it is to be ignored."""
        end = END in self.said and not self.ignores_end
        return tuple(self.said[: self.said.index(END) + 1] if end else self.said)


class Engine:
    """Plays vLLM: a runner that keeps all it samples, and a scheduler that ends requests later."""

    def __init__(self, drafting: BatchDrafter, rng: np.random.Generator, tells: bool) -> None:
        self.drafter, self.rng, self.tells = drafting, rng, tells
        self.ids = np.zeros((ROWS, LENGTH), np.int32)
        self.lengths = np.zeros(ROWS, np.int32)
        self.prompts = np.zeros(ROWS, np.int64)
        self.rows: list[Request] = []
        self.seen: list[tuple[Request, Tokens]] = []
        """Every request whose first end token came in a step that the drafter saw."""

    def add(self, request: Request) -> None:
        row, tokens = len(self.rows), request.tokens
        self.ids[row, : len(tokens)] = tokens
        self.lengths[row], self.prompts[row] = len(tokens), len(request.prompt)
        self.rows.append(request)

    def remove(self, request: Request) -> None:
        """The last row takes the place of the one that ended."""
        row, last = self.rows.index(request), len(self.rows) - 1
        for kept in (self.ids, self.lengths, self.prompts):
            kept[row] = kept[last]
        self.rows[row] = self.rows[last]
        self.rows.pop()

    def swap(self) -> None:
        a, b = self.rng.choice(len(self.rows), 2, replace=False)
        for kept in (self.ids, self.lengths, self.prompts):
            kept[[a, b]] = kept[[b, a]]
        self.rows[a], self.rows[b] = self.rows[b], self.rows[a]

    def _sample(self, row: int) -> list[int]:
        """Drafted tokens that are taken, and one more; an end token may stand anywhere in them."""
        if self.rows[row].chunks:
            self.rows[row].chunks -= 1
            return []
        new = self.rng.choice(WORDS, self.rng.integers(1, MOST + 2))
        new[self.rng.random(len(new)) < 0.12] = END
        return [int(token) for token in new[: LENGTH - int(self.lengths[row])]]

    def step(self, *, drafts: bool) -> list[Request]:
        """One step, in which the drafter is asked or not. Returns the requests that ended."""
        sampled = [self._sample(row) for row in range(len(self.rows))]
        for row, (request, new) in enumerate(zip(self.rows, sampled, strict=True)):
            n = int(self.lengths[row])
            self.ids[row, n : n + len(new)] = new
            self.lengths[row] += len(new)
            first = END in new and END not in request.said
            request.said += new
            if new and not drafts:
                request.gaps.append(len(request.said))
            elif first:
                self.seen.append((request, tuple(request.said[: request.said.index(END) + 1])))
        if drafts:
            prompts = self.prompts if self.tells else None
            found = self.drafter.propose(sampled, self.lengths, self.ids, prompts=prompts)
            assert len(found) == len(sampled)
        ended = []
        for row, request in enumerate(self.rows):
            request.left -= len(sampled[row])
            stopped = END in request.said and not request.ignores_end
            if stopped or request.left <= 0 or self.lengths[row] > LENGTH - MOST - 2:
                ended.append(request)
        for request in ended:
            self.remove(request)
        return ended


def next_turn(request: Request | None, rng: np.random.Generator, repeats: bool) -> Tokens:
    """A first prompt, or one that goes on from a request; some add no word of the user's."""
    if request is None:
        return (
            *rng.choice(WORDS, rng.integers(0, 3)),
            USERS + rng.integers(0, 4 if repeats else 10**6),
        )
    if repeats and rng.random() < 0.3:
        return (*request.prompt, *request.answer)
    words = USERS + rng.integers(0, 50, rng.integers(1, 5))
    if repeats and rng.random() < 0.5:
        words = rng.choice([*WORDS, END], len(words))
    return (*request.prompt, *request.answer, *words)


def converse(engine: Engine, told: list[tuple[Tokens, Tokens]], *, repeats: bool) -> list[Request]:
    """2,000 conversations of one to four requests. ``repeats``: users repeat each other's words."""
    rng, begun, everything = engine.rng, 0, []
    waiting: list[Request] = []

    def ask(after: Request | None) -> None:
        prompt = tuple(int(token) for token in next_turn(after, rng, repeats))
        if len(prompt) < LENGTH // 2:
            left, chunks = int(rng.integers(1, 24)), int(rng.integers(0, 3))
            everything.append(Request(prompt, left, bool(rng.random() < 0.2), chunks))
            waiting.append(everything[-1])

    while begun < CONVERSATIONS or engine.rows or waiting:
        while begun < CONVERSATIONS and len(engine.rows) + len(waiting) < ROWS:
            ask(None)
            begun += 1
        while waiting and len(engine.rows) < ROWS:
            engine.add(waiting.pop(0))
        if len(engine.rows) > 1 and rng.random() < 0.2:
            engine.swap()
        if rng.random() < 0.05:  # preempted, or gone for good
            gone = engine.rows[rng.integers(len(engine.rows))]
            engine.remove(gone)
            if rng.random() < 0.5:
                gone.resumed.append(len(gone.said))
                gone.chunks = int(rng.integers(0, 2))
                waiting.append(gone)
            continue
        for request in engine.step(drafts=rng.random() > 0.04):
            if rng.random() < 0.7:
                ask(request)
            if waiting and rng.random() < 0.8:
                engine.add(waiting.pop(0))  # in the row that became free, at the next step
    return everything


@pytest.fixture
def told() -> list[tuple[Tokens, Tokens]]:
    return []


def engine_for(told: list[tuple[Tokens, Tokens]], *, tells: bool, seed: int) -> Engine:
    drafting = BatchDrafter(
        [Task(None)],
        end_tokens=[END],
        requests=ROWS,
        length=LENGTH,
        most=MOST,
        threads=1,
        on_end=lambda prompt, output: told.append((tuple(prompt.tolist()), tuple(output.tolist()))),
    )
    return Engine(drafting, np.random.default_rng(seed), tells)


def test_where_prompts_are_told_each_answer_is_told_as_it_is(
    told: list[tuple[Tokens, Tokens]],
) -> None:
    engine = engine_for(told, tells=True, seed=0)
    everything = converse(engine, told, repeats=True)
    assert len(everything) > CONVERSATIONS
    assert Counter(told) == Counter((request.prompt, said) for request, said in engine.seen)
    assert len(told) > CONVERSATIONS


def test_by_tokens_alone_each_answer_is_told_that_was_seen_whole(
    told: list[tuple[Tokens, Tokens]],
) -> None:
    engine = engine_for(told, tells=False, seed=1)
    everything = converse(engine, told, repeats=False)
    found = Counter(told)
    counts = Counter[str]()
    for request, said in engine.seen:
        # It may begin late where the drafter was not asked, or its slot went to another meanwhile.
        gap = max([n for n in request.gaps if n < len(said)], default=0)
        begins = {gap, *(n for n in request.resumed if gap < n < len(said))}
        kinds = [(request.prompt + said[:n], said[n:]) for n in begins]
        [got] = [kind for kind in kinds if found[kind]]
        found[got] -= 1
        counts["whole" if got[0] == request.prompt else "tail"] += 1
    # An answer that goes on behind its first end token, which was not seen, looks like a new one.
    for prompt, output in +found:
        assert any(
            request.ignores_end
            and len(prompt) - len(request.prompt) in request.gaps
            and request.tokens[: len(prompt + output)] == prompt + output
            for request in everything
        )
    assert counts["whole"] > CONVERSATIONS
    assert counts["tail"] > 20


def test_by_tokens_alone_nothing_is_told_that_was_not_sampled_behind_the_same_words(
    told: list[tuple[Tokens, Tokens]],
) -> None:
    engine = engine_for(told, tells=False, seed=2)
    everything = converse(engine, told, repeats=True)
    sampled = {
        request.tokens[: n + 1]
        for request in everything
        for n in range(len(request.prompt), len(request.tokens))
    }
    for prompt, output in told:
        assert output.index(END) == len(output) - 1
        for n in range(len(prompt), len(prompt) + len(output)):
            assert (prompt + output)[: n + 1] in sampled
    assert len(told) > CONVERSATIONS


def test_an_end_token_that_was_drafted_ends_the_answer(
    tmp_path: Path, told: list[tuple[Tokens, Tokens]]
) -> None:
    corpus = CorpusIndex.build(tmp_path / "i", [[5, 6, 7, END]] * 9, vocab_size=64, fingerprint="t")
    engine = engine_for(told, tells=False, seed=0)
    engine.drafter.tasks[:] = [Task(corpus)]
    engine.drafter.refresh()
    engine.add(Request((40, 41), 9, False, 0))
    engine.ids[0, 2], engine.lengths[0] = 5, 3
    [draft] = engine.drafter.propose([[5]], engine.lengths, engine.ids)
    assert draft == [6, 7, END]
    new = [*draft, 13]  # all is taken, and vLLM's sampler puts a token of its own behind
    engine.ids[0, 3:7], engine.lengths[0] = new, 7
    engine.drafter.propose([new], engine.lengths, engine.ids)
    assert told == [((40, 41), (5, 6, 7, END))]

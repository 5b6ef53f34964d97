"""A few held-out answers kept with a trained drafter: is it as good here as it was there?

Names and weights may fit and the drafter still read other states than it learned from: an attention
or a rotation that is set up otherwise, a layer that a library changed. Then it drafts badly, and
nothing else says so.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tascade.decode.prefixes import Prefixes
from tascade.draft.neural.network import DraftNetwork
from tascade.draft.neural.training import DraftVocabulary, Pair, acceptance, read_states
from tascade.util.fields import typed

_ROWS, _TOKENS = 8, 384
"""Most answers that are kept, and their tokens with prompts: a part of a second at the start."""
_WORSE = 0.05


@dataclass(frozen=True, slots=True)
class Canary:
    """Held-out answers, and how a drafter did on them.

    rows: of each, how long its prompt is, and the tokens of prompt and answer
    right: share of the likeliest next tokens that were right
    """

    rows: tuple[tuple[int, tuple[int, ...]], ...]
    right: float

    @classmethod
    def of(
        cls, model: Any, network: DraftNetwork, vocabulary: DraftVocabulary, pairs: Sequence[Pair]
    ) -> Canary | None:
        """The shortest of some answers; ``None`` where none is short enough."""
        rows: list[tuple[int, tuple[int, ...]]] = []
        left = _TOKENS
        for prompt, answer in sorted(pairs, key=lambda pair: len(pair[0]) + len(pair[1])):
            left -= len(prompt) + len(answer)
            if left < 0 or len(rows) == _ROWS:
                break
            rows.append((len(prompt), (*prompt.tolist(), *answer.tolist())))
        if not rows:
            return None
        return cls(tuple(rows), cls(tuple(rows), 0.0).measure(model, network, vocabulary))

    def measure(self, model: Any, network: DraftNetwork, vocabulary: DraftVocabulary) -> float:
        """The share of likeliest next tokens that are right here."""
        pairs = [
            (np.asarray(ids[:at], np.int32), np.asarray(ids[at:], np.int32))
            for at, ids in self.rows
        ]
        samples = read_states(model, pairs, Prefixes(()), lambda *_: None, network.shape.taps)
        return acceptance(network, samples, model.get_input_embeddings(), vocabulary, 1)[0][0]

    def warn_if_worse(self, model: Any, network: DraftNetwork, vocabulary: DraftVocabulary) -> None:
        """Warn where it is right less often than it was, by more than five in a hundred."""
        here = self.measure(model, network, vocabulary)
        if here < self.right - _WORSE:
            warnings.warn(
                f"the trained drafter is right in {here:.0%} of the next tokens of its held-out "
                f"answers here, and was in {self.right:.0%}: it reads other states than it learned "
                "from. Answers stay the model's, but come later; `tascade drafter` trains it again",
                stacklevel=2,
            )

    def fits(self, vocabulary: int) -> bool:
        """Whether all tokens are among so many."""
        return all(0 <= token < vocabulary for _, ids in self.rows for token in ids)

    @classmethod
    def from_json(cls, raw: Any) -> Canary | None:
        """As a file has it; ``None`` for a file of before.

        Raises:
            ValueError, TypeError, KeyError, ConfigError: it is damaged.
        """
        if raw is None:
            return None
        rows = typed(list, raw["rows"], "canary")
        if not 0 < len(rows) <= _ROWS:
            raise ValueError(f"a canary of {len(rows)} rows")
        read = []
        for at, ids in rows:
            tokens = tuple(typed(int, token, "canary") for token in typed(list, ids, "canary"))
            if not 0 < typed(int, at, "canary") < len(tokens) - 1 or len(tokens) > _TOKENS:
                raise ValueError("a canary's row has no prompt, no answer, or no end")
            read.append((at, tokens))
        return cls(tuple(read), typed(float, raw["right"], "canary"))

"""A proposer that notes, of every draft, whether its request could have made it."""

from __future__ import annotations

from typing import Any

from tascade.index.corpus import CorpusIndex
from tascade.integrations.vllm import TascadeProposer, WorkerExtension


def spoken(corpus: Any) -> set[int]:
    """The ids that occur in a corpus: any other in a draft comes from a request's own tokens."""
    return {token for _, document in corpus.documents() for token in document.tolist()}


class WatchedProposer(TascadeProposer):
    """Counts drafted tokens that no corpus holds, and of them those its request does not hold.

    ``drafted_ends`` counts end tokens that have another token behind them: they were drafted.
    """

    secrets = leaks = calls = drafted_ends = 0

    def __init__(self, vllm_config: Any) -> None:
        super().__init__(vllm_config)
        corpora = [task.corpus for task in self.drafter.tasks]
        # Not where documents are learned while it runs: nobody asks for leaks there.
        self.common = set().union(*(spoken(c) for c in corpora if isinstance(c, CorpusIndex)))

    def propose(
        self,
        sampled_token_ids: Any,
        num_tokens_no_spec: Any,
        token_ids_cpu: Any,
        slot_mappings: Any = None,
    ) -> list[list[int]]:
        drafts = super().propose(sampled_token_ids, num_tokens_no_spec, token_ids_cpu)
        self.calls += 1
        ends = set(self.drafter.end_tokens.tolist())
        self.drafted_ends += sum(not ends.isdisjoint(new[:-1]) for new in sampled_token_ids)
        for row, draft in enumerate(drafts):
            wanted = set(draft) - self.common
            self.secrets += len(wanted)
            if wanted:
                held = token_ids_cpu[row, : num_tokens_no_spec[row]].tolist()
                self.leaks += len(wanted - set(held))
        return drafts


class WatchingExtension(WorkerExtension):
    def tascade_watched(self) -> dict[str, int]:
        proposer = self.model_runner.drafter
        return {
            "secrets": proposer.secrets,
            "leaks": proposer.leaks,
            "calls": proposer.calls,
            "drafted_ends": proposer.drafted_ends,
        }

    def tascade_flush(self) -> None:
        """What was learned so far is on disk."""
        self.model_runner.drafter._learner.flush()

    def tascade_break(self, times: int) -> None:
        """The next calls of the drafter raise, half of them when their work is done."""
        drafter = self.model_runner.drafter.drafter
        whole, left = drafter.propose, iter(range(times))

        def broken(*given: Any) -> Any:
            planted = next(left, None)
            if planted is None:
                return whole(*given)
            if planted % 2:
                whole(*given)
            raise RuntimeError("planted")

        drafter.propose = broken

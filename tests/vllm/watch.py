"""A proposer that notes, of every draft, whether its request could have made it."""

from __future__ import annotations

from typing import Any

from tascade.integrations.vllm import TascadeProposer, WorkerExtension


def spoken(corpus: Any) -> set[int]:
    """The ids that occur in a corpus: any other in a draft comes from a request's own tokens."""
    return {token for _, document in corpus.documents() for token in document.tolist()}


class WatchedProposer(TascadeProposer):
    """Counts drafted tokens that no corpus holds, and of them those its request does not hold."""

    secrets = leaks = calls = 0

    def __init__(self, vllm_config: Any) -> None:
        super().__init__(vllm_config)
        self.common = set().union(*(spoken(task.corpus) for task in self.drafter.tasks))

    def propose(
        self,
        sampled_token_ids: Any,
        num_tokens_no_spec: Any,
        token_ids_cpu: Any,
        slot_mappings: Any = None,
    ) -> list[list[int]]:
        drafts = super().propose(sampled_token_ids, num_tokens_no_spec, token_ids_cpu)
        self.calls += 1
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
        }

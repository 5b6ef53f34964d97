"""Counters and histograms in Prometheus's format, a registry for each server."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from tascade.core import Generation, Source

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_TOKENS = (1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32)


class Metrics:
    """What a server counts. Times in seconds."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "tascade_requests", "Requests answered.", ["endpoint", "status"], registry=registry
        )
        self.prompt_tokens = Counter("tascade_prompt_tokens", "Tokens read.", registry=registry)
        self.tokens = Counter(
            "tascade_completion_tokens", "Tokens said, by who drafted them.", ["source"],
            registry=registry,
        )  # fmt: skip
        self.drafted = Counter("tascade_drafted_tokens", "Tokens drafted.", registry=registry)
        self.accepted = Counter("tascade_accepted_tokens", "Drafts accepted.", registry=registry)
        self.cancelled = Counter("tascade_cancelled", "Requests given up.", registry=registry)
        self.waiting = Gauge("tascade_queue_depth", "Requests waiting.", registry=registry)
        self.per_step = Histogram(
            "tascade_tokens_per_step", "Tokens a step.", buckets=_TOKENS, registry=registry
        )
        self.queue_time = self._seconds("tascade_queue_seconds", "Waiting for its turn.")
        self.first_token = self._seconds("tascade_first_token_seconds", "Until the first token.")
        self.whole = self._seconds("tascade_request_seconds", "From arrival to the last token.")

    def _seconds(self, name: str, text: str) -> Histogram:
        return Histogram(name, text, buckets=_SECONDS, registry=self.registry)

    def finished(self, result: Generation) -> None:
        """Count a finished answer."""
        self.prompt_tokens.inc(result.prompt_tokens)
        for source in result.sources:
            self.tokens.labels(Source(source).name.lower()).inc()
        self.drafted.inc(sum(step.drafted for step in result.steps))
        self.accepted.inc(sum(step.accepted for step in result.steps))
        if result.forwards:
            self.per_step.observe(result.tokens_per_step)

    def text(self) -> bytes:
        """The page that Prometheus reads."""
        return generate_latest(self.registry)

"""One worker that answers requests in their order, what it is told, and what it counts."""

from __future__ import annotations

import json
import logging
import queue
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from tascade.core import Generation, IntArray, Source, TokenLogprob
from tascade.decode.grammar import JSONGrammars
from tascade.decode.sampling import Processor, SamplingParams
from tascade.decode.text import TextStream
from tascade.errors import ConfigError
from tascade.index.traffic import TrafficLearner
from tascade.model import TaskModel
from tascade.serve.failures import APIError
from tascade.serve.logprobs import TokenBytes

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


@dataclass(frozen=True, slots=True)
class Settings:
    """Limits and addresses of the built-in server.

    ``name``: what the API calls the model; ``aliases``: other names that it is asked for by;
    ``api_key``: empty for none; ``max_queue``: requests that may wait (one is always being
    answered); ``max_body``: bytes of a request's body;
    ``max_prompt``: tokens of a prompt; ``timeout``: seconds a request may take, waiting included;
    ``grace``: seconds to finish what was begun after a signal to stop; ``cors_origins``: pages that
    may ask from a browser, ``*`` for any.
    """

    name: str
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str = ""
    max_queue: int = 64
    max_body: int = 4 * 1024 * 1024
    max_prompt: int = 8192
    max_tokens: int = 4096
    max_n: int = 8
    timeout: float = 120.0
    grace: float = 20.0
    cors_origins: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Every name that a request may ask for."""
        return (self.name, *self.aliases)

    def __post_init__(self) -> None:
        for name in ("max_queue", "max_body", "max_prompt", "max_tokens", "max_n", "timeout"):
            if getattr(self, name) <= 0:
                raise ConfigError(
                    f"{name} is out of range", got=getattr(self, name), wanted="above 0"
                )
        if self.grace < 0:
            raise ConfigError("grace is out of range", got=self.grace, wanted="0 or more seconds")


_log = logging.getLogger("tascade.serve")


@dataclass(frozen=True, slots=True)
class Delta:
    """A part of an answer: new text, new tokens' log-probabilities; ``result`` with the last."""

    text: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()
    result: Generation | None = None
    failure: APIError | None = None


@dataclass(slots=True)
class Job:
    """One prompt to answer. ``emit`` is called from the worker's thread.

    ``streamed``: with a piece for every step, else with the whole answer at its end. ``schema``:
    a JSON schema that the answer is held to.
    """

    prompt: IntArray
    params: SamplingParams
    emit: Callable[[Delta], None]
    deadline: float
    streamed: bool = False
    schema: dict[str, Any] | None = None
    arrived: float = field(default_factory=time.monotonic)
    given_up: threading.Event = field(default_factory=threading.Event)


def _full() -> APIError:
    message = "too many requests are waiting; try again"
    return APIError(429, message, code="queue_full", retry_after=1)


def _stopped() -> APIError:
    # Another server, or this one once it is back, may well answer.
    return APIError(503, "the server is stopping", code="stopping", retry_after=5)


class Engine:
    """Owns the model: a queue, and the thread that decodes one request at a time."""

    def __init__(
        self,
        model: TaskModel,
        settings: Settings,
        metrics: Metrics,
        learner: TrafficLearner | None = None,
    ) -> None:
        self.model, self.settings, self.metrics, self.learner = model, settings, metrics, learner
        self._queue: queue.Queue[Job | None] = queue.Queue(settings.max_queue)
        self._thread = threading.Thread(target=self._work, name="tascade-engine", daemon=True)
        self.token_bytes = TokenBytes(model.tokenizer)
        self._grammars: JSONGrammars | None = None
        self.ready = threading.Event()
        self._stopping = threading.Event()
        self._ended = threading.Event()
        self._current: Job | None = None
        self.fault: Exception | None = None

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return self._queue.qsize()

    def start(self) -> None:
        """Start the worker, which first warms up: measures step costs, compiles kernels."""
        self._thread.start()

    def submit(self, *jobs: Job) -> None:
        """Put jobs in the queue, all of them or none.

        Raises:
            APIError: 400 for more jobs than the queue holds when it is empty, 429 while it is too
                full for them, 503 when the server is stopping, 500 when it failed to start.
        """
        if self.fault is not None:
            raise APIError(500, "the server failed to start", code="failed")
        if self._stopping.is_set():
            raise _stopped()
        if len(jobs) > self.settings.max_queue:
            raise APIError(
                400,
                f"{len(jobs)} answers (prompts times n) in one request are too many; at most "
                f"{self.settings.max_queue} fit into this server's queue (--max-queue)",
                code="too_many_answers",
            )
        if self._queue.qsize() + len(jobs) > self.settings.max_queue:
            self._forget_left()
        if self._queue.qsize() + len(jobs) > self.settings.max_queue:
            raise _full()
        try:
            for job in jobs:
                self._queue.put_nowait(job)
        except queue.Full:
            for job in jobs:
                job.given_up.set()
            raise _full() from None
        self.metrics.waiting.set(self._queue.qsize())

    def _forget_left(self) -> None:
        """Take out of the queue whoever has gone away meanwhile."""
        with self._queue.mutex:
            waiting = [job for job in self._queue.queue if job is None or not job.given_up.is_set()]
            gone = len(self._queue.queue) - len(waiting)
            self._queue.queue = deque(waiting)
            self._queue.unfinished_tasks -= gone
            self._queue.not_full.notify(gone)
        self.metrics.cancelled.inc(gone)

    def stop(self) -> None:
        """Take nothing new; what is under way or waiting may still finish within the grace."""
        if not self._stopping.is_set():
            self._stopping.set()
            threading.Thread(target=self._close, name="tascade-stop", daemon=True).start()

    def join(self, timeout: float) -> bool:
        """Wait for the worker to end; says whether it did."""
        return self._ended.wait(timeout)

    def _close(self) -> None:
        end = time.monotonic() + self.settings.grace
        while time.monotonic() < end and (self._current is not None or self._queue.qsize()):
            time.sleep(0.02)
        stopped = Delta(failure=_stopped())
        running = self._current
        if running is not None:
            running.given_up.set()
            running.emit(stopped)
        while True:
            try:
                job = self._queue.get_nowait()
            except queue.Empty:
                break
            if job is not None:
                job.given_up.set()
                job.emit(stopped)
        self._queue.put(None)

    def _work(self) -> None:
        try:
            self._warm_up()
        except Exception as error:
            self.fault = error
            self._note(error)
            self._ended.set()
            return
        self.ready.set()
        while (job := self._queue.get()) is not None:
            self.metrics.waiting.set(self._queue.qsize())
            self._current = job
            try:
                self._answer(job)
            except Exception as error:  # one request must not end the server
                self._note(error)
                job.emit(Delta(failure=APIError(500, "the request failed", code="internal")))
            finally:
                self._current = None
        self._ended.set()

    def _note(self, error: Exception) -> None:
        # Where it happened, not what it says: a message may quote somebody's prompt.
        frames = traceback.extract_tb(error.__traceback__)[-4:]
        places = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames]
        _log.error(json.dumps({"error": type(error).__name__, "at": places}))

    def _warm_up(self) -> None:
        params = self.model.params(max_new_tokens=8, ignore_end=True)
        for _ in self.model.steps(self.model.encode("warm up"), params):
            pass

    def _answer(self, job: Job) -> None:
        begun = time.monotonic()
        if job.given_up.is_set():
            self.metrics.cancelled.inc()
            return
        self.metrics.queue_time.observe(begun - job.arrived)
        try:
            processors = self._processors(job)
        except ConfigError as error:
            said = f"{error.message}: {error.got}"
            job.emit(Delta(failure=APIError(400, said, param="response_format")))
            return
        text, told = TextStream(self.model.tokenizer, job.params), 0
        result: Generation | None = None
        with closing(self.model.steps(job.prompt, job.params, processors)) as steps:
            for _, result in steps:
                if told == 0:
                    self.metrics.first_token.observe(time.monotonic() - job.arrived)
                if job.given_up.is_set():
                    self.metrics.cancelled.inc()
                    return
                if time.monotonic() > job.deadline:
                    late = APIError(504, "the request took too long", code="timeout")
                    job.emit(Delta(failure=late))
                    return
                if job.streamed:
                    job.emit(Delta(text.take(result), tuple(result.logprobs[told:])))
                told = len(result.tokens)
        assert result is not None
        self.metrics.finished(result)
        self.metrics.whole.observe(time.monotonic() - job.arrived)
        self._learn(job, result)
        job.emit(Delta(result=result))

    def _processors(self, job: Job) -> list[Processor]:
        if job.schema is None:
            return []
        if self._grammars is None:  # a second's work, for those who ask for it
            size, ends = self.model.target.vocab_size, self.model.ends
            self._grammars = JSONGrammars(self.model.tokenizer, size, ends)
        return [self._grammars.processor(job.schema, len(job.prompt))]

    def _learn(self, job: Job, result: Generation) -> None:
        if self.learner is None or result.finish_reason != "stop":
            return
        self.learner.offer(job.prompt.tolist(), result.tokens)
        if self.learner.refresh_due():
            self.model.decoder.drafter.refresh()  # type: ignore[attr-defined]

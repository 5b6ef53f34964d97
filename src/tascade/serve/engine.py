"""One worker that answers requests in their order; the others wait in a bounded queue."""

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

from tascade.core import Generation, IntArray, TokenLogprob
from tascade.decode.sampling import SamplingParams
from tascade.decode.text import TextStream
from tascade.index.traffic import TrafficLearner
from tascade.model import TaskModel
from tascade.serve.metrics import Metrics
from tascade.serve.requests import Refusal
from tascade.serve.settings import Settings

_log = logging.getLogger("tascade.serve")


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of an answer: new text, new tokens' log-probabilities; ``result`` with the last."""

    text: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()
    result: Generation | None = None
    failure: Refusal | None = None


@dataclass(slots=True)
class Job:
    """One prompt to answer. ``emit`` is called from the worker's thread.

    ``streamed``: with a piece for every step, else with the whole answer at its end.
    """

    prompt: IntArray
    params: SamplingParams
    emit: Callable[[Piece], None]
    deadline: float
    streamed: bool = False
    arrived: float = field(default_factory=time.monotonic)
    given_up: threading.Event = field(default_factory=threading.Event)


def _full() -> Refusal:
    message = "too many requests are waiting; try again"
    return Refusal(429, message, code="queue_full", retry_after=1)


def _stopped() -> Refusal:
    # Another server, or this one once it is back, may well answer.
    return Refusal(503, "the server is stopping", code="stopping", retry_after=5)


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
            Refusal: 400 for more jobs than the queue holds when it is empty, 429 while it is too
                full for them, 503 when the server is stopping, 500 when it failed to start.
        """
        if self.fault is not None:
            raise Refusal(500, "the server failed to start", code="failed")
        if self._stopping.is_set():
            raise _stopped()
        if len(jobs) > self.settings.max_queue:
            raise Refusal(
                400,
                f"{len(jobs)} answers (prompts times n) in one request are too many; at most "
                f"{self.settings.max_queue} fit into this server's queue",
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
        stopped = Piece(failure=_stopped())
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
                job.emit(Piece(failure=Refusal(500, "the request failed", code="internal")))
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
        text, told = TextStream(self.model.tokenizer, job.params), 0
        result: Generation | None = None
        with closing(self.model.steps(job.prompt, job.params)) as steps:
            for _, result in steps:
                if told == 0:
                    self.metrics.first_token.observe(time.monotonic() - job.arrived)
                if job.given_up.is_set():
                    self.metrics.cancelled.inc()
                    return
                if time.monotonic() > job.deadline:
                    late = Refusal(504, "the request took too long", code="timeout")
                    job.emit(Piece(failure=late))
                    return
                if job.streamed:
                    job.emit(Piece(text.take(result), tuple(result.logprobs[told:])))
                told = len(result.tokens)
        assert result is not None
        self.metrics.finished(result)
        self.metrics.whole.observe(time.monotonic() - job.arrived)
        self._learn(job, result)
        job.emit(Piece(result=result))

    def _learn(self, job: Job, result: Generation) -> None:
        if self.learner is None or result.finish_reason != "stop":
            return
        self.learner.offer(job.prompt.tolist(), result.tokens)
        if self.learner.refresh_due():
            self.model.decoder.drafter.refresh()  # type: ignore[attr-defined]

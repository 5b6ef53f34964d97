"""One client's request as jobs of the engine, and their pieces brought back to its event loop."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from tascade.core import Generation, IntArray
from tascade.data.encode import encode_opening
from tascade.decode.sampling import SamplingParams
from tascade.decode.supported import check_ids
from tascade.errors import TascadeError
from tascade.serve.engine import Delta, Engine, Job
from tascade.serve.failures import APIError
from tascade.serve.requests import ChatRequest, CompletionRequest

_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "skip_special_tokens")


class ClientRequest:
    """The jobs of one request: ``n`` for each prompt, seeds counting up from the given one.

    Raises:
        APIError: an option out of range, an answer longer than fits, a full queue.
    """

    def __init__(
        self,
        engine: Engine,
        request: ChatRequest | CompletionRequest,
        prompts: Sequence[IntArray],
    ) -> None:
        self.engine, self.request = engine, request
        self._loop = asyncio.get_running_loop()
        self._pieces: asyncio.Queue[tuple[int, Delta]] = asyncio.Queue()
        settings = engine.settings
        if request.n > settings.max_n:
            raise APIError(400, f"n is at most {settings.max_n} here (--max-n)", param="n")
        deadline = time.monotonic() + settings.timeout
        seed = secrets.randbits(62) if request.seed is None else request.seed
        self.jobs: list[Job] = []
        form = request.response_format
        schema = None if form is None else form.schema_of_answer
        for prompt in prompts:
            for i in range(request.n):
                params = sampling(engine, request, seed + i, len(prompt))
                number = len(self.jobs)
                emit = self._emitter(number)
                self.jobs.append(Job(prompt, params, emit, deadline, request.stream, schema))
        self.results: list[Generation | None] = [None] * len(self.jobs)
        engine.submit(*self.jobs)

    def _emitter(self, number: int) -> Any:
        def emit(piece: Delta) -> None:
            try:
                self._loop.call_soon_threadsafe(self._pieces.put_nowait, (number, piece))
            except RuntimeError:  # the loop is closed: nobody listens
                self.jobs[number].given_up.set()

        return emit

    async def pieces(self) -> AsyncIterator[tuple[int, Delta]]:
        """Every piece of every answer as it comes, until all are whole.

        Raises:
            APIError: the engine failed, stopped, or took too long.
        """
        left = len(self.jobs)
        last = max(job.deadline for job in self.jobs) + 5.0
        while left:
            try:
                wait = max(0.0, last - time.monotonic())
                number, piece = await asyncio.wait_for(self._pieces.get(), wait)
            except TimeoutError:
                raise APIError(504, "the request took too long", code="timeout") from None
            if piece.failure is not None:
                raise piece.failure
            if piece.result is not None:
                self.results[number] = piece.result
                left -= 1
            yield number, piece

    def done(self) -> list[Generation]:
        """All answers, in order."""
        return [result for result in self.results if result is not None]

    def give_up(self) -> None:
        """Nobody waits any more: let the engine go on to the next request."""
        for job in self.jobs:
            job.given_up.set()


def encoded(engine: Engine, request: ChatRequest | CompletionRequest) -> list[IntArray]:
    """Token ids of the request's prompts.

    Raises:
        APIError: a prompt that is empty, too long, or no text of this tokenizer.
    """
    import numpy as np

    tokenizer, limit = engine.model.tokenizer, engine.settings.max_prompt
    found: list[IntArray] = []
    param = "messages" if isinstance(request, ChatRequest) else "prompt"
    try:
        if isinstance(request, ChatRequest):
            messages = [message.plain() for message in request.messages]
            goes_on = request.continue_final_message
            found.append(engine.model.encode(messages, request.chat_template_kwargs, goes_on))
        else:
            for prompt in request.prompts():
                if isinstance(prompt, str):
                    found.append(encode_opening(tokenizer, prompt))
                else:
                    found.append(np.asarray(prompt, np.int32))
    except TascadeError as error:
        chat = isinstance(request, ChatRequest) and request.chat_template_kwargs
        raise APIError(
            400, error.message, param="chat_template_kwargs" if chat else param
        ) from error
    except Exception as error:  # a chat template raises whatever it likes
        said = f"the prompt cannot be encoded: {type(error).__name__}: {error}"
        raise APIError(400, said, param=param) from error
    context = engine.model.target.context
    for ids in found:
        if len(ids) == 0:
            raise APIError(400, "the prompt is empty", param=param)
        if len(ids) > limit or (context is not None and len(ids) >= context):
            most = limit if context is None else min(limit, context - 1)
            raise APIError(
                400,
                f"the prompt has {len(ids)} tokens; at most {most} are read"
                + (" (--max-prompt-tokens)" if most == limit else ", by the model's positions"),
                param=param,
                code="context_length_exceeded",
            )
        try:
            check_ids(ids, engine.model.target.rows)
        except TascadeError as error:
            raise APIError(400, f"{error.message}: {error.got}", param=param) from error
    return found


def sampling(
    engine: Engine, request: ChatRequest | CompletionRequest, seed: int, prompt_tokens: int
) -> SamplingParams:
    """The request's sampling options.

    Raises:
        APIError: an option out of range.
    """
    most = engine.settings.max_tokens
    context = engine.model.target.context
    if context is not None:
        most = min(most, context - prompt_tokens)
    wanted, param = request.max_tokens, "max_tokens"
    if isinstance(request, ChatRequest) and request.max_completion_tokens:
        wanted, param = request.max_completion_tokens, "max_completion_tokens"
    if wanted is not None and wanted > most:
        raise APIError(
            400,
            f"{wanted} tokens behind a prompt of {prompt_tokens} are too many; {most} fit"
            + (" (--max-tokens)" if most == engine.settings.max_tokens else " into the context"),
            param=param,
            code="context_length_exceeded",
        )
    usual = engine.model.pack.info.max_new_tokens if isinstance(request, ChatRequest) else 16
    wanted = wanted or min(most, usual)
    asked: int | None = None
    if isinstance(request, ChatRequest):
        asked = (request.top_logprobs or 0) if request.logprobs else None
    else:
        asked = request.logprobs
    try:
        return engine.model.params(
            **_said(engine, request), seed=seed, max_new_tokens=wanted, logprobs=asked
        )
    except TascadeError as error:
        raise APIError(400, error.message) from error


def _said(engine: Engine, request: ChatRequest | CompletionRequest) -> dict[str, Any]:
    """What the request says of sampling; the checkpoint says the rest, and then OpenAI's API."""
    given = request.model_fields_set
    said = {name: getattr(request, name) for name in _SAMPLING if name in given}
    if "top_k" in said:
        said["top_k"] = max(said["top_k"], 0)
    if request.stops():
        said["stop"] = request.stops()
    if not engine.model.samples:
        said.setdefault("temperature", request.temperature)
    return said

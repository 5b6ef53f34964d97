"""Other people's ways of decoding faster, as methods of the bench."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from tascade.bench.machine import version
from tascade.bench.methods import DecoderMethod, Request, Skipped, VerifiedNodes
from tascade.core import EMPTY_TREE, DraftTree, Generation, IntArray, Source
from tascade.decode.exclusive import exclusive
from tascade.decode.loop import AllNodes, Decoder
from tascade.decode.sampling import SamplingParams
from tascade.decode.stop import StopRule
from tascade.decode.target import Target

# --- Arctic Inference: suffix decoding ----------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ArcticSettings:
    """Options of Arctic's suffix decoding; the defaults are vLLM's.

    depth: of the suffix trees, and most tokens of context; factor: drafted tokens per matched
    token; max_tokens: longest draft; min_prob: least estimated probability of a drafted token.
    """

    depth: int = 24
    factor: float = 1.0
    max_tokens: int = 16
    min_prob: float = 0.1

    def to_json(self) -> dict[str, float]:
        """As the method's settings in a bench result."""
        return {
            "max_tree_depth": self.depth,
            "max_spec_factor": self.factor,
            "max_spec_tokens": self.max_tokens,
            "min_token_prob": self.min_prob,
        }


ARCTIC_SETTINGS: dict[str, ArcticSettings] = {
    "arctic-suffix": ArcticSettings(),
    "arctic-suffix-64-2-32": ArcticSettings(64, 2.0, 32),
    "arctic-suffix-24-4-32": ArcticSettings(24, 4.0, 32),
}
"""By method name: vLLM's settings, and the two that did best in our replays."""


class ArcticDrafter:
    """Arctic Inference's suffix trees as a drafter of our loop, warmed with the task's outputs.

    Used as vLLM uses them: one tree over all outputs, one over each request's prompt and output;
    the draft with the higher score wins; outputs of finished requests stay in the shared tree
    until :meth:`reset`. Nothing is ever evicted for lack of room.

    Args:
        outputs: token ids of the task's outputs, end tokens included.
        settings: Arctic's options.
        max_new_tokens: the requests' cap; no draft reaches beyond it.

    Raises:
        ImportError: ``arctic_inference`` is not installed.
    """

    def __init__(
        self,
        outputs: Iterable[Sequence[int] | IntArray],
        settings: ArcticSettings | None = None,
        *,
        max_new_tokens: int = 1 << 30,
        name: str = "arctic-suffix",
    ) -> None:
        from arctic_inference.suffix_decoding import SuffixDecodingCache

        self.name, self.settings = name, settings or ArcticSettings()
        self._cap = max_new_tokens
        self._cache: Any = SuffixDecodingCache(max_tree_depth=self.settings.depth)
        self._next = 0
        self._active: int | None = None
        for output in outputs:
            self._open(np.empty(0, np.int32))
            self._cache.add_active_response(self._active, _contiguous(output))
            self._close()
        self._first_request = self._next

    def reset(self) -> None:
        """Drop every request's output from the shared tree; keep the task's."""
        self._close()
        for request in range(self._first_request, self._next):
            self._cache.evict_cached_response(request)
        self._first_request = self._next

    def start(self, prompt: IntArray) -> None:
        """Begin a request, and end the one before."""
        self._close()
        self._open(_contiguous(prompt))
        self._ids = np.empty(2 * len(prompt) + 512, np.int32)
        self._length = len(prompt)
        self._ids[: self._length] = prompt
        self._left = self._cap

    def propose(self, limit: int, floor: float = 0.0) -> DraftTree:
        """The chain that Arctic proposes. ``floor`` is ignored: its own least probability holds."""
        most = min(limit, self.settings.max_tokens, self._left - 1)
        if most <= 0:
            return EMPTY_TREE
        context = self._ids[max(0, self._length - self.settings.depth) : self._length]
        draft = self._cache.speculate(
            self._active,
            context,
            max_spec_tokens=most,
            max_spec_factor=self.settings.factor,
            min_token_prob=self.settings.min_prob,
        )
        if not draft.token_ids:
            return EMPTY_TREE
        survival = np.minimum(np.asarray(draft.probs, np.float32), 1.0)
        return DraftTree.chain(draft.token_ids, np.minimum.accumulate(survival), Source.OTHER)

    def commit(self, tokens: IntArray, verified: int, path: Sequence[int]) -> None:
        """Add the tokens to both trees."""
        self._cache.add_active_response(self._active, _contiguous(tokens))
        end = self._length + len(tokens)
        if end > len(self._ids):
            self._ids = np.concatenate((self._ids, np.empty(end, np.int32)))
        self._ids[self._length : end] = tokens
        self._length = end
        self._left -= len(tokens)

    def _open(self, prompt: IntArray) -> None:
        self._active, self._next = self._next, self._next + 1
        self._cache.start_request(self._active, prompt)

    def _close(self) -> None:
        if self._active is not None:
            self._cache.stop_request(self._active)
            self._active = None


def _contiguous(ids: Sequence[int] | IntArray) -> IntArray:
    # A copy: the extension takes writable arrays alone, and an index hands out read-only ones.
    return np.array(ids, dtype=np.int32, order="C")


def arctic_methods(
    target: Target,
    outputs: Iterable[Sequence[int] | IntArray],
    params: SamplingParams,
    tokenizer: Any = None,
    settings: dict[str, ArcticSettings] | None = None,
) -> Iterator[DecoderMethod | Skipped]:
    """Arctic at each of the settings (all of :data:`ARCTIC_SETTINGS`), in our loop.

    Every drafted token is verified, as vLLM does: choosing how many is no part of that drafter.
    """
    documents = list(outputs)
    for name, options in (ARCTIC_SETTINGS if settings is None else settings).items():
        described: dict[str, Any] = {**options.to_json(), "warm_outputs": len(documents)}
        try:
            drafter = ArcticDrafter(
                documents, options, max_new_tokens=params.max_new_tokens, name=name
            )
        except ImportError as error:
            reason = f"arctic_inference cannot be imported: {error}"
            yield Skipped(name, reason, described)
            continue
        described["arctic_inference"] = version("arctic-inference")
        decoder = Decoder(target, drafter, AllNodes(options.max_tokens), tokenizer)
        yield DecoderMethod(name, decoder, params, settings=described, reset_state=drafter.reset)


# --- Transformers: generate(), alone and with prompt lookup -------------------------------------


@dataclass(slots=True)
class HfMethod:
    """``model.generate`` of Transformers: greedy, the same cap and end tokens.

    Tokens after the end token are cut off. The text is made within the timed call, as in our loop.
    """

    name: str
    model: Any
    params: SamplingParams
    tokenizer: Any = None
    options: dict[str, Any] = field(default_factory=dict)
    guarantee: str = "lossless"

    @property
    def settings(self) -> dict[str, Any]:
        """What was passed to ``generate`` beyond cap and end tokens."""
        return {"do_sample": False, **self.options}

    def reset(self) -> None:
        """Nothing is kept."""

    def trace(self, requests: Sequence[Request]) -> VerifiedNodes | None:
        """The drafts are inside ``generate``."""
        return None

    @torch.inference_mode()
    def run(self, request: Request) -> Generation:
        """Generate once."""
        from transformers import GenerationConfig

        start = time.perf_counter()
        ids = [int(token) for token in request.prompt]
        ends = [] if self.params.ignore_end else list(self.params.end_tokens)
        config = GenerationConfig(
            max_new_tokens=self.params.max_new_tokens,
            do_sample=False,
            eos_token_id=ends or None,
            pad_token_id=ends[0] if ends else 0,
            **self.options,
        )
        prompt = torch.tensor([ids], device=self.model.device)
        with exclusive(self.model), _counting(self.model) as calls:
            out = self.model.generate(
                prompt, attention_mask=torch.ones_like(prompt), generation_config=config
            )
        tokens: list[int] = out[0, len(ids) :].tolist()
        end = next((i for i, token in enumerate(tokens) if token in ends), None)
        tokens = tokens if end is None else tokens[: end + 1]
        drafted = calls.first_length > len(ids)  # the prefill carried a draft
        result = Generation(
            tokens,
            text=StopRule(self.params, self.tokenizer).text(tokens),
            finish_reason="length" if end is None else "stop",
            forwards=calls.number - (not drafted),
            stepped_tokens=len(tokens) - (not drafted),
            prompt_tokens=len(ids),
            prefill_seconds=calls.first_ended - start,
        )
        result.seconds = time.perf_counter() - start
        return result


@dataclass(slots=True)
class _Calls:
    number: int = 0
    first_length: int = 0
    first_ended: float = 0.0


@contextmanager
def _counting(model: Any) -> Iterator[_Calls]:
    """Count the forwards of ``model``; about a microsecond each."""
    calls = _Calls()

    def before(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        calls.number += 1
        if calls.number == 1:
            calls.first_length = (args[0] if args else kwargs["input_ids"]).shape[1]

    def after(module: Any, args: Any, output: Any) -> None:
        if calls.number == 1:
            if model.device.type == "cuda":
                torch.cuda.synchronize()
            calls.first_ended = time.perf_counter()

    hooks = (
        model.register_forward_pre_hook(before, with_kwargs=True),
        model.register_forward_hook(after),
    )
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def hf_generate(model: Any, params: SamplingParams, tokenizer: Any = None) -> HfMethod | Skipped:
    """Plain ``generate``."""
    return _hf("hf-generate", model, params, tokenizer, {})


def hf_prompt_lookup(
    model: Any, params: SamplingParams, tokenizer: Any = None
) -> HfMethod | Skipped:
    """``generate`` with prompt lookup: ten tokens after the last place the same two stood."""
    return _hf("hf-prompt-lookup", model, params, tokenizer, {"prompt_lookup_num_tokens": 10})


def _hf(
    name: str, model: Any, params: SamplingParams, tokenizer: Any, options: dict[str, Any]
) -> HfMethod | Skipped:
    if params.temperature > 0:
        return Skipped(
            name, "draws with noise of its own when sampling: outputs cannot be compared"
        )
    if params.stop or params.repetition_penalty != 1.0:
        return Skipped(name, "runs here without stop strings and repetition penalty")
    return HfMethod(name, model, params, tokenizer, options)

"""LM heads that take the place of a model's own for a call: the slot, and what goes in."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from tascade.core import IntArray
from tascade.decode.exclusive import exclusive
from tascade.errors import UnsupportedModelError

Finish = Callable[[torch.Tensor], torch.Tensor]
"""What a model does to its head's output [..., V] before it calls it logits."""

HeadLike = Callable[[torch.Tensor], torch.Tensor]
"""[..., d] final states -> [..., n] logits."""


class SmallHead(Protocol):
    """A head over some of the vocabulary's tokens.

    See :class:`tascade.tailor.head.RequestHead`.
    """

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., d] final states -> [..., n] logits of the tokens it has."""
        ...

    def __contains__(self, token: object) -> bool:
        """Whether it has this token."""
        ...

    def begin(self, prompt: IntArray) -> None:
        """Start a request: forget the tokens of the one before, take those of ``prompt`` [T]."""
        ...

    def extend(self, tokens: Sequence[int] | IntArray) -> int:
        """Take these tokens too; how many of them were new."""
        ...

    def spread(self, logits: torch.Tensor) -> torch.Tensor:
        """[N, n] -> [N, V] float32 by token id, minus infinity where it has no token."""
        ...

    def argmax(self, logits: torch.Tensor) -> list[int]:
        """[N, n] -> each row's largest, as a token id; of equals the lowest id."""
        ...


class SmallLogits:
    """A small head's logits [N, n]. Only rows that somebody looks at become as wide as the
    vocabulary, as 64 rows of 151,936 cost a CPU 25 ms.

    Attributes:
        values: [N, n].
    """

    def __init__(self, head: SmallHead, values: torch.Tensor) -> None:
        self.head, self.values, self.device = head, values, values.device

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, row: int) -> torch.Tensor:
        """[V] float32 logits by token id."""
        return self.head.spread(self.values[row][None])[0]

    def argmax_rows(self, rows: slice = slice(None)) -> list[int]:
        """The token of the largest logit in each of these rows."""
        return self.head.argmax(self.values[rows])


class SharedHead(Protocol):
    """A small head for several requests. See :class:`tascade.tailor.head.UnionHead`."""

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., d] final states -> [..., n] logits of all tokens that any request has."""
        ...

    def join(self, tokens: Sequence[int] | IntArray) -> int:
        """A request comes, with these tokens; returns its ticket."""
        ...

    def extend(self, ticket: int, tokens: Sequence[int] | IntArray) -> int:
        """A request takes these tokens too; how many were new to it."""
        ...

    def leave(self, ticket: int) -> None:
        """A request goes."""
        ...

    def has(self, ticket: int, token: int) -> bool:
        """Whether a request can say a token."""
        ...

    def spread(self, logits: torch.Tensor, tickets: Sequence[int]) -> torch.Tensor:
        """[N, n] -> [N, V] float32 by token id, minus infinity where a request has no token."""
        ...

    def argmax(self, logits: torch.Tensor, tickets: Sequence[int]) -> list[int]:
        """[N, n] -> each row's largest, as a token id; of equals the lowest id."""
        ...


class HeadSlot:
    """Puts other heads in the place of a model's LM head, for a call at a time.

    Nothing of it stays in the model, and nothing is seen there meanwhile: the head is the same
    module with the same name and weights, which only computes something else.

    Attributes:
        full: the head of the whole vocabulary, the model's own module.
        states: [1, n, d] the final states that went through the slot last.
    """

    def __init__(self, full: torch.nn.Module) -> None:
        self.full = full
        self.states = torch.empty(0)
        self._guest: HeadLike | None = None

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """[B, n, d] -> the logits of the head in use."""
        return self._through(hidden, self.full)

    def _through(self, hidden: torch.Tensor, full: HeadLike) -> torch.Tensor:
        # Of a prompt's states the last is asked for: as a view with their stride, which one state
        # alone may keep, a product in bfloat16 takes 80 times longer on some CPUs.
        hidden = hidden.contiguous().view(-1, hidden.shape[-1]).view(hidden.shape)
        self.states = hidden
        return (full if self._guest is None else self._guest)(hidden)

    @contextmanager
    def using(self, head: HeadLike | None) -> Iterator[None]:
        """Use another head for a while, in this thread; ``None`` for the full one.

        It may call the full one itself. Another thread that runs the model by itself, as its owner
        may, finds the full head.
        """
        at, own, us = vars(self.full), vars(self.full).get("forward"), threading.get_ident()
        usual: HeadLike = self.full.forward
        before, inside = self._guest, False

        def forward(hidden: torch.Tensor) -> torch.Tensor:
            nonlocal inside
            if inside or threading.get_ident() != us:
                return usual(hidden)
            inside = True
            try:
                return self._through(hidden, usual)
            finally:
                inside = False

        self._guest, at["forward"] = head, forward
        try:
            yield
        finally:
            self._guest = before
            at.pop("forward")
            if own is not None:
                at["forward"] = own


def ids_device(model: Any) -> torch.device:
    """Where a model wants its token ids: on the host, if that is where its embedding is."""
    on_host = getattr(model.get_input_embeddings(), "takes_host_ids", False)
    device: torch.device = torch.device("cpu") if on_host else model.device
    return device


def install_slot(model: Any) -> HeadSlot:
    """A slot for a model's LM head. The model is not touched but while the slot is in use.

    Raises:
        UnsupportedModelError: the model has no LM head that can be replaced.
    """
    head = model.get_output_embeddings()
    if head is None:
        raise UnsupportedModelError(
            "this model has no LM head to make smaller",
            got=type(model).__name__,
            wanted="a causal model with get_output_embeddings()",
            fix="use it without a tailored vocabulary",
        )
    return HeadSlot(head)


@torch.inference_mode()
def finisher(model: Any) -> Finish:
    """What a model does to the logits behind its LM head.

    Found by its config's fields (soft caps of Gemma, scales of Cohere and Granite), and then tried
    on a few tokens: what is not one of these is refused, not guessed.

    Raises:
        UnsupportedModelError: it does something else.
    """
    slot, config = install_slot(model), model.config.get_text_config()
    raw: list[torch.Tensor] = []

    def few(hidden: torch.Tensor) -> torch.Tensor:
        # Any numbers will do, and these need no weights.
        raw.append(hidden[..., : min(64, hidden.shape[-1])] * 8)
        return raw[0].clone()

    with exclusive(model), slot.using(few):
        ids = torch.arange(1, 9, device=model.device)[None]
        seen = model(input_ids=ids, use_cache=False).logits
    for finish in _finishes(config):
        if torch.equal(finish(raw[0].clone()).to(seen.dtype), seen):
            return finish
    raise UnsupportedModelError(
        "this model changes its logits in a way that tascade does not know",
        got=type(model).__name__,
        wanted="logits that are the LM head's output, soft-capped or scaled at most",
        fix="use it without a tailored vocabulary",
    )


def _finishes(config: Any) -> Iterator[Finish]:
    yield lambda logits: logits
    cap = getattr(config, "final_logit_softcapping", None)
    if cap:
        yield lambda logits: torch.tanh(logits / cap) * cap
    scale = getattr(config, "logit_scale", None)
    if scale:
        yield lambda logits: logits * scale
    scaling = getattr(config, "logits_scaling", None)
    if scaling:
        yield lambda logits: logits / scaling

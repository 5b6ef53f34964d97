"""Transformers' own ``generate`` over a tailored head, with nearly all that it can do.

    with masked_generation(task_model, input_ids, attention_mask) as model:
        model.generate(input_ids, attention_mask=attention_mask, num_beams=4)

The head computes the logits of the task's tokens and of all prompts' own; each prompt's sequences
may say the task's and its own. Those logits leave the model by token id, with minus infinity for
the rest, so that beams, processors, end tokens, grammars, scores and streamers work as ever: what
is generated is what the full head with that mask would have generated.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from transformers import GenerationMixin

from tascade.decode.exclusive import exclusive
from tascade.decode.heads import install_slot
from tascade.errors import ConfigError
from tascade.tailored import Tailored
from tascade.vocab.union import UnionHead

_NEUTRAL: dict[str, tuple[object, ...]] = {
    "assistant_model": (None,),
    "prompt_lookup_num_tokens": (None,),
    "assistant_early_exit": (None,),
    "use_mtp": (None, False),
    "custom_generate": (None,),
    "guidance_scale": (None, 1, 1.0),
    "penalty_alpha": (None, 0, 0.0),
    "dola_layers": (None,),
    "num_beam_groups": (None, 1),
    "constraints": (None,),
    "force_words_ids": (None,),
    "token_healing": (None, False),
}
"""Options of ``generate`` that run other prompts or look past the head, and their off values."""


class HasTailored(Protocol):
    """What a :class:`tascade.TaskModel` has."""

    @property
    def tailored(self) -> Tailored | None:
        """The model's small head."""
        ...


@contextmanager
def masked_generation(
    task_model: Tailored | HasTailored,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    head: UnionHead | None = None,
) -> Iterator[Any]:
    """Give a model a head of the task's tokens and these prompts' for a while.

    Its ``generate`` then takes these prompts alone, and returns what the full head would with all
    but a prompt's tokens ruled out, whichever prompts are beside it. A prompt's tokens are the
    task's, its own and every end token of the call. This approximates the model, also where the
    task model's head is ``exact``. Nothing else may use the model meanwhile: requests of other
    threads wait. It is left as it was, by errors too.

    Refused are assistant models and prompt lookup, ``custom_generate``, classifier-free guidance,
    contrastive search, DoLa, group beams, constraints, token healing and ``generate_batch``.

    Args:
        task_model: with a tailored head.
        input_ids: [B, T] the prompts.
        attention_mask: [B, T] zero where there is padding, whose token is not the prompt's.
        head: of :func:`union_head`, to be used again and again; a new one by default.

    Yields:
        The task model's own Transformers model.

    Raises:
        ConfigError: no tailored head, prompts of another shape, or another model's ``head``; from
            the model: other prompts, or an option that cannot be honoured, which it names.
    """
    made = _tailored(task_model)
    model = made.target.model
    if head is not None and head.table is not made.head.table:
        raise ConfigError(
            "the head was made for another model", wanted="union_head() of this task model"
        )
    batch = _Batch(head or union_head(made), input_ids, attention_mask)
    slot = install_slot(model)
    with exclusive(model):
        if isinstance(vars(model).get("generate"), _Generate):
            raise ConfigError(
                "this model is generating with a masked head already",
                wanted="one masked_generation() at a time",
                fix="leave the first before the second, or put all prompts in one batch",
            )
        before = {name: vars(model)[name] for name in _OURS if name in vars(model)}
        generate = _Generate(model, batch)
        hook = model.register_forward_hook(batch.widen)
        try:
            vars(model).update(generate=generate, generate_batch=generate.refuse_batches)
            # Everywhere: with a streamer, generate() runs in a thread of the caller's.
            with slot.using(batch.logits, everywhere=True), batch.joined():
                yield model
        finally:
            hook.remove()
            for name in _OURS:
                vars(model).pop(name, None)
            vars(model).update(before)


def union_head(task_model: Tailored | HasTailored) -> UnionHead:
    """A head for :func:`masked_generation`: the task's rows, and room for those of prompts.

    Raises:
        ConfigError: the task model has the full head.
    """
    made = _tailored(task_model)
    own, model = made.head, made.target.model
    static = own.ids[: own.static].cpu().numpy()
    return UnionHead(own.table, static, bias=made.bias, device=model.device, dtype=model.dtype)


_OURS = ("generate", "generate_batch")


def _tailored(task_model: Any) -> Tailored:
    made = task_model if isinstance(task_model, Tailored) else getattr(task_model, "tailored", None)
    if not isinstance(made, Tailored):
        raise ConfigError(
            "there is no tailored head to generate with",
            got=type(task_model).__name__,
            wanted="a TaskModel whose head is masked or exact",
            fix='open the pack with head="masked"; `tascade tailor PACK --data TRAIN` makes one',
        )
    return made


class _Batch:
    """The prompts of a batch, and what their sequences may say.

    The rows of a forward are the prompts' sequences, those of one prompt side by side, as
    Transformers puts beams and returned sequences.
    """

    def __init__(self, head: UnionHead, ids: torch.Tensor, mask: torch.Tensor | None) -> None:
        mask = torch.ones_like(ids) if mask is None else mask.to(ids.device)
        if ids.dim() != 2 or not len(ids) or mask.shape != ids.shape:
            raise ConfigError(
                "the prompts are no batch",
                got=f"input_ids {list(ids.shape)}, attention_mask {list(mask.shape)}",
                wanted="[B, T], both",
            )
        self.head, self.ids, self.mask = head, ids, mask.bool()
        self._tickets: list[int] = []
        self._rows = 0  # of the forward under way, once its head was asked

    @contextmanager
    def joined(self, others: Sequence[int] = ()) -> Iterator[None]:
        """Let each prompt's sequences say its tokens and ``others``, for a while."""
        before, tickets = self._tickets, list[int]()
        try:
            for row, there in zip(self.ids, self.mask, strict=True):
                tickets.append(self.head.join([*row[there].tolist(), *others]))
            self._tickets = tickets
            yield
        finally:
            self._tickets = before
            for ticket in tickets:
                self.head.leave(ticket)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[R, n, d] final states -> [R, n, U]: what the model takes for its head's output."""
        if len(hidden) % len(self.ids):
            raise ConfigError(
                "the rows of this forward are not sequences of the prompts",
                got=f"{len(hidden)} rows",
                wanted=f"a multiple of {len(self.ids)}, as many for each prompt",
                fix="give the model the prompts that masked_generation() was given",
            )
        self._rows = len(hidden)
        return self.head(hidden)  # type: ignore[no-any-return]

    def widen(self, model: Any, given: Any, output: Any) -> Any:
        """Put the model's logits by token id: its forward hook.

        Behind all that the model does to them: a soft cap would make a number of minus infinity.
        """
        rows, self._rows = self._rows, 0
        logits = getattr(output, "logits", None)
        if rows == 0 or logits is None or getattr(output, "loss", None) is not None:
            raise ConfigError(
                "this forward has not gone through the masked head as generate() does it",
                wanted="model.generate(), or a forward that returns a dict of logits and no loss",
                fix="use nothing else of the task model inside masked_generation()",
            )
        each = rows // len(self.ids) * logits.shape[1]
        owners = [ticket for ticket in self._tickets for _ in range(each)]
        wide = self.head.spread(logits.flatten(0, 1), owners)
        output.logits = wide.view(rows, -1, self.head.vocab_size)
        return output


class _Generate:
    """Stands before a model's ``generate``: the same prompts, every end token, nothing unmasked."""

    def __init__(self, model: Any, batch: _Batch) -> None:
        self.model, self.batch, self.inner = model, batch, model.generate

    def __call__(self, inputs: torch.Tensor | None = None, *args: Any, **options: Any) -> Any:
        """Transformers' ``generate``."""
        names = list(inspect.signature(GenerationMixin.generate).parameters)[2:]
        given = {**dict(zip(names, args, strict=False)), **options}
        for option, neutral in _NEUTRAL.items():
            if (value := self._option(given, option)) not in neutral:
                raise _refusal(option, value, " or ".join(map(str, neutral)))
        if self._option(given, "cache_implementation") == "paged":
            raise _refusal("cache_implementation", "paged", "any other")
        self._check_prompts(given.get("input_ids") if inputs is None else inputs, given)
        if self.model.device.type != "cpu":
            # A compiled forward would keep the rows and the masks it was compiled with.
            options.setdefault("disable_compile", True)
        ends = self._option(given, "eos_token_id")
        ends = [] if ends is None else torch.as_tensor(ends).flatten().tolist()
        # Some switch the end token off by an id that no token has.
        known = [end for end in ends if 0 <= end < self.batch.head.vocab_size]
        with self.batch.joined(known):
            return self.inner(inputs, *args, **options)

    def refuse_batches(self, *args: Any, **options: Any) -> Any:
        """``generate_batch`` puts all prompts into one row."""
        raise _refusal("generate_batch", "continuous batching", "generate()")

    def _option(self, given: dict[str, Any], name: str) -> Any:
        """What ``generate`` takes an option to be."""
        if name in given:
            return given[name]
        value = getattr(given.get("generation_config"), name, None)
        return getattr(self.model.generation_config, name, None) if value is None else value

    def _check_prompts(self, ids: torch.Tensor | None, given: dict[str, Any]) -> None:
        """Refuse prompts that are not those whose tokens the head has."""
        batch, embeddings = self.batch, given.get("inputs_embeds")
        if ids is not None and not (
            ids.shape == batch.ids.shape and torch.equal(ids.to(batch.ids.device), batch.ids)
        ):
            raise _refusal("input_ids", list(ids.shape), "those of masked_generation()")
        if ids is None and (embeddings is None or len(embeddings) != len(batch.ids)):
            raise _refusal("inputs", "other prompts or none", "those of masked_generation()")
        mask = given.get("attention_mask")
        if mask is not None and not torch.equal(mask.to(batch.mask.device).bool(), batch.mask):
            raise _refusal("attention_mask", "another", "that of masked_generation()")


def _refusal(option: str, got: object, wanted: str) -> ConfigError:
    return ConfigError(
        f"masked_generation cannot honour {option}",
        got=got,
        wanted=wanted,
        where=option,
        fix="leave it out, or generate with the model's full head",
    )

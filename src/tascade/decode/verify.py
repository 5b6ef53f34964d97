"""Verification: walk a draft tree along the tokens that plain decoding takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from tascade.core import DraftTree, Source, TokenLogprob
from tascade.decode.lm_head import SmallLogits
from tascade.decode.sampling import Sampler, argmax_of, log_probability


@dataclass(slots=True)
class Walk:
    """Outcome of one verification.

    ``tokens``: committed ids, at least one; ``path``: accepted nodes, root to leaf; ``sources``:
    who proposed each token; ``stopped``: whether the last token ends the request.
    """

    tokens: list[int]
    path: list[int]
    sources: list[int]
    stopped: bool
    logprobs: list[TokenLogprob] = field(default_factory=list)


Prefix = Callable[[list[int]], torch.Tensor]
"""Ids of the request so far and these tokens behind them, [1, T]."""


def walk(
    tree: DraftTree,
    logits: torch.Tensor | SmallLogits,
    chooser: Sampler,
    position: int,
    prefix: Prefix,
    is_last: Callable[[list[int]], bool],
    *,
    doubt: float | None = None,
) -> Walk:
    """Take, at each node, the token plain decoding takes; follow the child that holds it.

    The first token that no child holds is still the target's own, so it is committed too: a walk
    over ``a`` accepted nodes yields ``a + 1`` tokens, unless one of them ends the request.

    Args:
        tree: [N] nodes.
        logits: [1 + N, V], after the last committed token and after each node.
        chooser: how a token is chosen.
        position: index in the output of the first token to choose.
        prefix: gives the ids a logits processor wants to see.
        is_last: whether these newly committed tokens end the request.
        doubt: where a node out of place rounds otherwise than plain decoding (see
            :data:`tascade.decode.row_counts.DOUBT`): what is chosen behind it must be so far ahead,
            as a share of the row's largest logit. Else the walk ends with the node's own token, and
            the next pass, in which it is in place, chooses. ``None`` where all nodes are alike.
    """
    children = {
        (parent, token): i
        for i, (parent, token) in enumerate(
            zip(tree.parents.tolist(), tree.tokens.tolist(), strict=True)
        )
    }
    best = argmax_of(logits) if chooser.is_argmax else None
    empty = torch.empty(1, 0, dtype=torch.long, device=logits.device)
    out = Walk([], [], [], False)
    node = -1
    while True:
        if best is not None:
            token = best(node + 1)
        else:
            before = prefix(out.tokens) if chooser.needs_prefix else empty
            token = chooser.choose(logits[node + 1], before, position + len(out.tokens))
        child = children.get((node, token))
        out.tokens.append(token)
        if chooser.params.logprobs is not None:
            top = chooser.params.logprobs
            out.logprobs.append(log_probability(logits[node + 1], token, top))
        out.sources.append(int(Source.TARGET if child is None else tree.source[child]))
        if child is not None:
            out.path.append(child)
        if is_last(out.tokens):
            out.stopped = True
            return out
        if child is None:
            return out
        node = child
        # Nodes are in depth-first order: one is in place where nothing but its path is before it.
        if (
            doubt is not None
            and child >= len(out.path)
            and (best is None or not _is_clear(logits, child + 1, doubt))
        ):
            return out


def _is_clear(logits: torch.Tensor | SmallLogits, row: int, doubt: float) -> bool:
    """Whether a row's largest logit is far enough ahead of the others."""
    if isinstance(logits, SmallLogits):
        return False
    first, second = logits[row].float().topk(2).values.tolist()
    return bool(first - second > doubt * float(logits[row].abs().max()))

"""The network of a trained drafter: one decoder layer over the target's states (EAGLE-3.1).

Row ``i`` knows the target's states behind token ``i`` and token ``i + 1`` itself, and says token
``i + 2``. To go on from what it drafted, it takes its own output in place of the target's states.
To go along tokens that another drafter proposes, it takes one learned state for all of them: then
no row waits for the one before, and one pass reads the whole path (P-EAGLE's, arXiv 2602.01469,
for tokens that are known).

Source: EAGLE-3 (arXiv 2503.01840), section 3; the norms of the states and of the output that is
fed back are EAGLE-3.1's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

_EPSILON, _THETA = 1e-5, 10_000.0


@dataclass(frozen=True, slots=True)
class DraftShape:
    """Sizes of the network, the target's own, and which of its states it reads.

    hidden: d, width of the target's states
    heads, kv_heads, head_dim: of attention
    intermediate: width of the MLP
    vocabulary: Vd, tokens that it can say
    taps: the states that enter these layers of the target are read
    epsilon: of the norms
    theta: base of the rotary frequencies
    """

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    taps: tuple[int, ...]
    epsilon: float
    theta: float

    @classmethod
    def of(cls, config: Any, vocabulary: int) -> DraftShape:
        """A network for a target of this configuration.

        Args:
            config: the target's text config.
            vocabulary: tokens that it can say.
        """
        layers, heads = int(config.num_hidden_layers), int(config.num_attention_heads)
        taps = tuple(sorted({min(2, layers - 1), layers // 2, max(0, layers - 3)}))
        rope = getattr(config, "rope_parameters", None) or {}
        theta = rope.get("rope_theta") or getattr(config, "rope_theta", None) or _THETA
        return cls(
            hidden=int(config.hidden_size),
            heads=heads,
            kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
            head_dim=int(getattr(config, "head_dim", None) or config.hidden_size // heads),
            intermediate=int(getattr(config, "intermediate_size", None) or 4 * config.hidden_size),
            vocabulary=vocabulary,
            taps=taps,
            epsilon=float(getattr(config, "rms_norm_eps", None) or _EPSILON),
            theta=float(theta),
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return dataclasses.asdict(self)


class _Norm(nn.RMSNorm):
    """As nn.RMSNorm; under autocast too its weights are in the input's precision."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


Keys = tuple[torch.Tensor, torch.Tensor]
"""Keys and values [B, kv_heads, T, head_dim]."""


class DraftNetwork(nn.Module):
    """See the module. Embeddings are the target's own and are given, not held."""

    def __init__(self, shape: DraftShape) -> None:
        super().__init__()
        d, self.shape = shape.hidden, shape

        def norm() -> _Norm:
            return _Norm(d, shape.epsilon)

        self.tap_norms = nn.ModuleList(norm() for _ in shape.taps)
        self.fc = nn.Linear(len(shape.taps) * d, d, bias=False)
        self.word_norm, self.state_norm = norm(), norm()
        self.q = nn.Linear(2 * d, shape.heads * shape.head_dim, bias=False)
        self.k = nn.Linear(2 * d, shape.kv_heads * shape.head_dim, bias=False)
        self.v = nn.Linear(2 * d, shape.kv_heads * shape.head_dim, bias=False)
        self.o = nn.Linear(shape.heads * shape.head_dim, d, bias=False)
        self.mlp_norm, self.norm = norm(), norm()
        self.gate = nn.Linear(d, shape.intermediate, bias=False)
        self.up = nn.Linear(d, shape.intermediate, bias=False)
        self.down = nn.Linear(shape.intermediate, d, bias=False)
        self.head = nn.Linear(d, shape.vocabulary, bias=False)
        self.constant = nn.Parameter(torch.randn(d))
        self.set_turns()

    def set_turns(self) -> None:
        """Compute the rotary frequencies: they are no weights, and stay in float32."""
        half = torch.arange(0, self.shape.head_dim, 2, dtype=torch.float32, device="cpu")
        self.turns = self.shape.theta ** -(half / self.shape.head_dim)

    def fuse(self, taps: torch.Tensor) -> torch.Tensor:
        """The target's states [..., taps * d] -> what row ``i`` begins with [..., d]."""
        parts = taps.view(*taps.shape[:-1], -1, self.shape.hidden).unbind(-2)
        normed = [norm(part) for norm, part in zip(self.tap_norms, parts, strict=True)]
        return self.fc(torch.cat(normed, dim=-1))  # type: ignore[no-any-return]

    def mix(self, words: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """[..., 2 d] what attention reads of rows.

        Args:
            words: [..., d] embeddings of the token behind each row.
            states: [..., d] what :meth:`fuse` made of the target's states, or the own output.
        """
        return torch.cat((self.word_norm(words), self.state_norm(states)), dim=-1)

    def queries(self, mixed: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """[B, heads, T, D] of rows [B, T, 2 d] at positions [T] or [B, T]."""
        return self._turned(self.q(mixed), positions)

    def keys(self, mixed: torch.Tensor, positions: torch.Tensor) -> Keys:
        """Keys and values [B, kv_heads, T, D] of rows [B, T, 2 d] at positions [T] or [B, T]."""
        return self._turned(self.k(mixed), positions), self._heads(self.v(mixed))

    def _heads(self, made: torch.Tensor) -> torch.Tensor:
        return made.view(*made.shape[:2], -1, self.shape.head_dim).transpose(1, 2)

    def _turned(self, made: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        angle = positions[..., None].float() * self.turns.to(positions.device)
        angle = torch.cat((angle, angle), dim=-1)
        cos, sin = angle.cos().to(made.dtype), angle.sin().to(made.dtype)
        if positions.dim() > 1:
            cos, sin = cos[:, None], sin[:, None]
        return _turn(self._heads(made), cos, sin)

    def finish(self, states: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """[B, T, d] states and [B, heads, T, D] of attention -> the output [B, T, d], normed.

        It is what :meth:`say` reads, and the state of the row that goes on from here.
        """
        b, _, t, _ = attended.shape
        x = states + self.o(attended.transpose(1, 2).reshape(b, t, -1))
        y = self.mlp_norm(x)
        x = x + self.down(functional.silu(self.gate(y)) * self.up(y))
        return self.norm(x)  # type: ignore[no-any-return]

    def say(self, output: torch.Tensor) -> torch.Tensor:
        """Logits [..., Vd] over its own vocabulary."""
        return self.head(output)  # type: ignore[no-any-return]

    def unroll(
        self,
        words: Sequence[torch.Tensor],
        taps: torch.Tensor,
        rows: torch.Tensor,
        hidden: torch.Tensor,
        *,
        along: bool = False,
    ) -> list[torch.Tensor]:
        """Some rows draft on at once, each as if from there: the outputs [B, A, d] of each pass.

        A row of pass ``m`` sees the rows of pass 0 up to its own, and of later passes its own, as a
        drafted chain does (training-time test; EAGLE-3, section 3.2).

        Args:
            words: embeddings of the token that follows: [B, T, d] for pass 0, then [B, A, d].
            taps: [B, T, taps * d] the target's states.
            rows: [B, A] which rows draft on; the others are only seen.
            hidden: [B, 1, A, T] 0 where a row may see row j, minus infinity elsewhere.
            along: have the learned state, not the output before, in later passes.
        """
        times = self.shape.heads // self.shape.kv_heads
        scale, places = self.shape.head_dim**-0.5, torch.arange(taps.shape[1], device=taps.device)
        state = self.fuse(taps)
        mixed = self.mix(words[0], state)
        k, v = (part.repeat_interleave(times, 1) for part in self.keys(mixed, places))
        at = rows[..., None]
        state = state.gather(1, at.expand(-1, -1, state.shape[-1]))
        mixed = mixed.gather(1, at.expand(-1, -1, mixed.shape[-1]))
        outputs: list[torch.Tensor] = []
        own: list[Keys] = []
        for m in range(len(words)):
            if m:
                state = self.constant.to(state.dtype).expand_as(state) if along else state
                mixed = self.mix(words[m], state)
                key, value = self.keys(mixed, rows + m)
                own.append((key.repeat_interleave(times, 1), value.repeat_interleave(times, 1)))
            q = self.queries(mixed, rows + m)
            scores = (q @ k.transpose(2, 3)).float() * scale + hidden
            beside = [(q * key).sum(-1, keepdim=True).float() * scale for key, _ in own]
            shares = torch.cat((scores, *beside), dim=-1).softmax(dim=-1).to(q.dtype)
            attended = shares[..., : k.shape[2]] @ v
            for number, (_, value) in enumerate(own, k.shape[2]):
                attended = attended + shares[..., number, None] * value
            state = self.finish(state, attended)
            outputs.append(state)
        return outputs


def _turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin

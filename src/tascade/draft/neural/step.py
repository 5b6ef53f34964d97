"""A pass of a trained drafter's network over rows that come one after the other, keys kept."""

from __future__ import annotations

import torch
from torch.nn import functional

from tascade.draft.neural.network import DraftNetwork

_FIRST_CAPACITY = 512


class Step:
    """:meth:`DraftNetwork.unroll` for rows that come one after the other, with their keys kept.

    Matrices that read the same are one, and turns are looked up: at such sizes a step's time is the
    number of its operations. Where the network's weights change, make it anew.
    """

    def __init__(self, network: DraftNetwork) -> None:
        net, self._shape = network, network.shape
        self._net = net
        self._qkv = torch.cat((net.q.weight, net.k.weight, net.v.weight))
        self._gate_up = torch.cat((net.gate.weight, net.up.weight))
        nothing = self._qkv.new_zeros(self._shape.kv_heads, 0, self._shape.head_dim)
        self._keys, self._values, self._cos = nothing, nothing, self._qkv.new_zeros(0)
        self._sin = self._cos

    def _make_room(self, capacity: int) -> None:
        old = self._keys, self._values
        size = (self._shape.kv_heads, max(capacity, _FIRST_CAPACITY), self._shape.head_dim)
        self._keys, self._values = (self._qkv.new_zeros(size) for _ in "kv")
        for new, was in zip((self._keys, self._values), old, strict=True):
            new[:, : was.shape[1]] = was

    def _turns(self, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        if len(self._cos) < end:
            places = torch.arange(2 * max(end, _FIRST_CAPACITY), dtype=torch.float32)
            angle = places[:, None] * self._net.turns
            angle = torch.cat((angle, angle), dim=-1)[:, None]
            self._cos, self._sin = angle.cos().to(self._qkv), angle.sin().to(self._qkv)
        return self._cos, self._sin

    def __call__(
        self,
        words: torch.Tensor,
        states: torch.Tensor,
        at: int,
        slot: int,
        *,
        every: bool = False,
        seen: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The output [1, d] of the last of some rows.

        Args:
            words: [n, d] embeddings of the token behind each row.
            states: [n, d] as :meth:`DraftNetwork.mix` takes them.
            at: place of the first row in the text; the others stand one behind the other.
            slot: rows that are kept already, which all of these see.
            every: give the outputs [n, d] of all.
            seen: [n, slot + n] which rows each sees, where all stand beside each other at ``at``.
        """
        net, shape, n = self._net, self._shape, len(words)
        beside = seen is not None
        end, heads = slot + n, shape.heads + shape.kv_heads
        if end > self._keys.shape[1]:
            self._make_room(2 * end)
        made = functional.linear(net.mix(words, states), self._qkv).view(n, -1, shape.head_dim)
        places = 1 if beside else n
        cos, sin = (part[at : at + places] for part in self._turns(at + places))
        first, second = made[:, :heads].chunk(2, dim=-1)
        turned = made[:, :heads] * cos + torch.cat((-second, first), dim=-1) * sin
        self._keys[:, slot:end] = turned[:, shape.heads :].transpose(0, 1)
        self._values[:, slot:end] = made[:, heads:].transpose(0, 1)
        asked, mask = n if every or beside else 1, seen
        if mask is None and asked > 1:
            mask = torch.arange(end) <= torch.arange(slot, end)[:, None]
        attended = functional.scaled_dot_product_attention(
            turned[-asked:, : shape.heads].transpose(0, 1)[None],
            self._keys[None, :, :end],
            self._values[None, :, :end],
            attn_mask=None if mask is None else mask.to(self._keys.device),
            enable_gqa=shape.heads != shape.kv_heads,
        )
        x = states[-asked:] + net.o(attended[0].transpose(0, 1).reshape(asked, -1))
        gate, up = functional.linear(net.mlp_norm(x), self._gate_up).chunk(2, dim=-1)
        output: torch.Tensor = net.norm(x + net.down(functional.silu(gate) * up))
        return output

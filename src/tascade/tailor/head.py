"""One LM head for several requests at once: what any needs, and each sees its own; or for one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tascade.core import IntArray
from tascade.errors import ConfigError
from tascade.tailor.head_rows import HeadRows, Numbers
from tascade.tailor.offload.table import RowTable

_SPARE = 128
_LINES = 8


class UnionHead(torch.nn.Module):
    """An LM head whose rows are the static ones and those of all requests present.

    One product gives everybody's logits; each request's mask rules out what only others brought, so
    that no answer depends on who else is there (VocabTailor, 2508.15229, has no batches). Rows are
    counted: one is free when nobody holds it. A free row stays where it is until its place is
    needed, and is not read again if its token comes back before that.

    Requests are known by the ticket that :meth:`join` gives. Not for several threads at once.

    Args:
        table: the whole head's rows, [V, d].
        static: [n] token ids that every request has.
        bias: [V] the whole head's, where it has one.
        device, dtype: of the rows; the table's own precision by default.
        spare: rows of room for what requests bring; more are made where they do not suffice.

    Attributes:
        static: how many rows are there for good.
        length: U, how many rows :meth:`forward` covers: up to the last that anybody holds.

    Raises:
        ConfigError: a static id is not of the table.
    """

    def __init__(
        self,
        table: RowTable,
        static: Sequence[int] | Numbers,
        *,
        bias: torch.Tensor | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        spare: int = _SPARE,
    ) -> None:
        super().__init__()
        self.table = table
        self.vocab_size, self.width = table.shape
        self._rows = HeadRows(table, bias=bias, device=device, dtype=dtype)
        first = self._rows.asked(static)
        self.static = self.length = len(first)
        self._tickets, self._lines = 0, dict[int, int]()
        self._holders = np.zeros(0, np.int32)
        self._held = np.zeros((0, 0), np.bool_)
        self._rows.reserve(len(first) + spare)
        self._resize(_LINES)
        self._rows.put(first, slice(0, len(first)))
        self._holders[: self.static] = 1  # for good

    @property
    def ids(self) -> torch.Tensor:
        """[n] token of each row that somebody holds, the static ones first."""
        held = torch.from_numpy(np.flatnonzero(self._holders))
        return self._rows.ids[held.to(self._rows.ids.device)]

    @property
    def nbytes(self) -> int:
        """Bytes that rows and masks take on the device, room included."""
        return self._rows.nbytes + self._hidden.numel()

    def join(self, tokens: Sequence[int] | Numbers) -> int:
        """A request comes, with these tokens (its prompt's, say); any may repeat.

        Returns:
            Its ticket, which is never given again.

        Raises:
            ConfigError: an id is not of the table; nothing is taken then.
        """
        asked = self._rows.asked(tokens)
        taken = set(self._lines.values())
        line = next((i for i in range(len(self._held)) if i not in taken), len(self._held))
        if line == len(self._held):
            self._resize(2 * line)
        self._held[line] = False
        self._take(line, asked)
        ticket = self._tickets
        self._tickets += 1
        self._lines[ticket] = line
        return ticket

    def extend(self, ticket: int, tokens: Sequence[int] | Numbers) -> int:
        """A request takes these tokens too.

        Returns:
            How many were new to it.

        Raises:
            ConfigError: an id is not of the table (nothing is taken then), or no such ticket.
        """
        return self._take(self._line(ticket), self._rows.asked(tokens))

    def leave(self, ticket: int) -> None:
        """A request goes. Rows that were its alone are free.

        Raises:
            ConfigError: no such ticket.
        """
        line = self._line(ticket)
        del self._lines[ticket]
        self._holders[self.static + np.flatnonzero(self._held[line])] -= 1
        held = np.flatnonzero(self._holders[: self.length])
        self.length = int(held[-1]) + 1 if len(held) else 0

    def has(self, ticket: int, token: int) -> bool:
        """Whether a request can say a token.

        Raises:
            ConfigError: no such ticket.
        """
        line = self._line(ticket)
        if not 0 <= token < self.vocab_size or self._rows.places[token] < 0:
            return False
        own = int(self._rows.places[token]) - self.static
        return own < 0 or bool(self._held[line, own])

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., d] final states -> [..., U] logits of all rows, whoever holds them.

        :meth:`spread` and :meth:`argmax` say which token they are of. Call them before anybody
        joins or extends: a free row may be another token's then.
        """
        return self._rows.logits(hidden, self.length)

    def spread(self, logits: torch.Tensor, tickets: Sequence[int]) -> torch.Tensor:
        """[N, U] logits -> [N, V] float32 by token id, minus infinity where a request has it not.

        Args:
            logits: what :meth:`forward` gave, after whatever the model does to its logits.
            tickets: [N] whose each row is; one may have several rows.

        Raises:
            ConfigError: no such ticket, or not one for each row.
        """
        values = self._masked(logits, tickets)
        ids = self._rows.ids[: logits.shape[1]]
        held = np.flatnonzero(self._holders[: logits.shape[1]])
        if len(held) < logits.shape[1]:  # what lies in a gap may be a row's old place
            there = torch.from_numpy(held).to(ids.device)
            values, ids = values[:, there], ids[there]
        wide = values.new_full((len(values), self.vocab_size), -torch.inf)
        wide[:, ids] = values
        return wide

    def argmax(self, logits: torch.Tensor, tickets: Sequence[int]) -> list[int]:
        """The token of each row's largest logit: what ``spread(...).argmax(-1)`` gives, cheaper.

        Of equals it is the lowest id, whichever rows they are in. Arguments and errors as for
        :meth:`spread`.
        """
        values = self._masked(logits.detach(), tickets)
        if values.shape[1] == 0:
            return [0] * len(values)
        if values.device.type == "cpu":  # where NumPy's argmax is 20 times torch's
            return _argmax_on_host(values.numpy(), self._rows.tokens)
        found: list[int] = _argmax_on_device(values, self._rows.ids[: values.shape[1]]).tolist()
        return found

    def _masked(self, logits: torch.Tensor, tickets: Sequence[int]) -> torch.Tensor:
        """A float32 copy of ``logits`` [N, U], minus infinity in rows that a request may not see.

        Everybody sees the static rows, so only what is behind them costs anything.
        """
        if len(tickets) != len(logits):
            raise ConfigError(
                "each row of logits is somebody's",
                got=f"{len(logits)} rows, {len(tickets)} tickets",
                wanted="one ticket a row",
            )
        lines = torch.tensor([self._line(t) for t in tickets], dtype=torch.long)
        values = logits.to(torch.float32, copy=True)
        own = values[:, self.static :]
        hidden = self._hidden[lines.to(self._hidden.device), : own.shape[1]]
        own.masked_fill_(hidden, -torch.inf)
        return values

    def _line(self, ticket: int) -> int:
        try:
            return self._lines[ticket]
        except KeyError:
            raise ConfigError(
                "no request has this ticket",
                got=ticket,
                wanted=f"one of the {len(self._lines)} present",
                fix="use what join() returned, until leave()",
            ) from None

    def _take(self, line: int, asked: npt.NDArray[np.int64]) -> int:
        """Have a line hold the rows of these tokens; how many it had not held."""
        own = self._settle(asked) - self.static
        own = own[own >= 0]
        new = own[~self._held[line, own]]
        self._holders[self.static + new] += 1
        self._held[line, new] = True
        if len(new):
            self.length = max(self.length, self.static + int(new.max()) + 1)
        self._hidden[line].copy_(torch.from_numpy(~self._held[line]))
        return len(new)

    def _settle(self, asked: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
        """The places of these tokens' rows, after those that nobody holds were put in order.

        They get the lowest places that are free, as every row up to the last one held costs time.
        """
        places = self._rows.places[asked]
        loose = places < 0
        loose[~loose] = self._holders[places[~loose]] == 0
        count = int(loose.sum())
        if count == 0:
            return places
        free = np.flatnonzero(self._holders == 0)
        if count > len(free):
            own = self._rows.capacity - len(free) + count - self.static
            self._rows.reserve(self.static + 2 * own)
            self._resize(len(self._held))
            free = np.flatnonzero(self._holders == 0)
        low = free[:count]
        fresh = places < 0
        far = loose & (places > low[-1])
        target = np.setdiff1d(low, places[loose & ~fresh & ~far])
        moved, written = np.split(target, [int(far.sum())])
        if len(moved):
            self._rows.move(places[far], moved)
            places[far] = moved
        if len(written):
            run = len(written) == written[-1] - written[0] + 1
            at = slice(int(written[0]), int(written[-1]) + 1) if run else written
            self._rows.put(asked[fresh], at)
            places[fresh] = written
        return places

    def _resize(self, lines: int) -> None:
        """Make masks for so many requests, as wide as there is room for rows."""
        room = self._rows.capacity
        held = np.zeros((lines, room - self.static), np.bool_)
        held[: len(self._held), : self._held.shape[1]] = self._held
        self._held = held
        more = np.zeros(room - len(self._holders), np.int32)
        self._holders = np.concatenate((self._holders, more))
        with torch.inference_mode(False):
            self._hidden = torch.from_numpy(~held).to(self._rows.ids.device)


def _argmax_on_host(values: npt.NDArray[np.float32], tokens: npt.NDArray[np.int64]) -> list[int]:
    """[N] token of each row's largest value, the lowest of equals.

    Args:
        values: [N, U].
        tokens: [C] token of each place, U of them or more.
    """
    places = values.argmax(1)
    found: list[int] = tokens[places].tolist()
    top = values[np.arange(len(values)), places][:, None]
    equal = values == top
    if np.count_nonzero(equal) != len(values) or not np.isfinite(top).all():
        for i, most in enumerate(top[:, 0]):
            among = np.isnan(values[i]) if np.isnan(most) else equal[i]
            found[i] = 0 if most == -np.inf else int(tokens[: len(among)][among].min())
    return found


def _argmax_on_device(values: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """The same for a device, where comparisons cost next to nothing and a loop does not."""
    most = values.amax(1, keepdim=True)
    equal = (values == most) | values.isnan()
    last = torch.iinfo(tokens.dtype).max
    found = torch.where(equal, tokens, last).amin(1)
    return found.masked_fill(most[:, 0] == -torch.inf, 0)


class RequestHead:
    """A :class:`UnionHead` with one request in it, whose rows the next one takes over.

    Args:
        table, static, options: as there.

    Attributes:
        union: that head.
    """

    def __init__(self, table: RowTable, static: Sequence[int] | Numbers, **options: Any) -> None:
        self.union = UnionHead(table, static, **options)
        self._ticket = self.union.join(())

    def __contains__(self, token: object) -> bool:
        return isinstance(token, int) and self.union.has(self._ticket, token)

    def begin(self, prompt: Sequence[int] | IntArray) -> None:
        """Forget the request before; take the tokens of ``prompt`` [T]."""
        self.union.leave(self._ticket)
        self._ticket = self.union.join(())
        self.extend(prompt)

    def extend(self, tokens: Sequence[int] | Numbers) -> int:
        """Take these tokens too.

        Returns:
            How many were new.

        Raises:
            ConfigError: an id is not of the table; none is taken then.
        """
        return self.union.extend(self._ticket, tokens)

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., d] final states -> [..., n] logits of its rows."""
        found: torch.Tensor = self.union(hidden)
        return found

    def spread(self, logits: torch.Tensor) -> torch.Tensor:
        """[N, n] -> [N, V] float32 by token id, minus infinity for tokens it does not have."""
        return self.union.spread(logits, [self._ticket] * len(logits))

    def argmax(self, logits: torch.Tensor) -> list[int]:
        """[N, n] -> the token of each row's largest logit, of equals the lowest."""
        return self.union.argmax(logits, [self._ticket] * len(logits))

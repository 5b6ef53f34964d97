"""What steps cost: running means that a busy machine's slow steps do not spoil."""

from __future__ import annotations

from dataclasses import dataclass, field

_STEPS = 32


@dataclass(slots=True)
class Pace:
    """Seconds (or what else is counted) for each of something, over the last steps or so."""

    steps: float = 0.0
    amount: float = 0.0
    seconds: float = 0.0

    @property
    def each(self) -> float:
        """Seconds for one; 0 where nothing is known."""
        return self.seconds / self.amount if self.amount else 0.0

    @property
    def is_full(self) -> bool:
        """Whether older steps have been forgotten."""
        return self.steps > _STEPS - 1

    def add(self, amount: float, seconds: float, most: float = 4.0) -> None:
        """A step that came to so much; what is above ``most`` times the mean is not counted, as one
        slow step of a busy machine is not what steps cost.
        """
        if self.steps:
            seconds = min(seconds, most * max(self.seconds / self.steps, self.each * amount))
        keep = min(1.0, (_STEPS - 1) / self.steps) if self.steps else 1.0
        self.steps = keep * self.steps + 1
        self.amount = keep * self.amount + amount
        self.seconds = keep * self.seconds + seconds


@dataclass(slots=True)
class Steps:
    """What one kind of step costs: all of them, and those of about one size."""

    all: Pace = field(default_factory=Pace)
    by_size: dict[int, Pace] = field(default_factory=dict)

    def of_size(self, size: int) -> Pace:
        """The pace of steps of up to 1, 2, 4, 8 ... places."""
        return self.by_size.setdefault((size - 1).bit_length(), Pace())

    def add(self, requests: int, seconds: float, size: int) -> None:
        """A step of so many places."""
        self.all.add(requests, seconds)
        self.of_size(size).add(requests, seconds)

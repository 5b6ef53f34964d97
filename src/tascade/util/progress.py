"""What long work shows of itself: bars on a terminal and in notebooks, lines elsewhere."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, TypeVar, cast

from tascade.core import Progress, silent

F = TypeVar("F", bound=Callable[..., Any])

_EVERY = 10.0
"""Seconds between two lines about one stage."""


@contextmanager
def shown(progress: Progress | bool | None) -> Iterator[Progress]:
    """Something to tell of one's progress: a function called with (stage, done, total).

    Args:
        progress: a function of the caller's, which is used as it is; ``True`` for bars on a
            terminal or in a notebook and lines on stderr elsewhere; ``False`` for nothing; ``None``
            for bars where there is a terminal or a notebook, and lines by the logger ``tascade``,
            at its level INFO, elsewhere.
    """
    if callable(progress):
        yield progress
        return
    if progress is False:
        yield silent
        return
    from rich.console import Console

    console = Console(stderr=True, highlight=False, emoji=False)
    if console.is_terminal or console.is_jupyter:
        with bars(console) as show:
            yield show
    elif progress:
        yield Lines(lambda line: console.print(line, markup=False, soft_wrap=True))
    else:
        yield Lines(logging.getLogger("tascade").info)


class Lines:
    """A line when a stage begins, and one every ten seconds with how far it is.

    Args:
        write: takes a line.
        clock: seconds.
    """

    def __init__(
        self, write: Callable[[str], Any], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._write, self._clock = write, clock
        self._stage, self._first, self._began, self._told = "", 0, 0.0, 0.0

    def __call__(self, stage: str, done: int, total: int | None) -> None:
        """Take what is told."""
        now = self._clock()
        if stage != self._stage:
            self._stage, self._first, self._began, self._told = stage, done, now, now
            self._write(f"{stage} ..." if total is None else f"{stage} ({total}) ...")
        elif now - self._told >= _EVERY:
            self._told = now
            took, new = now - self._began, done - self._first
            far = f"{done}" if total is None else f"{done} of {total}"
            left = None if total is None or not new else took / new * (total - done)
            self._write(f"  {stage}: {far}" + ("" if left is None else f", {spelt(left)} left"))


def in_time(done: int, took: float, seconds: float, total: int) -> int:
    """How many of ``total`` there is time for in ``seconds``, where so many took so long."""
    return min(total, int(done * seconds / max(took, 1e-9)))


def spelt(seconds: float) -> str:
    """An estimated duration as people say it: about 40 s, about 3 min, about 2 h."""
    return f"about {duration(seconds)}"


def duration(seconds: float) -> str:
    """A duration as people say it: 40 s, 3 min, 2 h."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    if seconds < 90 * 60:
        return f"{round(seconds / 60)} min"
    return f"{seconds / 3600:.1f} h"


@contextmanager
def bars(console: Any) -> Iterator[Progress]:
    """One bar a stage, with the time that is left; one that moves where that is not known."""
    from rich.progress import (
        BarColumn,
        SpinnerColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as Bars

    columns = (
        SpinnerColumn(finished_text="✓"),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=16),  # names and times fit beside it in 80 columns
        TextColumn("{task.fields[far]}", markup=False),
        TimeElapsedColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Bars(*columns, console=console, transient=True, speed_estimate_period=600) as drawn:
        tasks: dict[str, Any] = {}
        now = told = ""

        def show(stage: str, done: int, total: int | None) -> None:
            nonlocal now, told
            far = "" if total is None else f"{done}/{total}"
            if stage != now:
                if now:  # what comes next has begun, so what was before is done
                    drawn.update(tasks[now], total=1, completed=1, far=told)
                if stage in tasks:
                    drawn.reset(tasks[stage], total=total)
                else:
                    tasks[stage] = drawn.add_task(stage, total=total, far=far)
                now = stage
            drawn.update(tasks[stage], completed=done, total=total, far=far)
            told = far if done else ""  # what told nothing on its way has no count at its end

        yield show


def shows_progress(function: F) -> F:
    """Have a function's ``progress`` argument, by keyword, be what :func:`shown` makes of it."""

    @wraps(function)
    def shows(*args: Any, progress: Progress | bool | None = None, **options: Any) -> Any:
        with shown(progress) as tell:
            return function(*args, progress=tell, **options)

    return cast(F, shows)


def teller(progress: Progress | bool | None) -> Progress:
    """The function in a ``progress`` argument; one that says nothing where there is none."""
    return progress if callable(progress) else silent

"""One thread at a time runs a model, whoever has wrapped it, and it is left as it was."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary


class _Lock:
    """A re-entrant lock that any thread may release: a `with` that is suspended in a generator or
    a coroutine may be left by another thread than the one that came in.
    """

    def __init__(self) -> None:
        self._free, self._owner, self.depth = threading.Lock(), 0, 0

    def acquire(self) -> None:
        me = threading.get_ident()
        if self._owner != me:
            self._free.acquire()
            self._owner = me
        self.depth += 1

    def release(self) -> None:
        self.depth -= 1
        if not self.depth:
            self._owner = 0
            self._free.release()


# Beside the models, not in them: what is in a model is saved, copied and compared with it.
_locks: WeakKeyDictionary[Any, _Lock] = WeakKeyDictionary()
_making = threading.RLock()


@contextmanager
def exclusive(model: Any) -> Iterator[None]:
    """Have a model to oneself, in evaluation mode, as long as the block lasts.

    Everything of tascade that runs a model does so in here; other threads wait, also those that
    know the same model by another wrapper. A model that is being trained is put back into training
    mode afterwards, module by module.

    Args:
        model: the loaded model itself; one lock for each.
    """
    with _making:
        lock = _locks.setdefault(model, _Lock())
    lock.acquire()
    training = [m for m in model.modules() if m.training] if model.training else []
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True
        lock.release()

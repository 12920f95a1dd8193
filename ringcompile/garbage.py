"""How often Python looks for garbage, where a command makes graphs by the hundred."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def few_collections() -> Iterator[None]:
    """Look for garbage seldom while a command compiles.

    Each collection visits every node of every graph that is alive, which is a fifth or more of a
    compilation. This is for whole processes: two threads would undo each other's settings.

    What was made meanwhile is then old: it is looked at in the next full collection, not at once,
    which would take as long as what was saved, mostly in a process that is about to end.
    """
    before = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(1_000_000, 20, 50)
    try:
        yield
    finally:
        gc.freeze()
        gc.set_threshold(*before)
        gc.unfreeze()

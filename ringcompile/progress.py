"""How far long work is: loops that may take seconds tell, and commands show it on a terminal."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

T = TypeVar("T")
Listener = Callable[[str, int, int], None]
_listener: ContextVar[Listener | None] = ContextVar("_listener", default=None)


@contextmanager
def heard_by(listener: Listener | None) -> Iterator[None]:
    """Let a function hear of the work inside.

    Args:
        listener: takes what is counted, how many of them are done, and how many there are; None:
            nobody hears.
    """
    before = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(before)


def counted(what: str, items: Collection[T]) -> Iterator[T]:
    """The items one by one; of loops inside one another only the outermost is told."""
    tell = _listener.get()
    if tell is None:
        yield from items
        return
    for done, item in enumerate(items):
        tell(what, done, len(items))
        with heard_by(None):
            yield item
    tell(what, len(items), len(items))

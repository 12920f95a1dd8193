"""A command looks for garbage neither while it compiles nor as soon as it is done."""

from __future__ import annotations

import gc
from typing import Any

from ringcompile.garbage import few_collections


def test_no_search_at_the_end() -> None:
    seen: list[Any] = []

    def note(phase: str, info: dict[str, int]) -> None:
        seen.append((phase, info))

    gc.collect()
    before = gc.get_threshold()
    gc.callbacks.append(note)
    try:
        with few_collections():
            kept = [[i] for i in range(100_000)]
        more = [[i] for i in range(10)]
        found = list(seen)
    finally:
        gc.callbacks.remove(note)
    assert found == []
    assert (len(kept), len(more), gc.get_threshold()) == (100_000, 10, before)


def test_garbage_is_found_later() -> None:
    class Knot:
        def __init__(self) -> None:
            self.own = self

    with few_collections():
        knots = [Knot() for _ in range(10)]
        del knots
    assert gc.collect() >= 10

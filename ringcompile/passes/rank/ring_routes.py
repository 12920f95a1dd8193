"""Who sees which keys of a ring, and how far each chunk of them travels: from positions alone."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from ringcompile.ir.types import SequenceSplit
from ringcompile.ops.blocks import Band


@dataclass(frozen=True, eq=False)
class Route:
    """Who sees what, and how far each chunk travels, from positions alone.

    What it has found out is kept by the object, not by its many positions: see `route`.

    Attributes:
        queries: the chunks of queries, by index, of the rank at each place of the ring.
        keys: the chunks of keys and values that each starts with, likewise.
        band: which keys a query sees.
        chunk: the length of a chunk where it is known.
    """

    queries: tuple[tuple[int, ...], ...]
    keys: tuple[tuple[int, ...], ...]
    band: Band
    chunk: int | None = None

    def sees(self, rank: int, block: int, slot: int) -> bool:
        """Whether a query of the rank sees a key of the chunk that `block` holds in this slot."""
        return bool(self.rows(rank, block, (slot,)))

    @lru_cache(maxsize=1 << 16)  # noqa: B019  (there are few routes)
    def rows(self, rank: int, block: int, slots: tuple[int, ...]) -> tuple[int, ...]:
        """Which slots of the rank's queries see some of these slots of the block's keys."""
        queries, keys = self.queries[rank], self.keys[block]
        return tuple(
            i
            for i, query in enumerate(queries)
            if any(self.relation(query, keys[slot]) != "empty" for slot in slots)
        )

    def relation(self, query: Any, key: Any) -> str:
        """How much of a chunk of keys a chunk of queries sees, by index."""
        return self.band.chunk_relation(query, key, self.chunk)

    @lru_cache(maxsize=1 << 16)  # noqa: B019  (as for `rows`)
    def hops(self, block: int, slot: int) -> dict[int, int]:
        """How many ranks down (1) and up (-1) the ring a chunk travels.

        As few as reach all that see it; among equals the way down is taken, so that chunks share
        transfers.
        """
        ranks = len(self.keys)
        seen = [d for d in range(1, ranks) if self.sees((block + d) % ranks, block, slot)]
        total, down = min(
            (down + ranks - beyond, -down)
            for down, beyond in zip((0, *seen), (*seen, ranks), strict=True)
        )
        return {1: -down, -1: total + down}

    def moving(self, block: int, direction: int, step: int) -> tuple[int, ...]:
        """The slots of a block that take another hop in this direction at this step."""
        slots = range(len(self.keys[block]))
        return tuple(slot for slot in slots if self.hops(block, slot)[direction] > step)


route = lru_cache(maxsize=256)(Route)  # one for all layers and ranks


@lru_cache(maxsize=256)
def chunk_shares(level: SequenceSplit) -> tuple[tuple[int, ...], ...]:
    """The chunks of every share, once for all layers and ranks."""
    return tuple(tuple(map(int, level.chunks(rank))) for rank in range(level.num_ranks))


def runs_of(have: tuple[int, ...], kept: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Some of the slots of a tensor's chunks, in runs that lie side by side."""
    runs: list[list[int]] = []
    for slot in kept:
        if runs and have.index(slot) == have.index(runs[-1][-1]) + 1:
            runs[-1].append(slot)
        else:
            runs.append([slot])
    return [tuple(run) for run in runs]

"""Who sees which keys of a ring, and who sends them to whom in which turn: from positions alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

from sympy import factorint

from ringcompile.ir.types import SequenceSplit
from ringcompile.ops.blocks import Band

_Slots = tuple[int, ...]


@dataclass(frozen=True)
class Turn:
    """What a rank sends of its own keys and values in one turn, and what it takes of another's.

    Attributes:
        turn: its number, from 1.
        to: the place of the ring that it sends to; None where it sends nothing.
        sends: the slots of its own chunks that go there.
        source: the place that it takes from; None where nothing comes.
        takes: the slots of that place's chunks that come.
    """

    turn: int
    to: int | None
    sends: _Slots
    source: int | None
    takes: _Slots


@dataclass(frozen=True, eq=False)
class Route:
    """Who sees what, and in which turn each rank sends its own keys to which other one.

    What it has found out is kept by the object, not by its many positions: see `route`.

    Attributes:
        queries: the chunks of queries, by index, of the rank at each place of the ring.
        keys: the chunks of keys and values that each starts with, likewise.
        band: which keys a query sees.
        chunk: the length of a chunk where it is known.
    """

    queries: tuple[_Slots, ...]
    keys: tuple[_Slots, ...]
    band: Band
    chunk: int | None = None

    @lru_cache(maxsize=1 << 17)  # noqa: B019  (there are few routes)
    def seen(self, rank: int, block: int) -> _Slots:
        """The slots of the chunks that `block` holds of which a query of the rank sees a key."""
        slots = range(len(self.keys[block]))
        return tuple(slot for slot in slots if self.rows(rank, block, (slot,)))

    @lru_cache(maxsize=1 << 17)  # noqa: B019  (as for `seen`)
    def rows(self, rank: int, block: int, slots: _Slots) -> _Slots:
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

    @lru_cache(maxsize=1 << 12)  # noqa: B019  (as for `seen`)
    def meetings(self, rank: int) -> tuple[Turn, ...]:
        """What a rank exchanges, turn by turn; turns in which it has nothing to do are left out."""
        turns = range(1, len(self.keys))
        found = (self._meeting(rank, turn, self._bases) for turn in turns)
        return tuple(one for one in found if one.sends or one.takes)

    @cached_property
    def _bases(self) -> _Slots:
        """The order of turns in which the busiest rank has the fewest; near ones first if equal.

        In the order of one base, a rank sends to the next place, then to the one behind that, and
        so on, which windows need the first few of. By prime factors, it goes through the ranks of
        a pair first, then of two pairs, and so on, as far as places come in pairs: with two, four
        or eight of them on a node, either all messages of a turn stay on their nodes or all leave
        them, so that none waits for a slower one.
        """
        ranks = len(self.keys)
        primes = tuple(p for p, times in sorted(factorint(ranks).items()) for _ in range(times))
        return min(primes, (ranks,), key=self._most_meetings)

    def _most_meetings(self, bases: _Slots) -> int:
        ranks = range(len(self.keys))
        return max(
            sum(
                bool(self.seen(rank, reached(rank, -turn, bases))
                     or self.seen(reached(rank, turn, bases), rank))
                for turn in ranks[1:]
            )
            for rank in ranks
        )

    def _meeting(self, rank: int, turn: int, bases: _Slots) -> Turn:
        to, source = reached(rank, turn, bases), reached(rank, -turn, bases)
        sends, takes = self.seen(to, rank), self.seen(rank, source)
        return Turn(turn, to if sends else None, sends, source if takes else None, takes)


def reached(place: int, turn: int, bases: Sequence[int]) -> int:
    """The place that another one sends to in a turn, or takes from if the turn is negative.

    Digits are added one by one, without a carry, so that in every turn each place is reached from
    one other, and over all turns each from every other.

    Args:
        place: from 0.
        turn: its number, from 1.
        bases: of the digits, the last one's first; their product is the number of places.
    """
    found, unit, sign = 0, 1, 1 if turn >= 0 else -1
    for base in bases:
        found += (place // unit + sign * (abs(turn) // unit)) % base * unit
        unit *= base
    return found


route = lru_cache(maxsize=256)(Route)  # one for all layers and ranks


@lru_cache(maxsize=256)
def chunk_shares(level: SequenceSplit) -> tuple[_Slots, ...]:
    """The chunks of every share, once for all layers and ranks."""
    return tuple(tuple(map(int, level.chunks(rank))) for rank in range(level.num_ranks))

"""Which rank keeps which position of a sequence: a function of the lengths so far, and no message.

New tokens go in blocks to the rank that keeps fewest, ties to the lowest: no rank ever keeps more
than its share and one block. On each rank positions rise from slot to slot.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

BLOCK = 32
# What a rank may keep beyond its even share: a block, and one position for a share that is uneven.
_SLACK = BLOCK + 1


def slots_of(capacity: int, ranks: int) -> int:
    """The slots on each rank, for so many tokens in all."""
    return capacity if ranks == 1 else min(capacity, capacity // ranks + _SLACK)


@dataclass
class Reach:
    """How far back a sequence can go, where some of its state is written over in turn.

    Such state is kept for one block more than is looked back at.

    Attributes:
        bounded: whether there is such state.
        highest: the most tokens that there were since the sequence was empty.
    """

    bounded: bool
    highest: int = 0

    def extend(self, length: int) -> None:
        """Take in tokens, of which there are `length` then, or might be."""
        self.highest = max(self.highest, length)

    def holds(self, length: int) -> bool:
        """Whether what the first `length` tokens left behind is still there."""
        return not self.bounded or length == 0 or self.highest - length <= BLOCK

    def rewind(self, length: int) -> None:
        """Go back to so many tokens."""
        if length == 0:
            self.highest = 0


@dataclass
class Ledger:
    """The positions that each rank keeps.

    Attributes:
        ranks: how many ranks share the sequence.
        length: positions so far.
        runs: (rank, first position, end), in order of positions.
    """

    ranks: int
    length: int = 0
    runs: list[tuple[int, int, int]] = field(default_factory=list)

    def count(self, rank: int) -> int:
        """The positions that a rank keeps."""
        return sum(end - start for owner, start, end in self.runs if owner == rank)

    def extend(self, num: int) -> list[tuple[int, int, int]]:
        """Give `num` new positions to ranks; the new runs."""
        counts = [self.count(rank) for rank in range(self.ranks)]
        end, added = self.length + num, []
        while self.length < end:
            rank, room = self._open(counts)
            stop = min(self.length + room, end)
            counts[rank] += stop - self.length
            added.append((rank, self.length, stop))
            self._add(rank, stop)
        return added

    def _open(self, counts: list[int]) -> tuple[int, int]:
        """The rank whose turn it is, and how many positions it still takes."""
        if self.runs:
            rank, start, end = self.runs[-1]
            if (end - start) % BLOCK:
                return rank, BLOCK - (end - start) % BLOCK
        return min(range(self.ranks), key=counts.__getitem__), BLOCK

    def _add(self, rank: int, stop: int) -> None:
        """A run of one block at most: one that is not full is continued."""
        last = self.runs[-1] if self.runs else None
        if last is not None and last[0] == rank and (last[2] - last[1]) % BLOCK:
            self.runs[-1] = (rank, last[1], stop)
        else:
            self.runs.append((rank, self.length, stop))
        self.length = stop

    def place(self, runs: Iterable[tuple[int, int, int]]) -> None:
        """Keep the first positions where a prompt's computation leaves them.

        Args:
            runs: (rank, first position, end), in any order; together all positions from 0 on.
        """
        assert not self.runs, "positions are kept already"
        self.runs = sorted(runs, key=lambda run: run[1])
        self.length = self.runs[-1][2]

    def rewind(self, length: int) -> None:
        """Forget the positions from `length` on."""
        kept = [(rank, start, min(end, length)) for rank, start, end in self.runs if start < length]
        self.runs, self.length = kept, length

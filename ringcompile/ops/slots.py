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


# A step of fixed shapes reads a multiple of so many slots; from one power of two to the next there
# are at most so many sizes.
_SMALLEST_BUCKET, _SIZES_A_DOUBLING = 256, 4


def bucket_of(used: int, slots: int) -> int:
    """How many of a rank's slots a step of fixed shapes reads, so that it reads all in use.

    Sizes are few, and what is read besides is a quarter of what is in use, or less than 256.

    Args:
        used: slots in use, on the rank that keeps most.
        slots: those there are.
    """
    apart = max(_SMALLEST_BUCKET, (1 << (used - 1).bit_length()) // (2 * _SIZES_A_DOUBLING))
    return min(slots, -(-used // apart) * apart)


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
        counts: the positions that each rank keeps.
    """

    ranks: int
    length: int = 0
    runs: list[tuple[int, int, int]] = field(default_factory=list)
    counts: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self._count()

    def count(self, rank: int) -> int:
        """The positions that a rank keeps."""
        return self.counts[rank]

    def _count(self) -> None:
        self.counts = [0] * self.ranks
        for owner, start, end in self.runs:
            self.counts[owner] += end - start

    def extend(self, num: int) -> list[tuple[int, int, int]]:
        """Give `num` new positions to ranks; the new runs."""
        end, added = self.length + num, []
        while self.length < end:
            rank, room = self._open()
            stop = min(self.length + room, end)
            added.append((rank, self.length, stop))
            self._add(rank, stop)
        return added

    def _open(self) -> tuple[int, int]:
        """The rank whose turn it is, and how many positions it still takes."""
        if self.runs:
            rank, start, end = self.runs[-1]
            if (end - start) % BLOCK:
                return rank, BLOCK - (end - start) % BLOCK
        return min(range(self.ranks), key=self.counts.__getitem__), BLOCK

    def _add(self, rank: int, stop: int) -> None:
        """A run of one block at most: one that is not full is continued."""
        last = self.runs[-1] if self.runs else None
        if last is not None and last[0] == rank and (last[2] - last[1]) % BLOCK:
            self.runs[-1] = (rank, last[1], stop)
        else:
            self.runs.append((rank, self.length, stop))
        self.counts[rank] += stop - self.length
        self.length = stop

    def place(self, runs: Iterable[tuple[int, int, int]]) -> None:
        """Keep the first positions where a prompt's computation leaves them.

        Args:
            runs: (rank, first position, end), in any order; together all positions from 0 on.
        """
        assert not self.runs, "positions are kept already"
        self.runs = sorted(runs, key=lambda run: run[1])
        self.length = self.runs[-1][2]
        self._count()

    def rewind(self, length: int) -> None:
        """Forget the positions from `length` on."""
        kept = [(rank, start, min(end, length)) for rank, start, end in self.runs if start < length]
        self.runs, self.length = kept, length
        self._count()

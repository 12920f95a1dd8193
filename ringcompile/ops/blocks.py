"""Which keys a block of queries can see, from positions alone.

A band `lower <= query position - key position <= upper` (either end may be open) covers full,
causal and sliding-window attention. Whether a chunk of queries sees all, none or some of a chunk of
keys follows from their indices, often without knowing how long a chunk is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import inf

import torch


@dataclass(frozen=True)
class Band:
    """Visible iff lower <= query - key <= upper; None leaves an end open. Causal is Band(0)."""

    lower: int | None = None
    upper: int | None = None

    def __and__(self, other: Band) -> Band:
        lowers = [b.lower for b in (self, other) if b.lower is not None]
        uppers = [b.upper for b in (self, other) if b.upper is not None]
        return Band(max(lowers) if lowers else None, min(uppers) if uppers else None)

    @property
    def is_causal(self) -> bool:
        """Whether a query sees its own position and all before it, with no window."""
        return self == Band(0)

    def relation(self, low: float, high: float) -> str:
        """"full", "empty" or "partial" for queries minus keys that range over low..high."""
        lower = -inf if self.lower is None else self.lower
        upper = inf if self.upper is None else self.upper
        if high < lower or low > upper:
            return "empty"
        return "full" if low >= lower and high <= upper else "partial"

    def chunk_relation(self, query: int, key: int, chunk: int | None) -> str:
        """The relation of two chunks by index; `chunk` is their length, None if not yet known."""
        apart = query - key
        if chunk is not None:
            return self.relation((apart - 1) * chunk + 1, (apart + 1) * chunk - 1)
        # For any chunk length of at least 1: the bounds that hold for all of them.
        return self.relation(apart if apart >= 1 else -inf, apart if apart <= -1 else inf)

    def mask(self, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Bool [Sq, Sk] from int64 positions [Sq] and [Sk]."""
        apart = queries[:, None] - keys[None, :]
        if self.upper is None:
            return torch.ones_like(apart, dtype=torch.bool) if self.lower is None else (
                apart >= self.lower
            )
        visible = apart <= self.upper
        return visible if self.lower is None else visible.logical_and_(apart >= self.lower)

    def __str__(self) -> str:
        if self == Band():
            return "full"
        if self.is_causal:
            return "causal"
        if self.lower == 0 and self.upper is not None:
            return f"causal window {self.upper + 1}"
        return f"band {self.lower}..{self.upper}"


@dataclass(frozen=True)
class Piece:
    """A run of consecutive positions: where it starts, its length, and its offset in the tensor."""

    start: int
    length: int
    offset: int

    def positions(self, device: torch.device) -> torch.Tensor:
        """Int64 [length], one position a row."""
        return torch.arange(self.start, self.start + self.length, device=device)


def rise(runs: Sequence[Piece]) -> bool:
    """Whether positions rise from each run to the next."""
    return all(one.start < other.start for one, other in pairwise(runs))


def is_diagonal(row: Piece, column: Piece, band: Band) -> bool:
    """Whether queries and keys are the same positions, and a query sees all of them before it."""
    same = row.start == column.start and row.length == column.length
    reaches = band.upper is None or band.upper >= row.length - 1
    return same and band.lower == 0 and reaches


def pieces(
    chunks: Sequence[int] | None, chunk: int, limit: int, num_rows: int
) -> tuple[Piece, ...]:
    """The runs of positions in a tensor of `num_rows` rows.

    Args:
        chunks: indices of the chunks the tensor holds, in order; None for positions 0, 1, 2, ...
        chunk: length of a chunk.
        limit: positions from here on are padding and are left out.
        num_rows: rows of the tensor.
    """
    if chunks is None:
        return (Piece(0, min(num_rows, limit), 0),)
    found = (
        Piece(index * chunk, min(max(limit - index * chunk, 0), chunk), i * chunk)
        for i, index in enumerate(chunks)
    )
    return tuple(piece for piece in found if piece.length)

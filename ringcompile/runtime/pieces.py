"""Shares of outputs in pieces, which are freed one by one while whole outputs are put together.

The process that started the ranks gets a share from each of them and copies it to its place. If it
held all shares until the last was copied, it would hold the outputs twice. So a rank hands its
share over in pieces with memory of their own, and each is freed when it has been copied.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch

# A share that has fewer bytes goes in one piece.
_LEAST = 1 << 20
# Pieces of all ranks together. Each is an open file of the process that puts them together.
_IN_ALL = 64


@dataclass
class Pieces:
    """A share of an output, cut along one dim.

    Attributes:
        dim: the dim.
        parts: the pieces, in order; empty once they were taken.
    """

    dim: int
    parts: list[torch.Tensor]

    @property
    def dtype(self) -> torch.dtype:
        """Of the share; asked for before pieces are taken, as is `device`."""
        return self.parts[0].dtype

    @property
    def device(self) -> torch.device:
        """Where the pieces are."""
        return self.parts[0].device

    def taken(self) -> Iterator[tuple[int, torch.Tensor]]:
        """Each piece with the index at which it begins; it is kept here no longer."""
        start = 0
        self.parts.reverse()
        while self.parts:
            part = self.parts.pop()
            yield start, part
            start += part.shape[self.dim]


class InPieces(Protocol):
    """A share that is put in its place piece by piece: `Pieces`, or one that is on its way."""

    @property
    def dim(self) -> int | None:
        """The dim that the pieces are cut along; None for one piece."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the share."""

    @property
    def device(self) -> torch.device:
        """Where the pieces are."""

    def taken(self) -> Iterator[tuple[int, torch.Tensor]]:
        """Each piece with the index at which it begins; the next may overwrite it."""


Share: TypeAlias = torch.Tensor | InPieces


def in_pieces(shares: Sequence[torch.Tensor], num_ranks: int) -> tuple[Share, ...]:
    """A rank's shares of all outputs; large ones in pieces with memory of their own.

    Args:
        shares: the shares.
        num_ranks: how many ranks hand over shares.
    """
    return tuple(_cut(share, max(1, _IN_ALL // num_ranks)) for share in shares)


def _cut(share: torch.Tensor, most: int) -> Share:
    long = [dim for dim, size in enumerate(share.shape) if size > 1]
    if share.nbytes < _LEAST or not long or most == 1 or share.device.type != "cpu":
        return share
    rows = -(-share.shape[long[0]] // most)
    return Pieces(long[0], [_shared(part) for part in share.split(rows, long[0])])


def _shared(part: torch.Tensor) -> torch.Tensor:
    """A copy in shared memory: a view would hand over all of the share, a clone be copied again."""
    return torch.empty_like(part, memory_format=torch.contiguous_format).share_memory_().copy_(part)

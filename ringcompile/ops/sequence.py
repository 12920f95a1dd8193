"""The order of a split sequence: which positions a rank holds, and how shares are joined again.

This is the one place that knows `contiguous` from `zigzag` in numbers; entry, exit, positions and
gathers all go through it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def positions(
    chunks: Sequence[int], chunk: int, limit: int, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """The global positions of one rank's tokens, int64 [len(chunks) * chunk].

    Padding behind the end repeats the last position, so that looking up a position table or a
    token never leaves its range; attention and the exit leave padding out.
    """
    runs = [torch.arange(c * chunk, (c + 1) * chunk, device=device) for c in chunks]
    return torch.cat(runs).clamp_(max=max(limit - 1, 0))


def join(
    shares: Sequence[torch.Tensor], chunks: Sequence[Sequence[int]], dim: int, limit: int
) -> torch.Tensor:
    """The whole tensor from all ranks' shares, in order of position, without the padding.

    Args:
        shares: each rank's tensor, its `dim` made of the rank's chunks.
        chunks: each rank's chunk indices.
        dim: the split dim.
        limit: the true length.
    """
    by_index = {}
    for share, held in zip(shares, chunks, strict=True):
        for index, run in zip(held, share.chunk(len(held), dim), strict=True):
            by_index[index] = run
    whole = torch.cat([by_index[index] for index in sorted(by_index)], dim)
    return whole.narrow(dim, 0, limit)

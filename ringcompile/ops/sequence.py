"""The order of a split sequence: which positions a rank holds, and how shares are joined again.

This is the one place that knows `contiguous` from `zigzag` in numbers; entry, exit, positions and
gathers all go through it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F


def positions(
    chunks: Sequence[int], chunk: int, limit: int, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """The global positions of one rank's tokens, int64 [len(chunks) * chunk].

    Padding behind the end repeats the last position, so that looking up a position table or a
    token never leaves its range; attention and the exit leave padding out.
    """
    runs = [torch.arange(c * chunk, (c + 1) * chunk, device=device) for c in chunks]
    return torch.cat(runs).clamp_(max=max(limit - 1, 0))


def window_positions(
    chunks: Sequence[int],
    chunk: int,
    before: int,
    after: int,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """The positions in the windows of one rank's chunks, int64 [len(chunks) * window].

    Unlike `positions` these run on over both ends of the sequence: position -1 is in front of it.

    Args:
        chunks: the indices of the rank's chunks.
        chunk: tokens in a chunk.
        before: tokens of a window before its chunk.
        after: tokens of a window behind its chunk.
        device: where they are put.
    """
    runs = [torch.arange(c * chunk - before, (c + 1) * chunk + after, device=device)
            for c in chunks]
    return torch.cat(runs)


def trim(x: torch.Tensor, *, dim: int, before: int, after: int, chunks: int) -> torch.Tensor:
    """Windows without their first and last tokens.

    Args:
        x: [.., chunks * window, ..].
        dim: the dim with the windows.
        before: how many tokens each window loses at its beginning.
        after: how many it loses at its end.
        chunks: the number of windows.
    """
    if not before and not after:
        return x
    apart = x.unflatten(dim, (chunks, -1))
    size = apart.shape[dim + 1] - before - after
    return apart.narrow(dim + 1, before, size).flatten(dim, dim + 1)


def in_order(x: torch.Tensor, chunks: Sequence[int]) -> torch.Tensor:
    """Chunks of equal length, one behind the other along dim 0, in the order of their indices.

    Args:
        x: [len(chunks) * chunk, ..].
        chunks: their indices, each from 0 to len(chunks) - 1 once.
    """
    apart = x.unflatten(0, (len(chunks), x.shape[0] // len(chunks))).unbind()
    return torch.cat([apart[place] for place in sorted(range(len(chunks)), key=chunks.__getitem__)])


def own_tokens(x: torch.Tensor, *, dim: int, size: int) -> torch.Tensor:
    """A rank's share [.., n, ..] of a split dim without its padding: the first `size` entries."""
    return x.narrow(dim, 0, size)


def padded_tokens(x: torch.Tensor, *, dim: int, size: int) -> torch.Tensor:
    """A rank's own tokens [.., m, ..] as its share of a split dim: zeros behind them.

    Where there is no padding, that is x itself.
    """
    if x.shape[dim] == size:
        return x
    return F.pad(x, [0, 0] * (x.dim() - 1 - dim) + [0, size - x.shape[dim]])


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

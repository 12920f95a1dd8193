"""Keys and values in one buffer, so that one transfer carries both."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def pack(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Keys and values in one buffer, so that one transfer carries both.

    Tokens come first, so that a run of them is dense and can be sent as it is. Where keys and
    values already lie in one such buffer, this is a view of it, as `reshape` is one if it can be.

    Args:
        k: [B,G,S,D].
        v: [B,G,S,E].

    Returns:
        [S,B,2G,D] where both have the same head dim; else [S,B,G,D+E].
    """
    k, v, dim = k.permute(2, 0, 1, 3), v.permute(2, 0, 1, 3), 2 if k.shape[3] == v.shape[3] else 3
    apart = v.storage_offset() - k.storage_offset()
    beside = (
        k.untyped_storage()._cdata == v.untyped_storage()._cdata
        and k.stride() == v.stride()
        and apart == k.stride(dim) * k.shape[dim]
    )
    if not beside:
        return torch.cat([k, v], dim)
    shape = (*k.shape[:dim], k.shape[dim] + v.shape[dim], *k.shape[dim + 1 :])
    return k.as_strided(shape, k.stride())


def unpack(kv: Sequence[torch.Tensor], head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys [B,G,S,D] and values [B,G,S,E]: from `pack`, or as they are where there are two."""
    if len(kv) == 2:
        return kv[0], kv[1]
    packed = kv[0].permute(1, 2, 0, 3)
    if packed.shape[3] == head_dim:
        k, v = packed.chunk(2, 1)
        return k, v
    return packed[..., :head_dim], packed[..., head_dim:]

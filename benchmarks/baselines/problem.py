"""The problem every attention contestant solves, and how its tensors lie on the ranks."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Case:
    """Causal self-attention on random float32 tensors [1, num_heads, num_tokens, head_dim]."""

    num_heads: int
    head_dim: int
    num_tokens: int

    def local_tensors(self, rank: int, world: int) -> tuple[torch.Tensor, ...]:
        """Return this rank's zigzag shard of query, key and value, cut from the same numbers."""
        generator = torch.Generator().manual_seed(0)
        shape = (1, self.num_heads, self.num_tokens, self.head_dim)
        whole = [torch.randn(shape, generator=generator) for _ in range(3)]
        return tuple(zigzag_shard(tensor, rank, world) for tensor in whole)


def zigzag_shard(tensor: torch.Tensor, rank: int, world: int) -> torch.Tensor:
    """Rank r's two of 2 x world chunks along dim 2: number r from the front and r from the back.

    Every rank so has the same number of unmasked (query, key) pairs under a causal mask.
    """
    chunks = tensor.chunk(2 * world, dim=2)
    return torch.cat([chunks[rank], chunks[-1 - rank]], dim=2)


def zigzag_unshard(shards: list[torch.Tensor]) -> torch.Tensor:
    """Put the ranks' shards back into sequence order."""
    halves = [shard.chunk(2, dim=2) for shard in shards]
    return torch.cat([first for first, _ in halves] + [last for _, last in reversed(halves)], dim=2)

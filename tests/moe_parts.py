"""What mixtures of experts have in common: the capacity, experts, routers; see `moe_styles`."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CAPACITY_FACTOR: Final = (5, 4)  # 1.25 as a fraction: capacities are exact


def capacity_of(tokens: int, top_k: int, num_experts: int) -> int:
    """ceil(1.25 * tokens * top_k / num_experts), and 1 at least."""
    above, below = CAPACITY_FACTOR
    return max(1, -(-(above * tokens * top_k) // (below * num_experts)))


class PlainExpert(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.up = nn.Linear(size, 2 * size)
        self.down = nn.Linear(2 * size, size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class GatedExpert(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.gate = nn.Linear(size, 2 * size, bias=False)
        self.up = nn.Linear(size, 2 * size, bias=False)
        self.down = nn.Linear(2 * size, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Mixture(nn.Module):
    """What all styles share: softmax over a linear router, top-k, weights that sum to 1."""

    capacity_factor: tuple[int, int] | None = None

    def __init__(self, size: int = 16, num_experts: int = 4, top_k: int = 2) -> None:
        super().__init__()
        self.size, self.num_experts, self.top_k = size, num_experts, top_k
        self.router = nn.Linear(size, num_experts, bias=False)
        self.make_experts()

    def make_experts(self) -> None:
        self.experts = nn.ModuleList(GatedExpert(self.size) for _ in range(self.num_experts))

    def route(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and experts of every token's choices, each [T, K]."""
        scores = F.softmax(self.router(tokens), dim=-1)
        weights, experts = torch.topk(scores, self.top_k, dim=-1)
        return weights / weights.sum(dim=-1, keepdim=True), experts

    def expert(self, number: int, tokens: Tensor) -> Tensor:
        """What one expert makes of tokens [T, D]: for tests."""
        return self.experts[number](tokens)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(x.reshape(-1, self.size)).view(x.shape)

    def mix(self, tokens: Tensor) -> Tensor:
        raise NotImplementedError


class Stacked(Mixture):
    """The experts' weights in two tensors [E, D, F] and [E, F, D]."""

    def make_experts(self) -> None:
        shape = (self.num_experts, self.size, 2 * self.size)
        self.up = nn.Parameter(torch.randn(shape) * self.size**-0.5)
        self.down = nn.Parameter(torch.randn(shape).mT.contiguous() * (2 * self.size) ** -0.5)

    def expert(self, number: int, tokens: Tensor) -> Tensor:
        return F.silu(tokens @ self.up[number]) @ self.down[number]

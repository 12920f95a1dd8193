"""A mixture of experts in plain PyTorch: static shapes, no write in place, no look at the data.

Letters in shapes: T tokens (of the whole batch, flattened), D hidden_size, E num_experts, K top_k,
C slots of an expert, F mlp_hidden.
"""

from __future__ import annotations

from fractions import Fraction

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ringcompile.models.config import TransformerConfig


def capacity(num_tokens: int, top_k: int, num_experts: int, factor: Fraction) -> int:
    """Slots of one expert: ceil(factor * num_tokens * top_k / num_experts).

    In integers, so that it is exact and stays symbolic where ``num_tokens`` is.
    """
    return -(-(factor.numerator * num_tokens * top_k) // (factor.denominator * num_experts))


class Experts(nn.Module):
    """E MLPs side by side, plain (GELU) or gated (SiLU), each on tokens of its own."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        into = (config.num_experts, config.hidden_size, config.mlp_hidden)
        back = (config.num_experts, config.mlp_hidden, config.hidden_size)
        dtype = getattr(torch, config.dtype)
        self.gated = config.mlp == "gated"
        if self.gated:
            self.gate_proj = nn.Parameter(torch.empty(into, dtype=dtype))
        self.up_proj = nn.Parameter(torch.empty(into, dtype=dtype))
        self.down_proj = nn.Parameter(torch.empty(back, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """[E, C, D] -> [E, C, D]."""
        inner = torch.bmm(x, self.up_proj)
        inner = F.silu(torch.bmm(x, self.gate_proj)) * inner if self.gated else F.gelu(inner)
        return torch.bmm(inner, self.down_proj)


class MoE(nn.Module):
    """Each token through the K experts that its router chooses; no bias anywhere.

    With a capacity factor an expert takes its first C tokens, and adds nothing to the others that
    chose it. First is in the order of tokens, and within a token the better choice. (GShard, arXiv
    2006.16668, puts all first choices before all second ones: then a token could lose its slot to a
    later one, and a decoder would not be causal.)
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.num_experts, self.top_k = config.num_experts, config.top_k
        self.capacity_factor = config.capacity_factor
        self.router = nn.Linear(
            config.hidden_size, config.num_experts, bias=False, dtype=getattr(torch, config.dtype)
        )
        self.experts = Experts(config)

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, D] -> [B, S, D]."""
        tokens = x.reshape(-1, x.shape[-1])
        weights, chosen = self.route(tokens)
        if self.capacity_factor is None:
            out = self._every_expert(tokens, weights, chosen)
        else:
            slots = capacity(tokens.shape[0], self.top_k, self.num_experts, self.capacity_factor)
            out = self._slots(tokens, weights, chosen, slots)
        return out.view(x.shape)

    def route(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Each token's experts [T, K], the best first, and their weights [T, K], which sum to 1."""
        scores = F.softmax(self.router(tokens), dim=-1, dtype=torch.float32)
        weights, chosen = torch.topk(scores, self.top_k, dim=-1)
        weights = weights / weights.sum(dim=-1, keepdim=True)
        return weights.to(tokens.dtype), chosen

    def _every_expert(self, tokens: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """Without capacity: all experts on all tokens, the weight 0 where one was not chosen."""
        gates = weights.new_zeros(tokens.shape[0], self.num_experts).scatter(1, chosen, weights)
        out = self.experts(tokens.expand(self.num_experts, -1, -1))
        return (out * gates.t().unsqueeze(-1)).sum(dim=0)

    def _slots(self, tokens: Tensor, weights: Tensor, chosen: Tensor, slots: int) -> Tensor:
        """Each choice takes its expert's next slot; those past the last share one that is cut."""
        size, experts = tokens.shape[1], chosen.reshape(-1)
        one_hot = F.one_hot(experts, self.num_experts)
        arrival = ((one_hot.cumsum(dim=0) - 1) * one_hot).sum(dim=-1)
        repeated = tokens.unsqueeze(1).expand(-1, self.top_k, -1).reshape(-1, size)
        buffer = tokens.new_zeros(self.num_experts, slots + 1, size)
        buffer = buffer.index_put((experts, arrival.clamp(max=slots)), repeated)
        out = self.experts(buffer[:, :slots])
        picked = out[experts, arrival.clamp(max=slots - 1)]
        kept = torch.where((arrival < slots).unsqueeze(-1), picked, 0.0)
        return (kept.view(-1, self.top_k, size) * weights.unsqueeze(-1)).sum(dim=1)

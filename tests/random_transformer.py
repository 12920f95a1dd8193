"""The model of a random case, in plain PyTorch.

Letters in shapes: B batch, S sequence, H heads, K KV heads, D head_dim, E hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.random_cases import (
    BANDS,
    MAX_LENGTH,
    MIXTURES,
    VOCABULARY,
    Case,
)


def rotate(x: Tensor, angles: Tensor, pairs: bool) -> Tensor:
    """Rotary positions, by halves or by neighbours; x [B, H, S, D], angles [S or B, S, D / 2]."""
    angles = angles.unsqueeze(-3)
    cos, sin = angles.cos(), angles.sin()
    if pairs:
        even, odd = x[..., ::2], x[..., 1::2]
        return torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


class Attention(nn.Module):
    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case
        widths = [case.heads * case.head_dim, *[case.kv_heads * case.head_dim] * 2]
        self.widths = widths
        if case.fused:
            self.qkv = nn.Linear(case.hidden, sum(widths))
        else:
            self.query, self.key, self.value = (nn.Linear(case.hidden, w) for w in widths)
        if case.qk_norm:
            self.query_norm, self.key_norm = (nn.RMSNorm(case.head_dim) for _ in range(2))
        self.out = nn.Linear(widths[0], case.hidden, bias=False)

    def forward(self, x: Tensor, angles: Tensor | None, mask: Tensor | None) -> Tensor:
        case = self.case
        if case.fused:
            projected = self.qkv(x).split(self.widths, dim=-1)
        else:
            projected = (self.query(x), self.key(x), self.value(x))
        query, key, value = (
            y.view(*x.shape[:2], -1, case.head_dim).transpose(1, 2) for y in projected)
        if case.qk_norm:
            query, key = self.query_norm(query), self.key_norm(key)
        if angles is not None:
            pairs = case.positions == "rotary in pairs"
            query, key = rotate(query, angles, pairs), rotate(key, angles, pairs)
        key, value = self.grouped(key), self.grouped(value)
        out = self.attend(query, key, value, mask)
        return self.out(out.transpose(1, 2).reshape(*x.shape[:2], -1))

    def grouped(self, x: Tensor) -> Tensor:
        """KV heads for all query heads, unless attention does it."""
        groups = self.case.heads // self.case.kv_heads
        if self.case.grouping == "flag" or groups == 1:
            return x
        if self.case.grouping == "repeat":
            return x.repeat_interleave(groups, dim=1)
        batch, heads, length, size = x.shape
        expanded = x[:, :, None].expand(batch, heads, groups, length, size)
        return expanded.reshape(batch, heads * groups, length, size)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        case = self.case
        if case.attention == "sdpa":
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, is_causal=case.mask_form == "flag",
                scale=case.scale, enable_gqa=case.grouping == "flag")
        scale = case.head_dim**-0.5 if case.scale is None else case.scale
        if case.attention == "matmul":
            scores = torch.matmul(query, key.transpose(-2, -1)) * scale
        else:
            scores = torch.einsum("bhqd,bhkd->bhqk", query * scale, key)
        if mask is not None and mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        elif mask is not None:
            scores = scores + mask
        weights = scores.softmax(dim=-1)
        if case.attention == "matmul":
            return weights @ value
        return torch.einsum("bhqk,bhkd->bhqd", weights, value)


class Plain(nn.Module):
    def __init__(self, size: int, gated: bool) -> None:
        super().__init__()
        self.gate = nn.Linear(size, 2 * size) if gated else None
        self.up, self.down = nn.Linear(size, 2 * size), nn.Linear(2 * size, size)

    def forward(self, x: Tensor) -> Tensor:
        up = self.up(x)
        return self.down(F.gelu(up) if self.gate is None else F.silu(self.gate(x)) * up)


class Block(nn.Module):
    def __init__(self, case: Case) -> None:
        super().__init__()
        self.placement = case.placement
        norm = nn.RMSNorm if case.norm == "rms" else nn.LayerNorm
        self.norms = nn.ModuleList(norm(case.hidden) for _ in range(4))
        self.attention = Attention(case)
        if case.mlp in MIXTURES:
            self.mlp = MIXTURES[case.mlp](case.hidden, case.experts, case.top_k)
        else:
            self.mlp = Plain(case.hidden, case.mlp == "gated")

    def forward(self, x: Tensor, *where: Tensor | None) -> Tensor:
        first, second, third, fourth = self.norms
        if self.placement == "parallel":
            return x + self.attention(first(x), *where) + self.mlp(first(x))
        if self.placement == "post":
            x = first(x + self.attention(x, *where))
            return second(x + self.mlp(x))
        if self.placement == "pre":
            x = x + self.attention(first(x), *where)
            return x + self.mlp(second(x))
        x = x + third(self.attention(first(x), *where))
        return x + fourth(self.mlp(second(x)))


class RandomModel(nn.Module):
    """The model of a case, in float64."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(case.seed)
            if case.inputs == "tokens":
                self.embedding = nn.Embedding(VOCABULARY, case.hidden)
            if case.positions == "learned":
                self.table = nn.Embedding(MAX_LENGTH, case.hidden)
            if case.positions == "ALiBi":
                self.register_buffer("slopes", torch.rand(case.heads) * 0.5 + 0.05)
            width = case.hidden if case.positions == "sinusoidal" else case.head_dim
            exponent = torch.arange(0, width, 2) / width
            self.register_buffer("frequencies", 30.0**-exponent)
            self.blocks = nn.ModuleList(Block(case) for _ in range(case.layers))
            self.norm = nn.LayerNorm(case.hidden)
            self.head = nn.Linear(case.hidden, VOCABULARY, bias=False)
            for name, parameter in self.named_parameters():
                if parameter.ndim == 1 or "router" in name:
                    nn.init.normal_(parameter, mean=float("norm" in name), std=0.4)
        self.double().eval()

    def forward(
        self,
        inputs: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        documents: Tensor | None = None,
    ) -> Any:
        case = self.case
        x = self.embedding(inputs) if case.inputs == "tokens" else inputs
        position_ids = self.counted(x, attention_mask, position_ids)
        angles = position_ids[..., None] * self.frequencies
        if case.positions == "learned":
            x = x + self.table(position_ids)
        elif case.positions == "sinusoidal":
            x = x + torch.cat((angles.sin(), angles.cos()), dim=-1)
        if case.documents == "counted":
            documents = (inputs == 0).cumsum(dim=1)
        mask = self.mask(x, attention_mask, documents)
        rotary = angles if case.positions.startswith("rotary") else None
        for block in self.blocks:
            x = block(x, rotary, mask)
        out = self.headed(self.norm(x), attention_mask)
        return {"out": out, "hidden": x} if case.extra_output else out

    def counted(self, x: Tensor, mask: Tensor | None, given: Tensor | None) -> Tensor:
        """Positions [S] or [B, S]."""
        if self.case.counted == "given":
            assert given is not None
            return given
        if self.case.counted == "from the padding mask":
            assert mask is not None
            return (mask.cumsum(dim=-1) - 1).clamp(min=0)
        return torch.arange(x.shape[1], device=x.device)

    def mask(self, x: Tensor, padding: Tensor | None, documents: Tensor | None) -> Tensor | None:
        """What attention takes as its mask, [1 or B, 1 or H, S, S]."""
        case, length = self.case, x.shape[1]
        index = torch.arange(length, device=x.device)
        i, j = index[:, None], index[None, :]
        allowed = None
        if case.band == "causal" and case.tril:
            allowed = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
        elif case.band != "bidirectional":
            allowed = BANDS[case.band](i, j, case.width)
        parts = [allowed[None, None]] if allowed is not None else []
        if padding is not None:
            parts.append(padding.bool()[:, None, None, :])
        if documents is not None:
            parts.append((documents[:, :, None] == documents[:, None, :]).unsqueeze(1))
        if case.mask_form == "flag" or (not parts and case.positions != "ALiBi"):
            return None
        bias = x.new_zeros(())
        if case.positions == "ALiBi":
            bias = -self.slopes[:, None, None] * (i - j).abs()
        return self.formed(parts, bias)

    def formed(self, parts: list[Tensor], bias: Tensor) -> Tensor:
        """All parts of the mask in one tensor, boolean or additive."""
        if not parts:
            return bias
        allowed = parts[0]
        for part in parts[1:]:
            allowed = allowed & part
        if self.case.mask_form == "boolean" and bias.ndim == 0:
            return allowed
        lowest = float("-inf") if self.case.mask_form == "-inf" else torch.finfo(bias.dtype).min
        return torch.where(allowed, bias, lowest)

    def headed(self, x: Tensor, mask: Tensor | None) -> Tensor:
        if self.case.head == "last real":
            assert mask is not None
            x = x[torch.arange(x.shape[0], device=x.device), mask.sum(dim=1) - 1]
        elif self.case.head == "mean" and mask is not None:
            real = mask.unsqueeze(-1).to(x.dtype)
            x = (x * real).sum(dim=1) / real.sum(dim=1)
        else:
            x = POOLED[self.case.head](x)
        return self.head(x)


POOLED: Final[dict[str, Callable[[Tensor], Tensor]]] = {
    "logits": lambda x: x,
    "last": lambda x: x[:, -1],
    "last kept": lambda x: x[:, -1:, :],
    "first": lambda x: x[:, 0],
    "mean": lambda x: x.mean(dim=1),
}


def inputs_of(case: Case, length: int) -> dict[str, Tensor]:
    """Inputs of a length, by name."""
    generator = torch.Generator().manual_seed(1000 * case.seed + length)
    shape = (case.batch, length)
    if case.inputs == "tokens":
        found = {"inputs": torch.randint(VOCABULARY // 4, shape, generator=generator)}
    else:
        found = {"inputs": torch.randn(
            (*shape, case.hidden), generator=generator, dtype=torch.float64)}
    if case.padding != "none":
        kept = torch.randint(1, length + 1, (case.batch, 1), generator=generator)
        mask = (torch.arange(length) < kept).long()
        found["attention_mask"] = mask if case.padding == "right" else mask.flip(1)
    if case.counted == "given":
        found["position_ids"] = torch.randint(MAX_LENGTH, shape, generator=generator)
    if case.documents == "given":
        found["documents"] = torch.randint(3, shape, generator=generator).sort(dim=1).values
    return found

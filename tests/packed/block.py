"""A small Llama whose linear layers are of a kind that is given."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

VOCABULARY, WIDTH, HEADS, KV_HEADS, HIDDEN, LAYERS = 64, 64, 4, 2, 128, 2


def _rotated(x: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    rate = 100.0 ** -(torch.arange(half, dtype=x.dtype) / half)
    angle = torch.arange(x.shape[2], dtype=x.dtype)[:, None] * rate
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


class Block(nn.Module):
    """Grouped-query attention and a gated MLP."""

    def __init__(self, linear: Callable[[int, int], nn.Module]) -> None:
        super().__init__()
        self.input_norm, self.post_norm = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.head = WIDTH // HEADS
        self.q_proj = linear(WIDTH, HEADS * self.head)
        self.k_proj = linear(WIDTH, KV_HEADS * self.head)
        self.v_proj = linear(WIDTH, KV_HEADS * self.head)
        self.o_proj = linear(HEADS * self.head, WIDTH)
        self.gate_proj, self.up_proj = linear(WIDTH, HIDDEN), linear(WIDTH, HIDDEN)
        self.down_proj = linear(HIDDEN, WIDTH)

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(*x.shape[:2], -1, self.head).transpose(1, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.input_norm(x)
        q, k, v = (self._heads(f(y)) for f in (self.q_proj, self.k_proj, self.v_proj))
        out = F.scaled_dot_product_attention(
            _rotated(q), _rotated(k), v, is_causal=True, enable_gqa=True
        )
        x = x + self.o_proj(out.transpose(1, 2).flatten(2))
        y = self.post_norm(x)
        return x + self.down_proj(F.silu(self.gate_proj(y)) * self.up_proj(y))


class Llama(nn.Module):
    """Token ids -> logits."""

    def __init__(self, linear: Callable[[int, int], nn.Module], layers: int = LAYERS) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Block(linear) for _ in range(layers))
        self.norm = nn.RMSNorm(WIDTH)
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm(x))

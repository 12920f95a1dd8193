"""Diffusion transformers in small: text and image tokens, one attention over both."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

DIM, HEADS = 16, 4


class JointBlock(nn.Module):
    """Two streams with weights of their own, modulated by the time step, and one attention."""

    def __init__(self, image_first: bool = False, rotary: str = "joint") -> None:
        super().__init__()
        self.image_first, self.rotary = image_first, rotary
        self.norm = nn.LayerNorm(DIM, elementwise_affine=False)
        self.modulation = nn.ModuleList(nn.Linear(DIM, 6 * DIM) for _ in range(2))
        self.qkv = nn.ModuleList(nn.Linear(DIM, 3 * DIM) for _ in range(2))
        self.out = nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(2))
        self.up = nn.ModuleList(nn.Linear(DIM, 2 * DIM) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(2 * DIM, DIM) for _ in range(2))

    def forward(
        self, image: torch.Tensor, text: torch.Tensor, step: torch.Tensor, angles: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        streams = [text, image]
        changes = [m(F.silu(step))[:, None].chunk(6, -1) for m in self.modulation]
        parts = []
        for i, x in enumerate(streams):
            x = self.norm(x) * (1 + changes[i][0]) + changes[i][1]
            q, k, v = (
                y.unflatten(-1, (HEADS, -1)).transpose(1, 2)
                for y in self.qkv[i](x).chunk(3, -1)
            )
            if self.rotary == "image" and i == 1:
                q, k = rotated(q, angles), rotated(k, angles)
            parts.append((q, k, v))
        if self.image_first:
            parts.reverse()
        q, k, v = (torch.cat(pair, 2) for pair in zip(*parts, strict=True))
        if self.rotary == "joint":
            q, k = rotated(q, angles), rotated(k, angles)
        shown = None if mask is None else self._shown(mask, image)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=shown).transpose(1, 2).flatten(2)
        num_text = text.shape[1]
        attended = (
            [y[:, image.shape[1]:], y[:, : image.shape[1]]] if self.image_first
            else [y[:, :num_text], y[:, num_text:]]
        )
        made = []
        for i, x in enumerate(streams):
            x = x + changes[i][2] * self.out[i](attended[i])
            h = self.norm(x) * (1 + changes[i][3]) + changes[i][4]
            made.append(x + changes[i][5] * self.down[i](F.gelu(self.up[i](h))))
        return made[1], made[0]

    def _shown(self, mask: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        everything = mask.new_ones(image.shape[:2])
        parts = [everything, mask] if self.image_first else [mask, everything]
        return torch.cat(parts, 1)[:, None, None, :].bool()


class JointModel(nn.Module):
    """Blocks with two streams, then one over the tokens of both; gives the image's tokens."""

    def __init__(self, layers: int = 2, single: bool = True, **how) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(JointBlock(**how) for _ in range(layers))
        self.single = nn.Linear(DIM, 3 * DIM) if single else None
        self.enter, self.leave = nn.Linear(4, DIM), nn.Linear(DIM, 4)

    def forward(
        self, image: torch.Tensor, text: torch.Tensor, step: torch.Tensor, angles: torch.Tensor,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        x = self.enter(image)
        for block in self.blocks:
            x, text = block(x, text, step, angles, mask)
        if self.single is not None:
            both = torch.cat([text, x], 1)
            q, k, v = (
                y.unflatten(-1, (HEADS, -1)).transpose(1, 2)
                for y in self.single(both).chunk(3, -1)
            )
            y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            x = (both + y)[:, text.shape[1]:]
        return self.leave(x)


def rotated(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Pairs of features turned by [tokens, pairs] angles."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)

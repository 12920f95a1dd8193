"""Weights as they lie in GGUF files, and a linear layer that keeps them so.

A row of a weight is a run of blocks. A block holds the scale of its values, for some types with a
smallest value, and their codes, of which two and more may share a byte. What is computed here from
the bytes of a block is what the `gguf` package computes, operation by operation, in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


def _half(blocks: torch.Tensor, start: int) -> torch.Tensor:
    """The float16 number in two bytes of each block, as float32 [.., 1]."""
    return blocks[..., start : start + 2].view(torch.float16).float()


def _codes(data: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes of some bits in bytes [.., W], [.., 8/bits, W]: the lowest ones of all bytes first."""
    mask = (1 << bits) - 1
    return torch.stack([(data >> shift) & mask for shift in range(0, 8, bits)], -2)


def _fifth_bits(data: torch.Tensor) -> torch.Tensor:
    """Eight bits from each of four bytes, [.., 32], as the fifth bit of codes."""
    bits = torch.stack([(data >> shift) & 1 for shift in range(8)], -1)
    return bits.flatten(-2) << 4


def _q8_0(blocks: torch.Tensor) -> torch.Tensor:
    return _half(blocks, 0) * blocks[..., 2:].view(torch.int8).float()


def _q4_0(blocks: torch.Tensor) -> torch.Tensor:
    return _half(blocks, 0) * (_codes(blocks[..., 2:], 4).flatten(-2).float() - 8)


def _q4_1(blocks: torch.Tensor) -> torch.Tensor:
    codes = _codes(blocks[..., 4:], 4).flatten(-2)
    return _half(blocks, 0) * codes.float() + _half(blocks, 2)


def _q5_0(blocks: torch.Tensor) -> torch.Tensor:
    codes = _codes(blocks[..., 6:], 4).flatten(-2) | _fifth_bits(blocks[..., 2:6])
    return _half(blocks, 0) * (codes.float() - 16)


def _q5_1(blocks: torch.Tensor) -> torch.Tensor:
    codes = _codes(blocks[..., 8:], 4).flatten(-2) | _fifth_bits(blocks[..., 4:8])
    return _half(blocks, 0) * codes.float() + _half(blocks, 2)


def _scales_and_least(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What the eight parts of a K block are scaled by, and what is taken off: [.., 8, 1] each.

    Both are numbers of six bits. Those of the first four parts are the low bits of eight bytes; of
    the others four bits lie in the last four bytes, and two at the top of the first eight.
    """
    first, second, low = blocks[..., 4:8], blocks[..., 8:12], blocks[..., 12:16]
    scales = torch.cat([first & 63, (low & 15) | ((first >> 2) & 48)], -1)
    least = torch.cat([second & 63, (low >> 4) | ((second >> 2) & 48)], -1)
    scale, smallest = _half(blocks, 0) * scales.float(), _half(blocks, 2) * least.float()
    return scale.unsqueeze(-1), smallest.unsqueeze(-1)


def _k_codes(data: torch.Tensor) -> torch.Tensor:
    """Four bits of 256 values in 128 bytes, [.., 8, 32]."""
    return _codes(data.unflatten(-1, (4, 32)), 4).flatten(-3, -2)


def _q4_k(blocks: torch.Tensor) -> torch.Tensor:
    scale, least = _scales_and_least(blocks)
    return (scale * _k_codes(blocks[..., 16:]).float() - least).flatten(-2)


def _q5_k(blocks: torch.Tensor) -> torch.Tensor:
    scale, least = _scales_and_least(blocks)
    codes = _k_codes(blocks[..., 48:]) | (_codes(blocks[..., 16:48], 1) << 4)
    return (scale * codes.float() - least).flatten(-2)


def _q6_k(blocks: torch.Tensor) -> torch.Tensor:
    low = _codes(blocks[..., :128].unflatten(-1, (2, 64)), 4).flatten(-3)
    high = _codes(blocks[..., 128:192].unflatten(-1, (2, 32)), 2).flatten(-3)
    codes = (low | (high << 4)).float() - 32
    scales = _half(blocks, 208) * blocks[..., 192:208].view(torch.int8).float()
    return (scales.unsqueeze(-1) * codes.unflatten(-1, (16, 16))).flatten(-2)


@dataclass(frozen=True)
class BlockType:
    """One of the types of GGUF.

    Attributes:
        values: in a block.
        num_bytes: of a block.
        unpack: uint8 [.., num_bytes] -> float32 [.., values].
    """

    values: int
    num_bytes: int
    unpack: Callable[[torch.Tensor], torch.Tensor]


BLOCK_TYPES = {
    "Q4_0": BlockType(32, 18, _q4_0),
    "Q4_1": BlockType(32, 20, _q4_1),
    "Q5_0": BlockType(32, 22, _q5_0),
    "Q5_1": BlockType(32, 24, _q5_1),
    "Q8_0": BlockType(32, 34, _q8_0),
    "Q4_K": BlockType(256, 144, _q4_k),
    "Q5_K": BlockType(256, 176, _q5_k),
    "Q6_K": BlockType(256, 210, _q6_k),
}


class BlockLinear(nn.Module):
    """A linear layer whose weight stays in blocks, [out_features, bytes] in uint8.

    Args:
        kind: one of `BLOCK_TYPES`.
        weight: the bytes of its rows.
        bias: [out_features], if it has one.
    """

    def __init__(self, kind: str, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.kind = BLOCK_TYPES[kind]
        self.weight: torch.Tensor
        self.register_buffer("weight", weight)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def unpacked(self) -> torch.Tensor:
        """The weight [out_features, in_features] in float32."""
        return self.kind.unpack(self.weight.unflatten(-1, (-1, self.kind.num_bytes))).flatten(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[.., in_features] -> [.., out_features]."""
        return F.linear(x, self.unpacked().to(x.dtype), self.bias)

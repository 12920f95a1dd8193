"""The same bytes as another dtype: of packed weights, and of what a model computes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.support import compiled, run, some_fast


class Bits(nn.Module):
    """Attention, and behind it a matmul with a weight that is read from bytes."""

    def __init__(self, made: torch.dtype) -> None:
        super().__init__()
        self.made = made
        self.up = nn.Linear(16, 48, dtype=torch.float64)
        values = torch.randint(1, 100, (16, 16))
        held = values if made.is_floating_point else values - 50
        self.register_buffer("bytes", held.to(made).view(torch.uint8))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (4, 4)).transpose(1, 2) for t in self.up(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        return F.linear(y, self.bytes.view(self.made).to(x.dtype))


@pytest.mark.parametrize(
    ("made", "spec"),
    some_fast(
        (torch.int8, torch.int16, torch.float16, torch.float32, torch.float8_e4m3fn),
        ("ring=2", "tp=2"),
        fast=lambda made, spec: spec == "tp=2" and made in (torch.int8, torch.float16),
    ),
)
def test_a_weight_read_from_bytes(made: torch.dtype, spec: str) -> None:
    torch.manual_seed(0)
    model, x = Bits(made).eval(), torch.randn(2, 8, 16, dtype=torch.float64)
    found = run(compiled(model, (x,), spec), (x,)).outputs
    torch.testing.assert_close(found, model(x), rtol=1e-12, atol=1e-12)


class Mantissa(nn.Module):
    """Whether the last bit of what attention computes is set, in one layout only."""

    def __init__(self, joined: bool) -> None:
        super().__init__()
        self.joined = joined

    def forward(self, x: Tensor) -> Tensor:
        heads = x.unflatten(-1, (4, 4)).transpose(1, 2)
        y = F.scaled_dot_product_attention(heads, heads, heads, is_causal=True)
        halves = y.transpose(1, 2).flatten(2).view(torch.int32)
        high = halves[..., 1::2] >> 20
        return x * (halves.view(torch.int64) >> 52 if self.joined else high)


@pytest.mark.parametrize(
    ("joined", "spec"),
    some_fast((False, True), ("ring=2", "ring=2,tp=2", "pp=2"),
              fast=lambda joined, spec: spec == "ring=2,tp=2"),
)
def test_bits_of_what_a_model_computes(joined: bool, spec: str) -> None:
    model, x = Mantissa(joined).eval(), torch.randn(2, 8, 16, dtype=torch.float64).abs()
    found = run(compiled(model, (x,), spec), (x,)).outputs
    torch.testing.assert_close(found, model(x), rtol=1e-12, atol=1e-12)

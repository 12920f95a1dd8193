"""Packed weights of experts: ep gives each rank those of its experts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.packed.test_packed import bytes_of, in_double
from tests.support import compiled, difference, run

EXPERTS, WIDTH, HIDDEN, GROUP = 4, 16, 32, 8


class Int8(nn.Module):
    """A scale for each expert and output; weight [E, out, in]."""

    def __init__(self, out: int, width: int) -> None:
        super().__init__()
        self.register_buffer("codes", torch.randint(-128, 128, (EXPERTS, out, width),
                                                    dtype=torch.int8))
        self.register_buffer("scales", (0.5 + torch.rand(EXPERTS, out, 1)) / width**0.5 / 64)

    def unpack(self, dtype: torch.dtype) -> Tensor:
        return self.codes.to(dtype) * self.scales.to(dtype)


class Int4(nn.Module):
    """Two neighbours along the inputs in a byte, a scale for each group of them."""

    def __init__(self, out: int, width: int) -> None:
        super().__init__()
        self.out, self.width = out, width
        self.register_buffer("packed", torch.randint(0, 256, (EXPERTS, out, width // 2),
                                                     dtype=torch.uint8))
        self.register_buffer("scales", (0.5 + torch.rand(EXPERTS, out, width // GROUP)) / 32)

    def unpack(self, dtype: torch.dtype) -> Tensor:
        nibbles = torch.stack([self.packed & 15, self.packed >> 4], -1)
        groups = nibbles.view(EXPERTS, self.out, -1, GROUP).to(dtype) - 8
        return (groups * self.scales.to(dtype)[..., None]).view(EXPERTS, self.out, self.width)


class Fp8(nn.Module):
    """A scale for each square block of an expert's weight."""

    def __init__(self, out: int, width: int) -> None:
        super().__init__()
        self.register_buffer("codes", torch.randn(EXPERTS, out, width).to(torch.float8_e4m3fn))
        self.register_buffer("scales", (0.5 + torch.rand(EXPERTS, out // GROUP, width // GROUP)))

    def unpack(self, dtype: torch.dtype) -> Tensor:
        scales = self.scales.to(dtype).repeat_interleave(GROUP, 1).repeat_interleave(GROUP, 2)
        return self.codes.to(dtype) * scales / 4


class Mixture(nn.Module):
    """Attention, and two of four experts for each token, by buffers of slots."""

    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.qkv, self.gate = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, EXPERTS, bias=False)
        self.up, self.down = kind(HIDDEN, WIDTH), kind(WIDTH, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (4, 4)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + y.transpose(1, 2).flatten(2)
        return x + self.experts(x.flatten(0, 1)).view_as(x)

    def experts(self, x: Tensor) -> Tensor:
        tokens = x.shape[0]
        weights, chosen = self.gate(x).softmax(-1).topk(2, -1)
        taken = F.one_hot(chosen, EXPERTS).flatten(0, 1)
        slot = chosen.flatten() * tokens + (taken.cumsum(0) * taken).sum(-1) - 1
        slots = x.new_zeros(EXPERTS * tokens, WIDTH)
        slots = slots.index_copy(0, slot, x.repeat_interleave(2, 0)).view(EXPERTS, tokens, WIDTH)
        h = F.silu(torch.bmm(slots, self.up.unpack(x.dtype).transpose(1, 2)))
        y = torch.bmm(h, self.down.unpack(x.dtype).transpose(1, 2)).flatten(0, 1)
        return (y[slot].view(tokens, 2, WIDTH) * weights[..., None]).sum(1)


@pytest.mark.parametrize("spec", ["ep=2", pytest.param("ep=2,tp=2", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", [Int8, Int4, Fp8], ids=lambda kind: kind.__name__)
def test_packed_experts(kind: type[nn.Module], spec: str) -> None:
    torch.manual_seed(0)
    model, x = in_double(Mixture(kind)), torch.randn(2, 12, WIDTH, dtype=torch.float64)
    parallel = compiled(model, (x,), spec)
    assert difference(run(parallel, (x,)).outputs, model(x)) < 1e-12
    sizes = {w.name: w.num_bytes for w in parallel.program.weights.values()}
    held = bytes_of(parallel, 1)
    for name in ("up.codes", "down.codes", "up.packed", "down.packed", "up.scales", "down.scales"):
        if name in held and spec == "ep=2":
            assert held[name] == sizes[name] // 2, name
